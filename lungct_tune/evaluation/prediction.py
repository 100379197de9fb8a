"""Classifies many files with a bundle: some at a time, so that any number fits into memory; by image or by patient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import pandas as pd
from scipy.special import softmax

from lungct_tune.data.cache import decoding_threads
from lungct_tune.data.inputs import ReadImage, Unreadable
from lungct_tune.data.seen_images import NEW
from lungct_tune.evaluation.classifier import BATCH, Classifier
from lungct_tune.evaluation.metrics import CANCER, NORMAL, are_cancer_and_normal, cancer_probability
from lungct_tune.experiment.predictions import probability_columns

_LEAST = 1e-300  # a probability's logarithm must be finite

OnImages = Callable[[pd.DataFrame, np.ndarray], None]
"""Is called with the rows of images that were read and classified, and with these images (N, H, W)."""


def classify_in_parts(
    classifier: Classifier, sources: Sequence[str], on_images: OnImages | None = None
) -> Iterator[pd.DataFrame]:
    """Yields the rows of `Classifier.classify_files` for some files at a time, in order.

    Threads read the next files while these are classified.
    """
    waiting = iter(sources)
    with ThreadPoolExecutor(decoding_threads(), thread_name_prefix="read") as pool:

        def start() -> list[tuple[str, Future[ReadImage | Unreadable]]]:
            some = islice(waiting, BATCH)
            return [(source, pool.submit(classifier.read, source)) for source in some]

        reading = start()
        while reading:
            following = start()
            files = [future.result() for _, future in reading]
            names = [source for source, _ in reading]
            rows = classifier.tabulate(names, files)
            if on_images:
                on_images(rows[rows["unreadable"] == ""], classifier.stack(files))
            yield rows
            reading = following


def by_patient(images: pd.DataFrame, groups: Sequence[str], classes: tuple[str, ...], threshold: float) -> pd.DataFrame:
    """Joins the rows of images to one row for each patient.

    The probabilities are those of the mean logits of the patient's readable images: the geometric mean of their
    probabilities, scaled to a sum of 1.

    Args:
        images: rows of `Classifier.classify_files`.
        groups: the patient of each row.
        threshold: the operating point.

    Returns:
        For each patient: images, unreadable, the path of the first image, the columns of `Classified.table` (without
        the distance), and what the images are classified as, such as "normal 5, adenocarcinoma 2". `learned_from` and
        `unlike_training` are numbers of images. Without a readable image all but the first four are missing values.
    """
    columns = probability_columns(classes)
    said = ["cancer_or_normal"] if are_cancer_and_normal(classes) else []
    said = ["class", *columns, *said, "images_say", "learned_from", "unlike_training"]
    patients = []
    for patient, rows in images.groupby(np.asarray(groups, dtype=object), sort=False):
        read = rows[rows["unreadable"] == ""]
        row = {"patient": patient, "images": len(rows), "unreadable": len(rows) - len(read)}
        row["first_image"] = rows["path"].iloc[0]  # tells who a patient with a hash for a name is
        if len(read):
            logits_NC = np.log(np.maximum(read[columns].to_numpy(dtype=float), _LEAST))
            joined_C = softmax(logits_NC.mean(axis=0))
            row["class"] = classes[joined_C.argmax()]
            row |= dict(zip(columns, joined_C, strict=True))
            if are_cancer_and_normal(classes):
                is_cancer = cancer_probability(joined_C, classes) > threshold
                row["cancer_or_normal"] = CANCER if is_cancer else NORMAL
            row["images_say"] = ", ".join(f"{name} {n}" for name, n in read["class"].value_counts().items())
            seen, unlike = read["learned_from"], read["unlike_training"]
            row["learned_from"] = None if (seen == "unknown").any() else int((seen != NEW).sum())
            row["unlike_training"] = None if unlike.isna().any() else int(unlike.sum())
        patients.append(row)
    return pd.DataFrame(patients, columns=["patient", "images", "unreadable", "first_image", *said])
