"""Who is trained on, who steers the search, and who is asked only once: splits that cut no group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from lungct_tune.data.dataset import ImageSet
from lungct_tune.data.folders import DataError

SPLITS = ("train", "valid", "test")

POOLED = "train+valid"
"""What train and valid are together where folds are cut from them."""

_SHARES = {"train": 0.7, "test": 0.2, "valid": 0.1}  # largest first: ties go to the largest


def split_images(image_set: ImageSet, how: Literal["grouped", "official"], seed: int) -> np.ndarray:
    """The split of each image, (N,) str, each one of `SPLITS`.

    "grouped" pools all images and splits them 70/10/20 by class without cutting through a group; it depends
    on the seed, the paths and the groups, and on nothing else. "official" is the published folders.

    Raises:
        DataError: "grouped": a class that cannot be in every split. "official": a folder is missing, or train has
            no image of a class.
    """
    if how == "official":
        return _official(image_set)
    has_folders = set(image_set.table["folder"]) >= set(SPLITS)
    split = _deal(image_set.table, _SHARES, seed).astype(str)
    for label, name in enumerate(image_set.classes):
        of_class = image_set.table["label"] == label
        if missing := sorted(set(SPLITS) - set(split[of_class])):
            raise DataError(
                f"no image of {name!r} would be in {' or '.join(missing)}: its {of_class.sum()} images in "
                f"{image_set.root} form {image_set.table['group'][of_class].nunique()} groups of copies or "
                "series, which a split may not cut, and at least 3 that are not tied to other classes are "
                "needed; add images of that class" + (", or choose --split official" if has_folders else "")
            )
    return split


def fold_images(image_set: ImageSet, rows: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each of these images, (len(rows),) int from 0: stratified by class, and no group is cut.

    Args:
        rows: the images to be dealt out, as indices: those of train and validation.
        folds: how many; every class must be in each.

    Raises:
        DataError: a class has too few groups for so many folds.
    """
    table = image_set.table.iloc[rows]
    fold_N = _deal(table, dict.fromkeys(range(folds), 1 / folds), seed).astype(int)
    for label, name in enumerate(image_set.classes):
        of_class = (table["label"] == label).to_numpy()
        if len(set(fold_N[of_class])) < folds:
            raise DataError(
                f"{name!r} cannot be in each of {folds} folds: its {of_class.sum()} images of train and validation in "
                f"{image_set.root} form {table['group'][of_class].nunique()} groups of copies or series, which a "
                "fold may not cut; choose fewer --folds, or add images of that class"
            )
    return fold_N


def group_overlap(image_set: ImageSet, split: np.ndarray) -> np.ndarray:
    """Whether an image of its group is in train or valid, for each test image: (n_test,) bool in row order.

    A group holds the copies of an image, and what looks like slices of its series. None in a grouped split, by
    construction; in the official one these are the answers seen before.
    """
    groups_N = image_set.table["group"].to_numpy()
    return np.isin(groups_N[split == "test"], groups_N[split != "test"])


def _deal(table: pd.DataFrame, shares: Mapping[Any, float], seed: int) -> np.ndarray:
    """Gives each group, large ones first, to the part that lacks the greatest share of its classes.

    scikit-learn's StratifiedGroupKFold (1.9; two of ten folds for test) put 31 % instead of 20 % of the
    published normal images into test, whatever the seed: its first fold takes the largest group whole.
    """
    counts_GC = pd.crosstab(table["group"], table["label"])
    wanted_SC = np.outer(list(shares.values()), counts_GC.sum())
    given_SC = np.zeros_like(wanted_SC)
    shuffled = counts_GC.sample(frac=1, random_state=seed)
    by_size = shuffled.loc[shuffled.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    part_of = {}
    for group, counts_C in zip(by_size.index, by_size.to_numpy(), strict=True):
        chosen = np.argmax((1 - given_SC / wanted_SC) @ counts_C)
        given_SC[chosen] += counts_C
        part_of[group] = list(shares)[chosen]
    return table["group"].map(part_of).to_numpy()


def _official(image_set: ImageSet) -> np.ndarray:
    counts = image_set.table["folder"].value_counts()
    if missing := [name for name in SPLITS if name not in counts]:
        found = ", ".join(f"{name or 'no split folder'} ({count} images)" for name, count in counts.items())
        raise DataError(
            f"the official split needs the folders train/, valid/ and test/ in {image_set.root}; "
            f"missing: {', '.join(missing)}; found: {found}. Add what is missing, or choose --split grouped"
        )
    is_train = image_set.table["folder"] == "train"
    if lost := sorted(set(image_set.table["label"]) - set(image_set.table["label"][is_train])):
        names = ", ".join(image_set.classes[label] for label in lost)
        raise DataError(
            f"train/ in {image_set.root} has no image of {names}, which no model can learn then; move images of that "
            "class there, or choose --split grouped"
        )
    return image_set.table["folder"].to_numpy(dtype=str)


UNSPLIT = "unsplit"
"""The one part of images that are too few to be split."""


@dataclass(frozen=True, eq=False)
class DataSplit:
    """The images, and which of them are trained on, steer the search, and are asked once.

    Images are named by their rows in `images` everywhere, here and where they are trained on.
    """

    images: ImageSet
    split: np.ndarray
    """(N,) str, each one of `SPLITS`."""
    fold: np.ndarray | None
    """(N,) int from 0, -1 for test images; None where validation steers the search."""

    @property
    def parts(self) -> np.ndarray:
        """The split as the audit takes it: with folds, which cut no group, train and validation are one part."""
        return self.split if self.fold is None else np.where(self.split == "test", "test", POOLED)

    @property
    def searched_rows(self) -> np.ndarray:
        """The images that the search may see: train and validation."""
        return np.flatnonzero(self.split != "test")

    @property
    def test_rows(self) -> np.ndarray:
        """The images that only the final model is asked about."""
        return np.flatnonzero(self.split == "test")

    @property
    def validation_rows(self) -> np.ndarray:
        """The images that a trial is judged on: those of validation, with folds all that are searched."""
        return np.flatnonzero(self.split == "valid") if self.fold is None else self.searched_rows

    @property
    def folds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The images that each model of a trial is trained on, and those that judge it; one model without folds."""
        if self.fold is None:
            return [(np.flatnonzero(self.split == "train"), self.validation_rows)]
        searched_N = self.fold >= 0
        return [
            (np.flatnonzero(searched_N & (self.fold != k)), np.flatnonzero(self.fold == k))
            for k in range(self.fold.max() + 1)
        ]

    def as_csv(self) -> bytes:
        """split.csv: path, label, group and split of every image, with folds its fold."""
        label = [self.images.classes[label] for label in self.images.table["label"]]
        table, columns = self.images.table.assign(split=self.split, label=label), ["path", "label", "group", "split"]
        if self.fold is not None:
            table = table.assign(fold=pd.Series(self.fold, index=table.index, dtype="Int64").replace(-1, pd.NA))
            columns.append("fold")
        return table[columns].to_csv(index=False).encode()


def split_and_fold(images: ImageSet, how: Literal["grouped", "official"], folds: int | None, seed: int) -> DataSplit:
    """The split of a search's images, and where folds are asked for, the folds of train and validation.

    Raises:
        DataError: see `split_images` and `fold_images`.
    """
    split, fold = split_images(images, how, seed), None
    if folds:
        searched = np.flatnonzero(split != "test")
        fold = np.full(len(split), -1)
        fold[searched] = fold_images(images, searched, folds, seed)
    return DataSplit(images, split, fold)
