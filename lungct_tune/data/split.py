"""Splits the images into train, validation and test, and into folds, without dividing a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from lungct_tune.data.dataset import ImageSet
from lungct_tune.data.folders import DataError, read_listing
from lungct_tune.data.groups import join_groups
from lungct_tune.data.tables import read_table, write_table
from lungct_tune.errors import number_of

SPLITS = ("train", "valid", "test")

POOLED = "train+valid"
"""The name of train and valid together, if they are divided into folds."""

UNSPLIT = "unsplit"
"""The name of the only part, if there are too few images to split."""

_SHARES = {"train": 0.7, "test": 0.2, "valid": 0.1}  # largest first: ties go to the largest


def split_images(image_set: ImageSet, how: Literal["grouped", "official"], seed: int) -> np.ndarray:
    """The split of each image, (N,) str, each one of `SPLITS`.

    "grouped" pools all images and splits them 70/10/20 by class without dividing a group. It depends only on the seed,
    the paths and the groups. "official" takes the published folders.

    Raises:
        DataError: "grouped": a class cannot be in every split. "official": a folder is missing, or train has no image
            of a class.
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
                f"{image_set.root} form {image_set.table['group'][of_class].nunique()} groups of copies or series. "
                "A split does not divide groups, so at least 3 groups without images of other classes are needed; "
                "add images of that class" + (", or choose --split official" if has_folders else "")
            )
    return split


def fold_images(image_set: ImageSet, rows: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each of these images, (len(rows),) int from 0: stratified by class, without dividing a group.

    Args:
        rows: indices of the images to divide into folds: train and validation.
        folds: the number of folds; every class must be in each.

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
                f"{image_set.root} form {table['group'][of_class].nunique()} groups of copies or series, and folds "
                "do not divide groups; choose fewer --folds, or add images of that class"
            )
    return fold_N


def group_overlap(image_set: ImageSet, split: np.ndarray) -> np.ndarray:
    """For each test image, whether train or valid has an image of its group: (n_test,) bool in row order.

    A group has the copies of an image and the slices that look like its series. In a grouped split there is no overlap,
    by construction. In the official split, the model has already seen the groups of these test images.
    """
    groups_N = image_set.table["group"].to_numpy()
    return np.isin(groups_N[split == "test"], groups_N[split != "test"])


def _deal(table: pd.DataFrame, shares: Mapping[Any, float], seed: int) -> np.ndarray:
    """Assigns each group, large ones first, to the part that still needs the greatest share of its classes.

    Seed 0 takes groups strictly by size, which divides best. Others take those of about one size in random order.

    scikit-learn's StratifiedGroupKFold (1.9; two of ten folds for test) put 31 % instead of 20 % of the published
    normal images into test, with every seed, because its first fold takes the largest group.
    """
    counts_GC = pd.crosstab(table["group"], table["label"])
    wanted_SC = np.outer(list(shares.values()), counts_GC.sum())
    given_SC = np.zeros_like(wanted_SC)
    shuffled = counts_GC.sample(frac=1, random_state=seed)
    size_G = shuffled.sum(axis=1)
    if seed:
        size_G = np.floor(np.log2(size_G))  # else groups of unlike sizes would be in the same part with every seed
    by_size = shuffled.loc[size_G.sort_values(ascending=False, kind="stable").index]
    part_of = {}
    for group, counts_C in zip(by_size.index, by_size.to_numpy(), strict=True):
        chosen = np.argmax((1 - given_SC / wanted_SC) @ counts_C)
        given_SC[chosen] += counts_C
        part_of[group] = list(shares)[chosen]
    return table["group"].map(part_of).to_numpy()


def _official(image_set: ImageSet) -> np.ndarray:
    counts = image_set.table["folder"].value_counts()
    if missing := [name for name in SPLITS if name not in counts]:
        found = ", ".join(
            f"{name or 'no split folder'} ({number_of(count, 'image')})" for name, count in counts.items()
        )
        raise DataError(
            f"the official split needs the folders train/, valid/ and test/ in {image_set.root}; "
            f"missing: {', '.join(missing)}; found: {found}. Add the missing folders, or choose --split grouped"
        )
    folder = image_set.table["folder"].to_numpy(dtype=str)
    _check_train_has_all_classes(image_set, folder == "train", f"train/ in {image_set.root}")
    return folder


def _check_train_has_all_classes(image_set: ImageSet, is_train: np.ndarray, where: str) -> None:
    labels_N = image_set.table["label"].to_numpy()
    if lost := sorted(set(labels_N) - set(labels_N[is_train])):
        names = ", ".join(image_set.classes[label] for label in lost)
        raise DataError(
            f"{where} has no image of {names}, so no model can learn it; move images of that class there, or choose "
            "--split grouped"
        )


