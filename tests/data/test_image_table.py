"""A table of paths or series, classes and groups makes a data set of a folder without class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_files import UID_ROOT, write_slice
from test_dataset import picture, save

from lungct_tune.data import DataError, read_images
from lungct_tune.data.folders import LeftAside
from lungct_tune.data.image_table import UNLISTED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images and a document in folders without a class."""
    for number in range(6):
        save(tmp_path / f"data/a/{number}.png", number)
    (tmp_path / "data/notes.txt").write_text("")
    return tmp_path / "data"


def table(root: Path, *lines: str, columns: str = "path,class,group") -> Path:
    file = root.parent / "table.csv"
    file.write_text("\n".join([columns, *lines]) + "\n")
    return file


def test_the_table_gives_paths_classes_and_groups(root: Path) -> None:
    lines = ("./a/0.png,normal,p", "a/1.png,Large-Cell Carcinoma,p", "a/2.png,normal,q", "a/3.png,benign,r")
    images = read_images(root, 16, table=table(root, *lines), class_map={"benign": "normal"})
    rows = images.table.set_index("path")
    assert images.classes == ("large cell carcinoma", "normal")
    assert list(rows.index[rows["label"] == 1]) == ["a/0.png", "a/2.png", "a/3.png"]
    assert rows["group"]["a/0.png"] == rows["group"]["a/1.png"] and rows["group"].nunique() == 3
    assert rows["is_listed"].all()
    assert LeftAside(UNLISTED, 2, "a/4.png") in images.left_aside


@pytest.mark.parametrize("columns", ["Path, CLASS ,Group", " path,class, group"])
def test_columns_are_found_in_any_case_and_with_spaces(root: Path, columns: str) -> None:
    """Found: groups in a column called " group" or "Group" were not used, and nothing said so."""
    file = table(root, "a/0.png,normal,p", "a/1.png,cancer,p", "a/2.png,normal,q", columns=columns)
    rows = read_images(root, 16, table=file).table.set_index("path")
    assert rows["is_listed"].all() and rows["group"]["a/0.png"] == rows["group"]["a/1.png"]


def test_a_class_map_with_a_class_that_the_table_does_not_have_is_refused(root: Path) -> None:
    file = table(root, "a/0.png,normal,p", "a/1.png,benign_2,q")
    with pytest.raises(
        DataError, match=r"no class in .*table\.csv is called 'a', 'benign' \(did you mean benign_2\?\)"
    ):
        read_images(root, 16, table=file, class_map={"a": "x", "benign": "normal", "Benign 2": "benign"})


@pytest.mark.parametrize("place", ["", "a"])
def test_groups_csv_gives_the_groups_that_the_table_does_not(root: Path, place: str) -> None:
    inside = "" if place else "a/"
    (root / place / "groups.csv").write_text(f"path,group\n{inside}0.png,x\n{inside}1.png,x\n{inside}5.png,x\n")
    file = table(root, *(f"a/{n}.png,{'normal' if n % 2 else 'cancer'}" for n in range(4)), columns="path,class")
    rows = read_images(root, 16, table=file).table.set_index("path")
    assert rows["group"]["a/0.png"] == rows["group"]["a/1.png"] and rows["group"].nunique() == 3


def test_a_table_of_series_takes_all_their_images(root: Path) -> None:
    for number in range(6):
        grey_HW = np.asarray(picture(number))
        write_slice(
            root / f"scans/{number}", grey_HW, SeriesInstanceUID=f"{UID_ROOT}{number // 2}", PatientID=str(number)
        )
    file = table(root, f"cancer,{UID_ROOT}0", f" normal , {UID_ROOT}2", columns="class,SeriesInstanceUID")
    images = read_images(root, 16, table=file)
    assert images.classes == ("cancer", "normal")
    assert list(images.table["path"]) == ["scans/0", "scans/1", "scans/4", "scans/5"]
    assert list(images.table["label"]) == [0, 0, 1, 1]
    assert images.table["has_patient"].all()
    assert LeftAside(UNLISTED, 8, "a/0.png") in images.left_aside


@pytest.mark.parametrize(
    ("columns", "lines", "message"),
    [
        ("path,class", ["a/0.png,normal", "a/9.png,x"], r"line 3: the path 'a/9\.png' is no image's"),
        ("path,class", ["a/0.png,normal", "../a/1.png,x"], "line 3: the path .* is no image's"),
        ("path,class", ["a/0.png,normal", "a/./0.png,x"], "line 3: the path .* is named twice"),
        ("path,class", ["a/0.png,normal", "a/1.png,"], "line 3: .* has an empty class"),
        ("path,class", ["a/0.png,normal", "a/1.png,Normal"], "has images of fewer than two classes"),
        ("path,class", [], "has images of no class; it has no lines"),
        ("file,class", ["a/0.png,normal"], "not a CSV file with the columns path,class"),
        ("path,class", ['"a/0.png,normal'], "is not a CSV file"),
        ("path,class,group,Group", ["a/0.png,normal,p,q"], "has several columns 'group'"),
        ("path,class", ["a/0.png,normal,", "a/1.png,x,"], "line 2 has 3 values, and the first line names 2 columns"),
        (
            "path,class",
            ["a/0.png,normal", "", "a/1.png,x,y"],
            "line 4 has 3 values, and the first line names 2 columns",
        ),
        ("path,class", ["a/0.png,normal", "a/1.png"], "line 3 has 1 value, and the first line names 2 columns"),
        ("SeriesInstanceUID,class", ["1.2.SECRET,normal,"], "line 2 has 3 values, and the first line names 2 columns"),
        ("SeriesInstanceUID,kind", ["1.2.SECRET,normal"], "not a CSV file with the columns SeriesInstanceUID,class"),
        ("SeriesInstanceUID,class", ["1.2.SECRET,normal"], "line 2: .* has no file of this series"),
        ("SeriesInstanceUID,class", ["1.2.SECRET,"], "line 2 has an empty class"),
        ("SeriesInstanceUID,class", [",normal"], "line 2 has an empty SeriesInstanceUID"),
        ("SeriesInstanceUID,class", [f"{UID_ROOT}1,normal", f" {UID_ROOT}1,x"], "line 3 names its series again"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error_with_its_line(
    root: Path, columns: str, lines: list[str], message: str
) -> None:
    write_slice(root / "scan", np.asarray(picture(9)), SeriesInstanceUID=f"{UID_ROOT}1")
    with pytest.raises(DataError, match=message) as refused:
        read_images(root, 16, table=table(root, *lines, columns=columns))
    assert "SECRET" not in str(refused.value) and UID_ROOT not in str(refused.value)


def test_a_table_that_is_not_there_is_an_error(root: Path) -> None:
    with pytest.raises(DataError, match=r"no\.csv cannot be read: No such file"):
        read_images(root, 16, table=root / "no.csv")
