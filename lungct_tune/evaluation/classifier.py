"""A bundle's model at work: the one way in which `predict`, `evaluate` and your own program classify images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
import pandas as pd
import torch

from lungct_tune.config.window import Window
from lungct_tune.data.inputs import ReadImage, Unreadable, read_input
from lungct_tune.data.seen_images import LearnedImages
from lungct_tune.errors import UserError
from lungct_tune.evaluation.calibration import calibrated
from lungct_tune.evaluation.inference import load_model
from lungct_tune.evaluation.metrics import CANCER, NORMAL, are_cancer_and_normal, cancer_probability
from lungct_tune.evaluation.training_features import TrainingFeatures
from lungct_tune.experiment.bundle import FEATURES, LEARNED
from lungct_tune.experiment.form import written_by_a_search
from lungct_tune.experiment.metrics import HALF, TemperatureScaling
from lungct_tune.experiment.model_config import ModelConfig
from lungct_tune.experiment.predictions import probability_columns
from lungct_tune.models.ensemble import Model, members_of
from lungct_tune.models.features import feature_channels, recorded_features
from lungct_tune.models.gradcam import grad_cam
from lungct_tune.models.preprocessing import as_grey, forward

BATCH = 32
"""Images that a GPU computes together, and that commands read or compare at a time."""


_LOCK, _BEFORE = Lock(), list[int]()  # torch's number of threads before, once for each call that computes now


@contextmanager
def _kept_threads() -> Iterator[int]:
    """Yields torch's number of threads, and sets it again.

    What the threads of a call set is the default of new threads, also of those that make the next call.
    """
    with _LOCK:
        _BEFORE.append(threads := _BEFORE[0] if _BEFORE else torch.get_num_threads())
    try:
        yield threads
    finally:
        with _LOCK:
            _BEFORE.pop()
            torch.set_num_threads(threads)


class ClassifyError(UserError):
    """These images cannot be classified with this bundle. The message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Classified:
    """What a bundle's model says about images."""

    classes: tuple[str, ...]
    uncalibrated_NC: np.ndarray
    """The network's own probabilities; of an ensemble the mean of its members'."""
    probabilities_NC: np.ndarray
    """Calibrated, float64, in the order of `classes`; rows sum to 1. Of an ensemble the mean of its members'."""
    threshold: float
    """The operating point: the probability of cancer above which an image counts as cancer."""
    seen_N: np.ndarray | None
    """Whether the model has learned from the image (see `LearnedImages.seen`); None where the bundle does not say."""
    distance_N: np.ndarray | None
    """The distance to the training images (see `TrainingFeatures`); None where the bundle does not have their features.
    Above 1 the image is unlike all that the model has learned from."""

    @property
    def predicted_N(self) -> np.ndarray:
        """The most probable class of each image, as an index."""
        return np.asarray(self.probabilities_NC.argmax(axis=1))

    def table(self) -> pd.DataFrame:
        """One row for each image: class, probabilities, cancer or normal, and what is known about the image."""
        names = np.array(self.classes, dtype=object)
        table = pd.DataFrame({"class": names[self.predicted_N]})
        for column, of_class_N in zip(probability_columns(self.classes), self.probabilities_NC.T, strict=True):
            table[column] = of_class_N
        if are_cancer_and_normal(self.classes):
            is_cancer_N = cancer_probability(self.probabilities_NC, self.classes) > self.threshold
            table["cancer_or_normal"] = np.where(is_cancer_N, CANCER, NORMAL)
        table["learned_from"] = "unknown" if self.seen_N is None else self.seen_N
        table["unlike_training"] = pd.array(
            [None] * len(table) if self.distance_N is None else self.distance_N > 1, dtype="boolean"
        )
        table["distance"] = np.nan if self.distance_N is None else self.distance_N
        return table