@dataclass(frozen=True, eq=False)
class DataSplit:
    """The images of a search, with the split and the fold of each.

    Everywhere, also in training, an image is named by its row in `images`.
    """

    images: ImageSet
    split: np.ndarray
    """(N,) str, each one of `SPLITS`."""
    fold: np.ndarray | None
    """(N,) int from 0, -1 for test images; None without cross-validation."""

    @property
    def parts(self) -> np.ndarray:
        """The split for the audit. With folds, train and validation are one part, since folds divide no group."""
        return self.split if self.fold is None else np.where(self.split == "test", "test", POOLED)

    @property
    def searched_rows(self) -> np.ndarray:
        """The images that the search may see: train and validation."""
        return np.flatnonzero(self.split != "test")

    @property
    def test_rows(self) -> np.ndarray:
        """The images that only the final model is evaluated on."""
        return np.flatnonzero(self.split == "test")

    @property
    def validation_rows(self) -> np.ndarray:
        """The images that a trial is evaluated on: validation, or with folds train and validation."""
        return np.flatnonzero(self.split == "valid") if self.fold is None else self.searched_rows

    @property
    def folds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each model of a trial, its training and its validation images; without folds there is one model."""
        if self.fold is None:
            return [(np.flatnonzero(self.split == "train"), self.validation_rows)]
        searched_N = self.fold >= 0
        return [
            (np.flatnonzero(searched_N & (self.fold != k)), np.flatnonzero(self.fold == k))
            for k in range(self.fold.max() + 1)
        ]

    def in_folds(self, folds: int, seed: int) -> DataSplit:
        """This split with train and validation divided into folds.

        Raises:
            DataError: see `fold_images`.
        """
        fold = np.full(len(self.split), -1)
        fold[self.searched_rows] = fold_images(self.images, self.searched_rows, folds, seed)
        return replace(self, fold=fold)

    def as_csv(self) -> bytes:
        """split.csv: path, label, group, whether its patient is known, and split of every image; its fold if any."""
        label = [self.images.classes[label] for label in self.images.table["label"]]
        table = self.images.table.assign(split=self.split, label=label, patient_known=self.images.is_known_N)
        columns = ["path", "label", "group", "patient_known", "split"]
        if self.fold is not None:
            table = table.assign(fold=pd.Series(self.fold, index=table.index, dtype="Int64").replace(-1, pd.NA))
            columns.append("fold")
        return write_table(table[columns])


def split_and_fold(
    images: ImageSet, how: Literal["grouped", "official"], folds: int | None, seed: int, file: Path | None = None
) -> DataSplit:
    """Splits the images of a search and, if there are several `folds`, divides train and validation into them.

    Args:
        file: a split that was made elsewhere, see `read_split`; `how` is not used then.

    Raises:
        DataError: see `split_images`, `read_split` and `fold_images`.
    """
    images, parts = read_split(images, file) if file else (images, split_images(images, how, seed))
    split = DataSplit(images, parts, fold=None)
    return split.in_folds(folds, seed) if folds and folds > 1 else split


def read_split(images: ImageSet, file: Path) -> tuple[ImageSet, np.ndarray]:
    """Reads a split that was made elsewhere.

    Args:
        file: a CSV with the columns path (relative to the data folder), split (train, valid or test) and, if the
            groups are known too, group. It has a line for every image. It may be the split.csv of another search.

    Returns:
        The images, with the groups of the file if it has them, and the split of each, (N,) str. Groups of the file
        that have copies of one image are one group, and have the name of the first.

    Raises:
        DataError: it is malformed, an image is missing, a class is not in train, or a split has no image.
    """
    paths = images.table["path"]
    left_out = [*(path for path, _ in images.unreadable), *(path for twins in images.conflicts for path in twins)]
    rows = read_listing(
        file, ["path", "split"], [*paths, *left_out], images.root, images.root, also=["group", "patient_known"]
    )
    if wrong := sorted(set(rows["split"]) - set(SPLITS)):
        path = rows.index[rows["split"] == wrong[0]][0]
        raise DataError(f"{file}: the split of {path} is {wrong[0]!r}; it must be one of {', '.join(SPLITS)}")
    if missing := sorted(set(paths) - set(rows.index)):
        raise DataError(
            f"{file} has no line for {len(missing)} of the {len(paths)} images in {images.root}, such as {missing[0]}; "
            "add a line for each, or move these images out of the data folder"
        )
    rows = rows.loc[paths]
    split = rows["split"].to_numpy(dtype=str)
    if empty := [name for name in SPLITS if not (split == name).any()]:
        raise DataError(f"{file} puts no image into {' or '.join(empty)}; a search needs all of {', '.join(SPLITS)}")
    _check_train_has_all_classes(images, split == "train", f"{file}: train")
    if "group" in rows:
        joined_N = join_groups(images.copy_numbers(), rows["group"].tolist())
        images = _with_groups(images, rows.assign(group=rows["group"].groupby(joined_N).transform("first")))
    return images, split


def _with_groups(images: ImageSet, rows: pd.DataFrame) -> ImageSet:
    """The images with the groups of a split file, which are known patients unless it says that they are not.

    The groups that were found anyway change nothing: a split.csv has a group for each image, also where no patient is
    known, and that of an earlier version does not say so.
    """
    group = rows["group"].to_numpy()
    if list(group) == list(images.table["group"].astype(str)):
        return images
    is_known = rows["patient_known"].astype(str).str.lower().to_numpy() != "false" if "patient_known" in rows else True
    return replace(images, table=images.table.assign(group=group, is_listed=is_known, has_patient=False))


def restore_split(images: ImageSet, csv: bytes, *, groups: bool) -> DataSplit:
    """The split of a search that is continued, from its split.csv, so that no later version splits its images again.

    Args:
        groups: whether its groups are used, because they came from a split file.

    Raises:
        KeyError, ValueError: it is not the split of these images.
    """
    rows = read_table(csv).set_index("path").loc[images.table["path"]]
    split = rows["split"].to_numpy(dtype=str)
    if not set(split) <= set(SPLITS):
        raise ValueError(f"a split is called {min(set(split) - set(SPLITS))!r}")
    if groups:
        images = _with_groups(images, rows)
    fold = rows["fold"].replace("", "-1").astype(float).to_numpy(dtype=int) if "fold" in rows else None
    return DataSplit(images, split, fold)
