"""Phantoms are made from their seed alone, go the way of real files, and cannot be taken for patients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from test_dataset import FOUR

from lungct_tune.auditing.shortcuts import measure_shortcuts
from lungct_tune.data import DataError, ImageSet, make_phantoms, read_images, split_images
from lungct_tune.data.phantoms import SLICES

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("phantoms"), 1, patients=24, size=48)


@pytest.fixture(scope="module")
def image_set(folder: Path) -> ImageSet:
    return read_images(folder, 48, cache=folder.parent / "cache")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*g")}


def patients_of(folder: Path, image_set: ImageSet) -> pd.Series:
    return pd.read_csv(folder / "groups.csv").set_index("path")["group"][image_set.table["path"]]


def test_the_same_seed_gives_the_same_files_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    again = make_phantoms(tmp_path, 1, patients=24, size=48)
    other = make_phantoms(tmp_path, 2, patients=24, size=48)
    assert files(again) == files(folder)
    assert not set(files(other).values()) & set(files(folder).values())


def test_a_finished_folder_is_reused(folder: Path) -> None:
    before = (folder / "groups.csv").stat().st_mtime_ns
    assert make_phantoms(folder.parent, 1, patients=24, size=48) == folder
    assert (folder / "groups.csv").stat().st_mtime_ns == before


def test_they_say_that_they_are_not_patients(folder: Path) -> None:
    assert "NOT PATIENTS" in (folder / "PHANTOMS.txt").read_text()


def test_they_are_read_like_real_images(image_set: ImageSet) -> None:
    assert image_set.classes == FOUR
    assert image_set.table["label"].value_counts().tolist() == [6 * SLICES] * 4
    assert image_set.conflicts == image_set.unreadable == []


def test_different_patients_do_not_look_alike(image_set: ImageSet) -> None:
    assert image_set.table["group"].nunique() >= 22


@pytest.mark.parametrize("how", ["grouped", "official"])
def test_no_split_cuts_a_patient(folder: Path, image_set: ImageSet, how: str) -> None:
    split = split_images(image_set, how, 0)
    by_patient = pd.Series(split).groupby(patients_of(folder, image_set).to_numpy())
    assert by_patient.nunique().max() == 1
    assert (by_patient.size() == SLICES).all()
    assert pd.crosstab(image_set.table["label"], split).to_numpy().min() >= SLICES


def test_file_facts_do_not_give_the_class_away(image_set: ImageSet) -> None:
    forms = image_set.table[["format", "mode", "width", "height"]].drop_duplicates()
    assert forms.to_numpy().tolist() == [["PNG", "L", 48, 48]]


def test_twelve_patients_are_enough_for_every_split_and_fewer_are_refused(tmp_path: Path) -> None:
    smallest = read_images(make_phantoms(tmp_path, 0, patients=12, size=32), 32, cache=tmp_path / "cache")
    assert pd.crosstab(smallest.table["label"], split_images(smallest, "official", 0)).to_numpy().min() == SLICES
    with pytest.raises(ValueError, match="patients=8"):
        make_phantoms(tmp_path, 0, patients=8)


def test_a_folder_that_cannot_be_written_is_named_with_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache folder .*file/cache cannot be used: .*; set XDG_CACHE_HOME"):
        make_phantoms(tmp_path / "file" / "cache", 0, patients=12, size=32)


def test_a_full_disk_is_named_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=20_000))
    with pytest.raises(DataError, match=r"cannot be used: 1 MB are needed, and 0 MB are free; set XDG_CACHE_HOME"):
        make_phantoms(tmp_path, 0, patients=12, size=32)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_shortcut_names_the_class(tmp_path: Path, seed: int) -> None:
    """Found: a histogram of the greys was better than the model of the search, because the masses differed in area."""
    folder = make_phantoms(tmp_path, seed, patients=160, size=48)
    image_set = read_images(folder, 48, cache=tmp_path / "cache", progress=False)
    shortcuts = measure_shortcuts(image_set, np.arange(len(image_set.table)))
    assert len(shortcuts) == 4
    assert all(found.balanced_accuracy <= 0.40 for found in shortcuts.values())
