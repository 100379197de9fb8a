"""The content of predictions.csv: the true class and the predicted class of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lungct_tune.data.tables import read_table, write_table
from lungct_tune.experiment.bundle import PREDICTIONS
from lungct_tune.experiment.form import written_by_a_search


@dataclass(frozen=True, eq=False)
class Predictions:
    """A model's predictions, one row for each image."""

    classes: tuple[str, ...]
    paths_N: np.ndarray
    """str."""
    labels_N: np.ndarray
    """True classes, as indices into `classes`."""
    probabilities_NC: np.ndarray
    """Calibrated, in the order of `classes`."""
    groups_N: np.ndarray

    @property
    def predicted_N(self) -> np.ndarray:
        """Predicted classes, as indices into `classes`."""
        return np.asarray(self.probabilities_NC.argmax(axis=1))

    def as_csv(self) -> bytes:
        """Encodes predictions.csv: path, class, predicted class, the probability of each class, group."""
        names = np.array(self.classes, dtype=object)
        table = pd.DataFrame(
            {"path": self.paths_N, "class": names[self.labels_N], "predicted": names[self.predicted_N]}
        )
        for column, of_class_N in zip(probability_columns(self.classes), self.probabilities_NC.T, strict=True):
            table[column] = of_class_N
        table["group"] = self.groups_N
        return write_table(table)


def read_predictions(csv: bytes, classes: Sequence[str]) -> Predictions:
    """Reads predictions.csv.

    Args:
        classes: in the order of the model's outputs.

    Raises:
        BundleError: it has other columns or classes, or values that are no probabilities.
    """
    with written_by_a_search(PREDICTIONS):
        return _predictions(read_table(csv), classes)


def _predictions(table: pd.DataFrame, classes: Sequence[str]) -> Predictions:
    if unknown := set(table["class"]) - set(classes):
        raise ValueError(f"the class {min(unknown)!r} is not one of the model's")
    probabilities_NC = table[probability_columns(classes)].to_numpy(dtype=float)
    if not len(table) or not ((probabilities_NC >= 0) & (probabilities_NC <= 1)).all():
        raise ValueError("there are no predictions, or some are no probabilities")
    return Predictions(
        classes=tuple(classes),
        paths_N=table["path"].to_numpy(),
        labels_N=table["class"].map(list(classes).index).to_numpy(),
        probabilities_NC=probabilities_NC,
        groups_N=table["group"].to_numpy(),
    )


def probability_columns(classes: Sequence[str]) -> list[str]:
    """The names of the columns that hold the probability of each class."""
    columns = [f"p_{name.replace(' ', '_')}" for name in classes]
    return columns if len(set(columns)) == len(classes) else [f"p_{name}" for name in classes]
