"""How much a search writes to its storage, and what of that is not needed after its end."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

from lungct_tune.config.search_space import SearchSpace
from lungct_tune.config.settings import Settings
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.trial import KEPT_TRIALS

NOT_NEEDED = {
    r"trials/\d+/(model\.safetensors|valid\.npy|best\.safetensors)": "weights and predictions of the best trials",
    r"trials/\d+/(state-[\d-]+|last(-\d+)?)\.pt": "states of trials that had not ended",
    r"final/[\w.]+/(last\.pt|model\.safetensors|test_probabilities\.npy|features\.npz)": "files of the retraining",
    r"so_far/\d+/[^/]+": "bundles that were made while it ran",
    r"(search|test)-images\.npy": "images for the workers",
    r"slots/.+|[\w.-]+-seeds/.+": "folders of Ray Train, trainings with other seeds",
    r"[\w.-]+-again(-[0-9a-f]{8})?/(trials|slots)/.+|tmp\w{8}/images\.npy": "files of a replay that was killed",
    r"\.probe[\w-]*|running\.json|(.+/)?[^/]+\.[0-9a-f]{8}\.part|best\.part/.+": "temporary files",
}
"""The files that a search writes, uses while it runs, and does not use after its end: patterns of their paths in the
experiment, and what they are. The bundle has what of them is to stay. Files that match none are never removed."""

ENDED_RETRAINING = r"(final/[\w.]+)/test_probabilities\.npy"
"""The file that a retraining writes last (tuning/retrain.py)."""

RESULTS = r"trials/\d+/valid\.npy|[\w.-]+-seeds/trials/\d+/report\.json"
"""The predictions that calibrate the bundle, and the figures of the trainings with other seeds."""

STATE_SIZE = 5
"""The size of a state of one model, in sizes of its weights: weights, two of Adam, averaged weights, predictions."""

_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # as in models/truncated_resnet.py, which imports torch


def not_needed(experiment: Experiment, *, ended: bool) -> dict[str, int]:
    """The files that a search does not need any more, with their sizes in bytes.

    Args:
        ended: whether it has its bundle. Else what the bundle is made from is needed: `RESULTS`, and the retrainings
            that have ended.

    Raises:
        StorageError: the storage refuses.
    """
    files = {path: size for path, size in experiment.files().items() if _kind(path)}
    if ended:
        return files
    retrained = {found[1] for path in files if (found := re.fullmatch(ENDED_RETRAINING, path))}
    return {
        path: size
        for path, size in files.items()
        if not re.fullmatch(RESULTS, path) and path.rpartition("/")[0] not in retrained
    }


def sizes_by_kind(files: dict[str, int]) -> dict[str, int]:
    """The bytes of files from `not_needed`, by what they are, the most first."""
    sizes: Counter[str] = Counter()
    for path, size in files.items():
        sizes[_kind(path)] += size
    return dict(sizes.most_common())


def remove(experiment: Experiment, files: dict[str, int]) -> None:
    """Deletes files of an experiment, and the folders on a file system that are empty then.

    Raises:
        StorageError: the storage refuses.
    """
    for path in files:
        experiment.delete(path)
    if experiment.is_local:
        top = Path(experiment.uri)
        folders = {parent for path in files for parent in (top / path).parents if top in parent.parents}
        folders |= {
            folder for name in ("slots", "trials", "final") for folder in (top / name).rglob("*") if folder.is_dir()
        }
        for folder in sorted(folders, reverse=True):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def expected_bytes(settings: Settings, space: SearchSpace, slots: int) -> tuple[int, int]:
    """The most that a search has on its storage while it runs, and at its end, in bytes, without images.

    All trials count as those of the deepest network.
    """
    weights = weight_bytes(space.deepest)
    kept = min(settings.trials or KEPT_TRIALS + 1, KEPT_TRIALS + 1) * weights
    retrainings = 2 if settings.compare_baseline or settings.data is None else 1
    models = settings.folds if settings.ensemble and settings.folds else 1
    at_end = kept + weights * models * (1 + retrainings * (1 + STATE_SIZE))
    states = slots * 2 * STATE_SIZE * (settings.folds or 1)
    return at_end + weights * (2 + states), at_end


def free_there(experiment: Experiment, needed: int) -> str:
    """Words for the plan if the disk of a search has less space free than it may need; empty if not, or not known."""
    if not experiment.is_local:
        return ""
    folder = next(path for path in (Path(experiment.uri), *Path(experiment.uri).parents) if path.exists())
    free = shutil.disk_usage(folder).free
    return f"; only {as_size(free)} are free there" if free < needed else ""


def weight_bytes(depth: int) -> int:
    """The size of a network's weights, with batch-norm statistics, in bytes: 4 for each number."""
    numbers, channels, left = 3 * 64 * 49 + 4 * 64, 64, depth - 1
    for width, blocks in _STAGES:
        for block in range(blocks):
            shortcut = 0 if block else channels * 4 * width + 16 * width
            layers = (channels * width + 4 * width, 9 * width**2 + 4 * width, 4 * width**2 + 16 * width + shortcut)
            for layer in layers[: max(0, left)]:
                numbers += layer
            if left > 0:
                channels = (width, width, 4 * width)[min(left, 3) - 1]
            left -= 3
    head = 4 * channels + channels * 256 + 256 * 128
    return 4 * (numbers + head)


def as_size(size: float) -> str:
    """A number of bytes as text, such as "447 MB"."""
    unit, name = next(
        (unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit or name == "kB"
    )
    return f"{size / unit:.1f} {name}" if size < 10 * unit and name == "GB" else f"{size / unit:.0f} {name}"


def _kind(path: str) -> str:
    return next((what for pattern, what in NOT_NEEDED.items() if re.fullmatch(pattern, path)), "")
