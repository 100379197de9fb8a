"""Copies and series stay together, and no split cuts through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CT_IMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_dataset import FOUR, picture, save, two_classes

from lungct_tune.data import (
    SPLITS,
    DataError,
    ImageSet,
    fold_images,
    group_overlap,
    read_images,
    split_images,
)
from lungct_tune.data import groups as groups_module
from lungct_tune.data.groups import SERIES_CORRELATION, groups_by_likeness
from lungct_tune.data.split import DataSplit, restore_split, split_and_fold


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def an_image_set(labels: list[int], groups: list[int], folders: list[str] | None = None) -> ImageSet:
    """An image set of which only the table matters."""
    n = len(labels)
    table = pd.DataFrame(
        {
            "path": [f"{i}.png" for i in range(n)],
            "folder": folders or [""] * n,
            "label": labels,
            "digest": [str(i) for i in range(n)],
            "group": groups,
            "is_listed": False,
            "has_patient": False,
        }
    )
    classes = tuple(f"class {label}" for label in range(max(labels) + 1))
    return ImageSet(Path("somewhere"), table, np.zeros((n, 1, 1), np.uint8), classes, [], [], [], [], "")


# Groups


def test_copies_recompressed_and_rescaled_images_form_one_group(tmp_path: Path) -> None:
    two_classes(tmp_path)
    original = save(tmp_path / "normal/original.png", 9)
    (tmp_path / "normal/copy.png").write_bytes(original.read_bytes())
    save(tmp_path / "normal/recompressed.jpg", 9, quality=60)
    picture(9).resize((90, 70), Image.Resampling.BICUBIC).save(tmp_path / "normal/rescaled.png")
    group_of = read_images(tmp_path, 16).table.set_index("path")["group"]
    alike = [f"normal/{name}" for name in ("original.png", "copy.png", "recompressed.jpg", "rescaled.png")]
    assert group_of[alike].nunique() == 1
    assert group_of.nunique() == 1 + 4


def test_groups_do_not_depend_on_the_image_size(tmp_path: Path) -> None:
    two_classes(tmp_path, images=5)
    assert read_images(tmp_path, 8).table["group"].equals(read_images(tmp_path, 50).table["group"])


def test_groups_are_chains_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "_BLOCK", 3)
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 256, (4, 16, 16))
    which = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 0])
    images = np.clip(originals[which] + rng.normal(0, 5, (10, 16, 16)), 0, 255).astype(np.uint8)
    groups = groups_by_likeness(images, [str(i) for i in range(10)])[SERIES_CORRELATION]
    np.testing.assert_array_equal(groups, which)


def test_an_image_of_one_grey_is_like_its_byte_copies_only() -> None:
    images = np.stack([np.full((8, 8), grey, np.uint8) for grey in (0, 0, 255, 7)])
    assert all(groups.tolist() == [0, 0, 1, 2] for groups in groups_by_likeness(images, ["a", "a", "b", "c"]).values())


@pytest.mark.parametrize("place", ["", "Data"])
def test_known_groups_are_joined_to_those_found(tmp_path: Path, place: str) -> None:
    two_classes(tmp_path / "Data")
    inside = "" if place else "Data/"
    (tmp_path / place / "groups.csv").write_text(
        f"path,group\n{inside}normal/0.png,patient 1\n{inside}adenocarcinoma/1.png, patient 1 \n"
    )
    group_of = read_images(tmp_path, 16).table.set_index("path")["group"]
    assert group_of["Data/normal/0.png"] == group_of["Data/adenocarcinoma/1.png"]
    assert group_of.nunique() == 3


@pytest.mark.parametrize("place", ["train", "train/normal"])
def test_known_groups_are_read_below_the_class_folders_too(tmp_path: Path, place: str) -> None:
    two_classes(tmp_path / "train")
    two_classes(tmp_path / "test")
    inside = "" if place.endswith("normal") else "normal/"
    (tmp_path / place / "groups.csv").write_text(f"path,group\n{inside}0.png,a\n{inside}1.png,a\n")
    (tmp_path / "groups.csv").write_text("path,group\ntest/adenocarcinoma/0.png,a\n")
    image_set = read_images(tmp_path, 16)
    assert image_set.table["is_listed"].sum() == 3 and not image_set.left_aside
    group_of = image_set.table.set_index("path")["group"]
    joined = ["train/normal/0.png", "train/normal/1.png", "test/adenocarcinoma/0.png"]
    assert group_of[joined].nunique() == 1, "a name is one group, in whatever file it stands"


def test_a_group_that_pandas_has_written_as_a_float_is_the_same_group(tmp_path: Path) -> None:
    two_classes(tmp_path)
    for folder, group in (("normal", "12"), ("adenocarcinoma", "12.0")):
        (tmp_path / folder / "groups.csv").write_text(f"path,group\n0.png,{group}\n1.png,{group}\n")
    assert read_images(tmp_path, 16).table["group"].nunique() == 1


def test_two_files_that_give_an_image_different_groups_are_refused(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "groups.csv").write_text("path,group\nnormal/0.png,a\nnormal/1.png,a\n")
    (tmp_path / "normal" / "groups.csv").write_text("path,group\n0.png,a\n")
    assert read_images(tmp_path, 16).table["is_listed"].sum() == 2
    (tmp_path / "normal" / "groups.csv").write_text("path,group\n0.png,b\n")
    with pytest.raises(DataError, match=r"groups.csv and .*normal/groups.csv give 'normal/0.png' different groups"):
        read_images(tmp_path, 16)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "file,patient\nnormal/0.png,1\n",
        "path,group\nnormal/0.png,\n",
        "path,group\nnormal/none.png,1\n",
        "path,group\nnormal/0.png,1\nnormal/0.png,2\n",
    ],
)
def test_a_malformed_groups_file_is_refused(tmp_path: Path, content: str) -> None:
    two_classes(tmp_path)
    (tmp_path / "groups.csv").write_text(content)
    with pytest.raises(DataError, match=r"groups\.csv"):
        read_images(tmp_path, 16)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("path;group\nnormal/0.png;1\n", "no path; name the columns in the first line, with commas between them"),
        ("path,group\nnormal/0.png,Müller\n", r"is not UTF-8 text .*; save it again as CSV in UTF-8"),
    ],
)
def test_what_a_spreadsheet_wrote_is_refused_with_what_to_do(tmp_path: Path, content: str, says: str) -> None:
    two_classes(tmp_path)
    (tmp_path / "groups.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=says):
        read_images(tmp_path, 16)


def test_a_line_with_a_value_too_many_is_named(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "groups.csv").write_text("path,group\nnormal/0.png,1,\n")
    with pytest.raises(DataError, match=r"groups\.csv, line 2 has 3 values, and the first line names 2 columns"):
        read_images(tmp_path, 16)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_values_with_commas_stand_in_quotes(tmp_path: Path, end: str) -> None:
    two_classes(tmp_path)
    lines = ["path,group", "", 'normal/0.png,"Ward 1, bed 2"', "  ", ""]
    (tmp_path / "groups.csv").write_bytes(end.join(lines).encode())
    assert read_images(tmp_path, 16).table["is_listed"].sum() == 1


def test_twins_under_different_classes_are_left_out_and_reported(tmp_path: Path) -> None:
    two_classes(tmp_path)
    original = save(tmp_path / "normal/b.png", 9)
    (tmp_path / "adenocarcinoma/a.png").write_bytes(original.read_bytes())
    save(tmp_path / "adenocarcinoma/c.jpg", 9, quality=95)
    save(tmp_path / "normal/z.png", 10)
    image_set = read_images(tmp_path, 40)
    assert image_set.conflicts == [("adenocarcinoma/a.png", "adenocarcinoma/c.jpg", "normal/b.png")]
    assert len(image_set.images_NHW) == len(image_set.table) == 5
    np.testing.assert_array_equal(image_set.images_NHW[-1], np.asarray(picture(10)))


# Splits


@st.composite
def labelled_groups(draw: st.DrawFn) -> ImageSet:
    """Any number of groups of any size, mostly of one class, sometimes of several."""
    n_classes = draw(st.integers(2, 4))
    label = st.integers(0, n_classes - 1)
    one_class = st.builds(lambda label, size: [label] * size, label, st.integers(1, 30))
    mixed = st.lists(label, min_size=1, max_size=6)
    members = draw(st.lists(one_class | mixed, min_size=1, max_size=60))
    members += [[label] for label in range(n_classes)]  # every class occurs
    rows = [(label, group) for group, labels in enumerate(members) for label in labels]
    rows = draw(st.permutations(rows)) if len(rows) < 50 else rows
    return an_image_set([label for label, _ in rows], [group for _, group in rows])


@settings(max_examples=150, deadline=None)
@given(image_set=labelled_groups(), seed=st.integers(0, 2**32 - 1))
def test_a_grouped_split_never_cuts_a_group_whatever_the_data(image_set: ImageSet, seed: int) -> None:
    try:
        split = split_images(image_set, "grouped", seed)
    except DataError as error:
        assert "no image of 'class" in str(error)
        return
    assert split.shape == (len(image_set.table),)
    assert set(split) == set(SPLITS)
    assert pd.Series(split).groupby(image_set.table["group"]).nunique().max() == 1
    assert pd.crosstab(image_set.table["label"], split).to_numpy().min() >= 1
    assert not group_overlap(image_set, split).any()
    np.testing.assert_array_equal(split, split_images(image_set, "grouped", seed))


@settings(max_examples=150, deadline=None)
@given(image_set=labelled_groups(), folds=st.integers(2, 6), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_folds_never_cut_a_group_and_hold_every_class(
    image_set: ImageSet, folds: int, seed: int, data: st.DataObject
) -> None:
    n = len(image_set.table)
    rows = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    try:
        fold_N = fold_images(image_set, rows, folds, seed)
    except DataError as error:
        assert "choose fewer --folds" in str(error)
        return
    table = image_set.table.iloc[rows]
    assert fold_N.shape == (len(rows),)
    assert set(fold_N) == set(range(folds))
    assert pd.Series(fold_N).groupby(table["group"].to_numpy()).nunique().max() == 1
    present = pd.crosstab(table["label"].to_numpy(), fold_N)
    assert present.to_numpy().min() >= 1 and len(present) == len(image_set.classes)
    np.testing.assert_array_equal(fold_N, fold_images(image_set, rows, folds, seed))


@settings(max_examples=50, deadline=None)
@given(groups_a_class=st.lists(st.integers(3, 40), min_size=2, max_size=4), seed=st.integers(0, 1000))
def test_three_groups_of_a_class_are_enough(groups_a_class: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(groups_a_class)), groups_a_class)
    image_set = an_image_set(labels.tolist(), list(range(len(labels))))
    counts = pd.crosstab(labels, split_images(image_set, "grouped", seed))
    wanted = np.outer(groups_a_class, [0.7, 0.1, 0.2])
    assert np.abs(counts[list(SPLITS)].to_numpy() - wanted).max() < 1.5


def test_the_seed_decides_who_is_where() -> None:
    image_set = an_image_set([0, 1] * 50, list(range(100)))
    first, second = (split_images(image_set, "grouped", seed) for seed in (0, 1))
    assert (first != second).any()


def test_the_seed_decides_also_where_groups_of_unlike_sizes_are() -> None:
    """As patients with all their slices. Found: with any seed 86 % of 100 patients were in the same part."""
    sizes = np.random.default_rng(0).integers(20, 81, 100)
    image_set = an_image_set(np.repeat(np.arange(100) % 4, sizes).tolist(), np.repeat(np.arange(100), sizes).tolist())
    first = np.cumsum(sizes) - 1
    splits = [split_images(image_set, "grouped", seed) for seed in range(6)]
    alike = [(one[first] == other[first]).mean() for one, other in combinations(splits, 2)]
    assert np.mean(alike) < 0.7, "0.54 by chance"
    assert all(0.18 < (split == "test").mean() < 0.22 for split in splits)


def test_too_few_groups_of_a_class_are_an_error() -> None:
    image_set = an_image_set([0] * 20 + [1] * 20, [*range(20), *[20] * 10, *[21] * 10])
    with pytest.raises(DataError, match=r"'class 1' .* 20 images .* 2 groups"):
        split_images(image_set, "grouped", 0)


def test_the_official_split_is_the_published_folders() -> None:
    folders = ["train", "test", "valid", "train"]
    image_set = an_image_set([0, 1, 0, 1], [0, 0, 1, 2], folders)
    split = split_images(image_set, "official", 0)
    assert split.tolist() == folders
    assert group_overlap(image_set, split).tolist() == [True]


def test_the_official_split_says_which_folder_is_missing() -> None:
    with pytest.raises(DataError, match=r"missing: test; found: train \(1 .*--split grouped"):
        split_images(an_image_set([0, 1], [0, 1], ["train", "valid"]), "official", 0)
    with pytest.raises(DataError, match=r"missing: train, valid, test; found: no split folder \(2 images"):
        split_images(an_image_set([0, 1], [0, 1]), "official", 0)


def test_the_official_split_has_all_classes_to_learn_from() -> None:
    with pytest.raises(DataError, match=r"train/ in .* has no image of class 1, .*--split grouped"):
        split_images(an_image_set([0, 1, 1], [0, 1, 2], ["train", "valid", "test"]), "official", 0)


@pytest.mark.skipif(not CT_IMAGES.is_dir(), reason=f"the real CT images are not at {CT_IMAGES}")
def test_the_published_images_split_70_10_20_in_every_class() -> None:
    image_set = read_images(CT_IMAGES, 64)
    assert image_set.classes == FOUR
    split = split_images(image_set, "grouped", 0)
    shares = pd.crosstab(image_set.table["label"], split, normalize="index")
    assert np.abs(shares[list(SPLITS)].to_numpy() - [0.7, 0.1, 0.2]).max() < 0.02
    assert pd.Series(split).groupby(image_set.table["group"]).nunique().max() == 1


# A split file


SPLIT_OF_EIGHT = ["train", "test", "train", "valid", "train", "valid", "test", "train"]


def split_file(images: ImageSet, **columns: list[str]) -> Path:
    """Written beside the class folders, with its lines in another order than the images."""
    table = pd.DataFrame({"path": images.table["path"], **columns}).sample(frac=1, random_state=0)
    table.to_csv(images.root / "my-split.csv", index=False)
    return images.root / "my-split.csv"


def test_a_split_file_gives_split_and_groups(tmp_path: Path) -> None:
    images = read_images(two_classes(tmp_path, images=4), 32)
    groups = [f"patient {i // 2}" for i in range(8)]
    split = split_and_fold(images, "grouped", None, 0, split_file(images, split=SPLIT_OF_EIGHT, group=groups))
    assert split.split.tolist() == SPLIT_OF_EIGHT
    assert split.images.table["group"].tolist() == groups and split.images.table["is_listed"].all()
    assert group_overlap(split.images, split.split).tolist() == [True, True], "the file's groups are in several splits"
    again = restore_split(images, split.as_csv(), groups=True)
    assert again.as_csv() == split.as_csv() and again.images.table["is_listed"].all()
    numbers = ["1", "01", "1.0", "=1", "-1", "NA", "7", "7"]
    numbered = split_and_fold(images, "grouped", None, 0, split_file(images, split=SPLIT_OF_EIGHT, group=numbers))
    assert restore_split(images, numbered.as_csv(), groups=True).images.table["group"].tolist() == numbers
    without = split_and_fold(images, "grouped", None, 0, split_file(images, split=SPLIT_OF_EIGHT))
    pd.testing.assert_series_equal(without.images.table["group"], images.table["group"])
    assert not restore_split(images, without.as_csv(), groups=True).images.table["is_listed"].any()


def assert_known(images: ImageSet, file: Path, known: list[int]) -> None:
    """Also after --resume."""
    split = split_and_fold(images, "grouped", None, 0, file)
    again = restore_split(images, split.as_csv(), groups=True)
    for table in (split.images.table, again.images.table):
        assert list(np.flatnonzero(table["is_listed"] | table["has_patient"])) == known
    pd.testing.assert_frame_equal(split.images.table, again.images.table)


@pytest.mark.parametrize("known", [[], [0, 5], [*range(8)]], ids=["none", "some", "all"])
def test_the_split_csv_of_another_search_says_which_patients_are_known(tmp_path: Path, known: list[int]) -> None:
    images, file = read_images(two_classes(tmp_path, images=4), 32), tmp_path / "split.csv"
    others = images.table.assign(group=images.table["group"] // 2, is_listed=np.isin(range(8), known))
    file.write_bytes(DataSplit(replace(images, table=others), np.array(SPLIT_OF_EIGHT), None).as_csv())
    assert_known(images, file, known)
    file.write_text(file.read_text().replace("True", "TRUE").replace("False", "FALSE"))  # as spreadsheets write it
    assert_known(images, file, known)


@pytest.mark.parametrize("patients", [False, True])
def test_the_groups_found_by_likeness_are_no_patients_because_an_earlier_split_csv_names_them(
    tmp_path: Path, patients: bool
) -> None:
    images = read_images(two_classes(tmp_path, images=4), 32)
    images = replace(images, table=images.table.assign(has_patient=patients))
    file = split_file(images, split=SPLIT_OF_EIGHT, group=images.table["group"].tolist())
    assert_known(images, file, [*range(8)] if patients else [])


def test_the_folds_of_a_continued_search_are_those_of_its_split_csv() -> None:
    images = an_image_set([0, 1] * 30, list(range(60)))
    split = split_and_fold(images, "grouped", 3, 5)
    again = restore_split(images, split.as_csv(), groups=False)
    assert split.fold is not None and again.fold is not None
    np.testing.assert_array_equal(again.fold, split.fold)
    np.testing.assert_array_equal(again.split, split.split)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("valid", "dev"), r"'dev'; it must be one of train, valid, test"),
        (lambda text: text.replace("test", "train"), r"puts no image into test"),
        (lambda text: text.replace("split", "part"), r"columns path,split"),
        (lambda text: text[: text.rindex("normal")], r"has no line for 1 of the \d+ images .*, such as normal/"),
        (lambda text: text + "normal/none.png,train\n", r"line \d+: the path 'normal/none.png' is no image's"),
        (lambda text: text + text.splitlines()[1] + "\n", r"is named twice"),
        (lambda text: text.replace("0.png,train", "0.png,"), r"has an empty split"),
    ],
)
def test_a_split_file_that_is_wrong_is_refused(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    images = read_images(two_classes(tmp_path, images=4), 32)
    lines = [f"{path},{name}" for path, name in zip(images.table["path"], SPLIT_OF_EIGHT, strict=True)]
    file = tmp_path / "my-split.csv"
    file.write_text(change("\n".join(["path,split", *lines, ""])))
    with pytest.raises(DataError, match=message):
        split_and_fold(images, "grouped", None, 0, file)
