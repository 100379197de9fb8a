"""The bundle: the folder that people pull. It has the model and the files that are needed to check and use it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lungct_tune import __version__
from lungct_tune.errors import UserError
from lungct_tune.experiment.folder import Experiment, locate
from lungct_tune.files import MOST_TEXT, open_file

FOLDER = "best"
SO_FAR = "so_far"
MODEL, CONFIG, METRICS = "model.safetensors", "config.json", "metrics.json"
PREDICTIONS, AUDIT, CHECKSUMS = "predictions.csv", "audit.json", "checksums.txt"
LEARNED = "learned_from.csv"
"""The list of the images that the model was trained on, see `lungct_tune.data.seen_images`."""

FEATURES = "training_features.safetensors"
"""What the model finds in its training images, see `lungct_tune.evaluation.training_features`."""


class BundleError(UserError):
    """A bundle is incomplete or altered. The message names the file and the fault."""


def write_bundle(experiment: Experiment, files: Mapping[str, bytes], folder: str = FOLDER) -> None:
    """Writes the bundle's folder, with the checksums of its files. A reader never finds half a bundle.

    On a file system the folder gets its name when it is complete. An object store cannot rename a folder, so
    `checksums.txt` is written last there: a folder without it is no bundle.
    """
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    complete = dict(files) | {CHECKSUMS: sums.encode()}
    written = f"{folder}.part" if experiment.is_local else folder
    if experiment.is_local:
        shutil.rmtree(Path(experiment.uri, written), ignore_errors=True)  # left by a run that was killed here
    for name, content in complete.items():
        experiment.write(f"{written}/{name}", content)
    if experiment.is_local:
        Path(experiment.uri, written).rename(Path(experiment.uri, folder))


def write_so_far(experiment: Experiment, files: Mapping[str, bytes], trials: int) -> None:
    """Writes the bundle of the best of the first `trials` trials, and deletes all earlier ones but the last.

    Somebody may be reading that one. Each bundle has its own folder, which is never written to again.
    """
    write_bundle(experiment, files, f"{SO_FAR}/{trials:06d}")
    for folder in _complete_so_far(experiment)[:-2]:
        experiment.delete_folder(folder)


def has_bundle(experiment: Experiment) -> bool:
    """Whether the search has ended with a bundle."""
    return experiment.exists(f"{FOLDER}/{CHECKSUMS}")


def find_bundle(experiment: Experiment) -> str | None:
    """The bundle's folder: `best`, or before the search has ended the newest in `so_far/`. None if there is none.

    Raises:
        BundleError: `best` has lost its checksums.
    """
    so_far = _complete_so_far(experiment)  # listed first: the search deletes it once `best/` is written
    final = experiment.files(FOLDER)  # in one listing, since `best/` may be put there between two
    if f"{FOLDER}/{CHECKSUMS}" in final:
        return FOLDER
    if final and not so_far:
        raise BundleError(
            f"{experiment.uri}/{FOLDER} has no {CHECKSUMS}, so it is no complete bundle. Restore that file, or move "
            f"the folder away: search --resume {experiment.name} then writes it again"
        )
    return max(so_far, default=None)


def bundle_to_give(experiment: Experiment, name: str) -> str:
    """The words for a message that say where the bundle of a search is, which the user has called `name`."""
    found = find_bundle(experiment)
    return f"give {name.rstrip('/')}/{found}" if found else "no trial has completed yet, so it has no bundle"


def _complete_so_far(experiment: Experiment) -> list[str]:
    found = (re.fullmatch(rf"({SO_FAR}/\d+)/{CHECKSUMS}", path) for path in experiment.files(SO_FAR))
    return sorted(match[1] for match in found if match)


def as_json(content: Mapping[str, Any]) -> bytes:
    """Encodes a JSON file. NaN and infinity are errors, because JSON does not have them."""
    return json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    packages = ("torch", "torchvision", "ray", "optuna", "numpy", "scikit-learn", "pillow")
    return {"lungct_tune": __version__} | {package: version(package) for package in packages}


def checksum_errors(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the files of a bundle that are missing, altered or added, each with its fault.

    Hidden files are ignored, because file managers add them everywhere.
    """
    if not (folder / CHECKSUMS).is_file():
        yield CHECKSUMS, "missing, so this is no complete bundle"
        return
    try:
        with open_file(folder / CHECKSUMS, MOST_TEXT) as listing:
            sums = _sums(listing.read())
    except (OSError, ValueError) as error:
        yield CHECKSUMS, str(error)
        return
    for name in (MODEL, CONFIG, *sums):
        if name not in sums or not (folder / name).is_file():
            yield name, "missing"
            continue
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sums[name]:
                yield name, "not the file that was written (its sha256 differs)"
    for path in folder.iterdir():
        if path.name not in (*sums, CHECKSUMS) and not path.name.startswith("."):
            yield path.name, f"not named in {CHECKSUMS}, so it is no part of the bundle"