@dataclass(frozen=True, eq=False)
class Classifier:
    """The model of a bundle, with all that its answers depend on. It can be pickled."""

    folder: Path
    model: Model = field(repr=False)
    """On the CPU until it has classified images; from then on on the GPU, if there is one."""
    config: ModelConfig = field(repr=False)
    """config.json."""
    learned: LearnedImages | None = field(repr=False)
    """None where a bundle of an earlier version does not list its training images."""
    features: TrainingFeatures | None = field(repr=False)
    """None where a bundle of an earlier version, of a search that has not ended, or of one group does not have them."""
    device: str | None = None
    """Where it computes. None: on the GPU if there is one. A GPU computes in lower precision than a CPU."""

    @classmethod
    def load(cls, folder: Path | str, device: str | None = None) -> Self:
        """Verifies and reads a bundle.

        Args:
            device: where it computes, as torch names it; None is the GPU if there is one.

        Raises:
            BundleError: it is incomplete or altered.
        """
        folder = Path(folder)
        model, config = load_model(folder)
        learned, features = folder / LEARNED, folder / FEATURES
        with written_by_a_search(str(learned)):
            learned_images = LearnedImages(learned.read_bytes()) if learned.exists() else None
        return cls(
            folder,
            model,
            config,
            learned_images,
            TrainingFeatures.read(features.read_bytes(), feature_channels(model)) if features.exists() else None,
            device,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config.classes)

    @property
    def image_size(self) -> int:
        """Width and height of the images in pixels."""
        return self.config.preprocessing.image_size

    @property
    def window(self) -> Window | None:
        """The window of CT values in DICOM files that it was trained with; None is each file's own."""
        kept = self.config.preprocessing.window
        return Window(kept.center, kept.width) if kept else None

    @property
    def scaling(self) -> TemperatureScaling | None:
        """How the temperature was fitted; None without scaling."""
        return self.config.calibration

    @property
    def temperature(self) -> float:
        """The temperature of the probabilities; 1 without scaling."""
        return self.scaling.temperature if self.scaling else 1.0

    @property
    def threshold(self) -> float:
        """The operating point; 0.5 where a bundle of an earlier version has none."""
        return self.config.operating_point.threshold if self.config.operating_point else HALF

    def classify(self, images_NHW: np.ndarray, digests_N: Sequence[str] | np.ndarray | None = None) -> Classified:
        """Classifies images. An image has the same answer to the last digit, alone or among others.

        Args:
            images_NHW: uint8 grey, `image_size` pixels wide and high, as `read_images` gives them; may be mapped.
            digests_N: the sha256 of each image's file, to recognise a training image by its file.

        Raises:
            ClassifyError: they are not such images, or there is not one digest for each.
        """
        self._check(images_NHW)
        if digests_N is not None and len(digests_N) != len(images_NHW):
            raise ClassifyError(f"{len(digests_N)} digests for {len(images_NHW)} images; give one for each")
        uncalibrated_MNC, features_ND = self._compute(images_NHW)
        digests_N = [""] * len(images_NHW) if digests_N is None else digests_N
        return Classified(
            classes=self.classes,
            uncalibrated_NC=uncalibrated_MNC.mean(axis=0),
            probabilities_NC=np.mean(
                [calibrated(member_NC, self.temperature) for member_NC in uncalibrated_MNC], axis=0
            ),
            threshold=self.threshold,
            seen_N=self.learned.seen(images_NHW, digests_N) if self.learned else None,
            distance_N=self.features.distances(features_ND) if self.features else None,
        )

    def _compute(self, images_NHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The uncalibrated probabilities of each network of the model (M, N, C), and pooled features (N, D).

        With another size of the batch, or another number of threads, the libraries sum in another order, and the last
        digits change. So a GPU always gets `BATCH` images, the last of them black if there are fewer. A CPU computes
        each image alone, by one thread, and as many images at a time as torch has threads.
        """
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_gpu = device.type == "cuda"
        at_once, side = BATCH if on_gpu else 1, self.image_size
        members, normalisation = members_of(self.model.to(device).eval()), self.config.settings.normalisation

        @torch.inference_mode()
        def compute(start: int) -> tuple[np.ndarray, np.ndarray]:
            some_NHW = images_NHW[start : start + at_once]
            batch_NHW = np.zeros((at_once, side, side), np.uint8)
            batch_NHW[: len(some_NHW)] = some_NHW
            grey_N1HW = as_grey(torch.from_numpy(batch_NHW).to(device))
            logits_MNC = torch.stack([forward(member, grey_N1HW, normalisation) for member in members])
            probabilities_MNC, pooled_ND = logits_MNC.softmax(dim=2)[:, : len(some_NHW)], features()[: len(some_NHW)]
            return probabilities_MNC.cpu().numpy(), pooled_ND.cpu().numpy()

        with (
            recorded_features(self.model) as features,
            _kept_threads() as threads,
            ThreadPoolExecutor(1 if on_gpu else threads, "classify", torch.set_num_threads, (1,)) as pool,
        ):
            outputs = list(pool.map(compute, range(0, len(images_NHW), at_once)))
        none = (
            np.empty((len(members), 0, len(self.classes)), np.float32),
            np.empty((0, feature_channels(self.model)), np.float32),
        )
        uncalibrated, features_of = zip(none, *outputs, strict=True)
        return np.concatenate(uncalibrated, axis=1), np.concatenate(features_of)

    def classify_files(self, sources: Sequence[str | Path]) -> pd.DataFrame:
        """Reads images from files and classifies them. Their size, window and grey values are the bundle's.

        Args:
            sources: paths or URIs.

        Returns:
            One row for each: path, the columns of `Classified.table`, and why it is unreadable ("" if it is not).
            In the row of an unreadable file the other columns are missing values.

        Raises:
            ClassifyError: it is one path, and no list of them.
        """
        if isinstance(sources, str | Path):
            raise ClassifyError(f"give classify_files a list of files: [{str(sources)!r}]")
        names = [str(source) for source in sources]
        return self.tabulate(names, [self.read(name) for name in names])

    def read(self, source: str) -> ReadImage | Unreadable:
        """Reads an image from a path or a URI, as the bundle's images were read."""
        return read_input(source, self.image_size, self.window)

    def tabulate(self, sources: Sequence[str], files: Sequence[ReadImage | Unreadable]) -> pd.DataFrame:
        """Classifies files that have been read; returns the rows of `classify_files`."""
        read = {i: file for i, file in enumerate(files) if isinstance(file, ReadImage)}
        table = self.classify(self.stack(files), [image.digest for image in read.values()]).table()
        table = table.set_axis(list(read)).reindex(range(len(files)))
        table.insert(0, "path", list(sources))
        table["unreadable"] = ["" if isinstance(file, ReadImage) else file.reason for file in files]
        return table

    def heat_maps(self, images_NHW: np.ndarray, classes_N: np.ndarray) -> np.ndarray:
        """Grad-CAM maps (N, h, w), from 0 to 1, in one scale for all images.

        Args:
            images_NHW: as for `classify`.
            classes_N: the class to explain in each image, as an index.

        Raises:
            ClassifyError: the images have another size, or the bundle does not have the scale.
        """
        self._check(images_NHW)
        if self.features is None:
            raise ClassifyError(
                f"{self.folder} has no {FEATURES}, which has the common scale of heat maps: it was made by an earlier "
                "version, its search has not ended, or all that it learned from is one group. Run the search again, "
                "pull the bundle when it has ended, or give smaller groups, such as patients"
            )
        normalisation, scale = self.config.settings.normalisation, self.features.evidence_scale
        maps_N1hw, _ = grad_cam(self.model, images_NHW, classes_N[:, None], normalisation, scale)
        return np.asarray(maps_N1hw[:, 0])

    def stack(self, files: Sequence[ReadImage | Unreadable]) -> np.ndarray:
        """The images of the files that could be read, as one array (N, H, W)."""
        images = [file.image_HW for file in files if isinstance(file, ReadImage)]
        return np.array(images, dtype=np.uint8).reshape(-1, self.image_size, self.image_size)

    def _check(self, images_NHW: np.ndarray) -> None:
        size, is_array = self.image_size, isinstance(images_NHW, np.ndarray)
        if not is_array or images_NHW.dtype != np.uint8 or images_NHW.shape[1:] != (size, size):
            given = f"{images_NHW.dtype} {images_NHW.shape}" if is_array else type(images_NHW).__name__
            raise ClassifyError(
                f"this bundle classifies images as uint8 arrays (N, {size}, {size}), not as {given}. Give "
                f"classify_files the files, or decode them at {size} pixels"
            )
