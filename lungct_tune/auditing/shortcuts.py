"""Measures how well the class is predicted without the lungs: from the file, the greys, the border, or similar images.

Each rule gets only one kind of property. Its score in grouped cross-validation, on images of unseen groups, shows what
a network may reach by the same shortcut (Geirhos et al., Nature Machine Intelligence 2020; DeGrave et al., 2021, where
networks recognised the hospital of a chest X-ray).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.base import ClassifierMixin, clone
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from lungct_tune.data.dataset import ImageSet
from lungct_tune.data.groups import unit_vectors

FOLDS = 5
GIVEN_AWAY = 0.97
"""A shortcut gives a class away if it separates the class from the others with at least this AUROC."""

MOST_IMAGES = 4000
"""If there are more images, a random sample is used: it is enough to show whether there is a shortcut."""

LEAST_OF_CLASS = 50
"""The least number of images of a class in a sample; fewer if the class has fewer."""

SMALL = 32  # pixels, each way
_BORDER = 2  # of those, on each side
_BINS = 32


class Rule(NamedTuple):
    """A shortcut: its features, and the classifier that learns from them."""

    title: str
    features: Callable[[ImageSet, np.ndarray], np.ndarray]
    """(images, rows) to (n, features) float."""
    classifier: ClassifierMixin


class Shortcut(NamedTuple):
    """The scores of a rule in grouped cross-validation: no image's group was in training when it was predicted."""

    balanced_accuracy: float
    per_class: dict[int, float]
    """By label: the AUROC of that class against the others; chance is 0.5."""
    sensitivity: dict[int, float]
    """By label: the share of its images that are predicted correctly."""
    learned_from: int
    """The number of images from which each fold was predicted, at least."""


def small_pixels(images: ImageSet, rows: np.ndarray) -> np.ndarray:
    """The images at 32 by 32 pixels, (n, 32, 32) float32. Read one by one, since the set may be larger than memory."""
    resized = (Image.fromarray(images.images_NHW[i]).resize((SMALL, SMALL), Image.Resampling.BOX) for i in rows)
    return np.stack([np.asarray(image, dtype=np.float32) for image in resized])


def unit_pixels(images: ImageSet, rows: np.ndarray) -> np.ndarray:
    """`small_pixels` as vectors of mean 0 and length 1, (n, 1024): the nearest vector has the highest correlation."""
    return unit_vectors(small_pixels(images, rows))


def most_similar(images: ImageSet, rows: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of `rows`, the correlation with its most similar row in `known` at 32 x 32 pixels, and that row."""
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(unit_pixels(images, known))
    distance_N1, position_N1 = search.kneighbors(unit_pixels(images, rows))
    return 1 - distance_N1[:, 0] ** 2 / 2, known[position_N1[:, 0]]


def _file_properties(images: ImageSet, rows: np.ndarray) -> np.ndarray:
    files = images.table.iloc[rows]
    modes = sorted(images.table["mode"].unique())
    pixels = files["width"] * files["height"]
    numbers = [files["width"], files["height"], files["width"] / files["height"], files["bytes"] / pixels]
    return np.stack([*numbers, *(files["mode"] == mode for mode in modes)], axis=1).astype(np.float32)


def _histogram(images: ImageSet, rows: np.ndarray) -> np.ndarray:
    counts = [np.bincount(images.images_NHW[i].ravel() // (256 // _BINS), minlength=_BINS) for i in rows]
    return np.asarray(np.stack(counts) / images.images_NHW[0].size, dtype=np.float32)


def _border(images: ImageSet, rows: np.ndarray) -> np.ndarray:
    is_border = np.ones((SMALL, SMALL), dtype=bool)
    is_border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    return np.asarray(small_pixels(images, rows)[:, is_border])


_FOREST = ExtraTreesClassifier(50, class_weight="balanced", min_samples_leaf=2, random_state=0)

RULES = {
    "file": Rule("the size, mode and bytes per pixel of the file", _file_properties, _FOREST),
    "histogram": Rule("the histogram of greys", _histogram, _FOREST),
    "border": Rule("the border of the image, a sixteenth on each side", _border, _FOREST),
    "pixels": Rule("the most similar image at 32 x 32 pixels", unit_pixels, KNeighborsClassifier(1)),
}


def measure_shortcuts(images: ImageSet, rows: np.ndarray) -> dict[str, Shortcut]:
    """The scores of each rule in grouped, stratified cross-validation over these images.

    Returns {} if a class has only one group: it cannot be in both training and validation.
    """
    rows = sample(images, rows, MOST_IMAGES)
    table = images.table.iloc[rows]
    labels_N, groups_N = table["label"].to_numpy(), table["group"].to_numpy()
    folds = min(FOLDS, int(table.groupby("label")["group"].nunique().min()))
    if folds < 2:
        return {}
    # shuffled with a fixed seed: the same data give the same figures
    cut = list(StratifiedGroupKFold(folds, shuffle=True, random_state=0).split(rows, labels_N, groups_N))
    shortcuts = {}
    for name, rule in RULES.items():
        features_ND, probabilities_NC = rule.features(images, rows), np.zeros((len(rows), len(images.classes)))
        for train, valid in cut:
            model: Any = clone(rule.classifier)
            model.fit(features_ND[train], labels_N[train])
            probabilities_NC[np.ix_(valid, model.classes_)] = model.predict_proba(features_ND[valid])
        present, predicted_N = np.unique(labels_N).tolist(), probabilities_NC.argmax(axis=1)
        shortcuts[name] = Shortcut(
            float(balanced_accuracy_score(labels_N, predicted_N)),
            {c: float(roc_auc_score(labels_N == c, probabilities_NC[:, c])) for c in present},
            {c: float((predicted_N == c)[labels_N == c].mean()) for c in present},
            min(len(train) for train, _ in cut),
        )
    return shortcuts


def predict_by_shortcuts(images: ImageSet, known: np.ndarray, unseen: np.ndarray) -> dict[str, np.ndarray]:
    """The simple rules that a network has to beat: the labels that each shortcut predicts for unseen images.

    Args:
        images: all images.
        known: rows to learn from (train and validation).
        unseen: rows to predict (test). Only their features are used.

    Returns:
        The predicted labels by the rule's name in `RULES`.
    """
    learned, predicted = sample(images, known, MOST_IMAGES), {}
    for name, rule in RULES.items():
        model: Any = clone(rule.classifier)
        model.fit(rule.features(images, learned), images.table["label"].to_numpy()[learned])
        predicted[name] = np.asarray(model.predict(rule.features(images, unseen)))
    return predicted


def sample(images: ImageSet, rows: np.ndarray, most: int) -> np.ndarray:
    """At most about `most` of the rows, in order: each class in proportion, from as many groups as possible."""
    if len(rows) <= most:
        return rows
    shuffled = images.table.iloc[rows][["label", "group"]].assign(row=rows).sample(frac=1, random_state=0)
    # first one image of every group, then a second image of each group that has one, ...
    in_turn = shuffled.iloc[np.argsort(shuffled.groupby("group").cumcount(), kind="stable")]
    of_class = in_turn["label"].map(in_turn["label"].value_counts())
    share = np.maximum(LEAST_OF_CLASS, of_class * most / len(rows))
    return np.sort(in_turn["row"][in_turn.groupby("label").cumcount() < share].to_numpy())