def _sums(listing: bytes) -> dict[str, str]:
    """The sha256 of each file in checksums.txt.

    Raises:
        ValueError: a line is no checksum.
    """
    sums = {}
    for line in listing.decode(errors="replace").splitlines():
        # a bundle is one flat folder: write_bundle never wrote a name that points outside it (../x, /x)
        if not (parts := re.fullmatch(r"([0-9a-f]{64})  (\w[\w.-]*)", line)):
            raise ValueError(f"{line[:200]!r} is not the checksum of a file beside it")
        sums[parts[2]] = parts[1]
    return sums


def check_sums(where: str, listing: bytes, files: Mapping[str, bytes | None]) -> None:
    """Checks files of a bundle that have been read.

    Args:
        where: the bundle's folder, for the message.
        listing: its checksums.txt.
        files: content by name; None for a file that is not there.

    Raises:
        BundleError: a file is missing, altered or added; the message names it.
    """
    try:
        sums = _sums(listing)
    except ValueError as error:
        raise BundleError(f"{where}/{CHECKSUMS}: {error}") from error
    for name, content in files.items():
        if (None if content is None else hashlib.sha256(content).hexdigest()) != sums.get(name):
            raise BundleError(
                f"{where}/{name}: {'missing' if content is None else 'not the file that was written'}; its sha256 is "
                f"not the one in {CHECKSUMS}. Restore the file, or fetch the bundle again"
            )


def verify(folder: Path) -> None:
    """Checks a bundle against its checksums.txt.

    Raises:
        BundleError: there is no such folder, or it is that of a search; or a file is missing, altered or added; the
            message names the first one, and what to do.
    """
    search = folder.parent if folder.name == FOLDER and not folder.exists() else folder
    if (search / "settings.yaml").is_file():
        raise BundleError(f"{search} is a search; {bundle_to_give(Experiment.from_uri(str(search)), str(search))}")
    if not folder.is_dir():
        raise BundleError(
            f"there is no folder {folder}{locate(str(folder), '.').similar()}; give the folder of a bundle, "
            "results/NAME/best or as pulled"
        )
    again = "fetch the bundle again"
    if folder.name == FOLDER and (folder.parent / "settings.yaml").is_file():
        again = f"move {folder} away, and the search writes it again: --resume {folder.absolute().parent.name}"
    for name, fault in checksum_errors(folder):
        raise BundleError(f"{folder / name}: {fault}; {again}")


REPORT, CARD = "report.html", "MODEL_CARD.md"


def check_outside_bundles(out: Path, flag: str) -> None:
    """Checks that an output file or folder is not inside a bundle.

    Args:
        out: the output.
        flag: the option that named it.

    Raises:
        UserError: it is inside a bundle.
    """
    for folder in out.absolute().parents:
        if (folder / CHECKSUMS).exists() and (folder / CONFIG).exists():
            raise UserError(f"{folder} is a bundle, whose checksums are final; choose another {flag}")


@dataclass(frozen=True)
class RetrainedModel:
    """A retrained model and its predictions on the test split."""

    weights: bytes
    """safetensors."""
    probabilities_NC: np.ndarray
    """float32, in the order of the test rows."""
    features: bytes | None = None
    """Of a sample of its training images, see `lungct_tune.tuning.retrain.sample_features`; None from an earlier
    version."""
