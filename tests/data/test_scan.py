"""Whatever lies in a data folder is used, or named with a reason and a count."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from test_dataset import save, two_classes

from lungct_tune.data import DataError, read_images, scan
from lungct_tune.data.folders import find_images
from lungct_tune.data.scan import CLUTTER, DOCUMENTS, LOOPS, OTHER_FORMATS, OUTSIDE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return two_classes(tmp_path / "images")


def aside(root: Path) -> dict[str, int]:
    return {left.reason: left.files for left in find_images(root).left_aside}


@pytest.mark.parametrize(
    "name",
    [
        *("@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/0.png", ".@__thumb/0.png", "$RECYCLE.BIN/0.png"),
        *("__MACOSX/._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r", "lost+found/0.png"),
        *(".git/objects/0.png", ".svn/0.png", "CVS/Entries", ".ipynb_checkpoints/0-checkpoint.png"),
        *("0.png~", "0.png.part", "0.png.crdownload", "~$notes.docx", "PaxHeader/0.png"),
    ],
)
@pytest.mark.parametrize("where", ["", "normal/"])
def test_thumbnails_and_clutter_are_left_aside_and_counted(root: Path, name: str, where: str) -> None:
    (root / where / name).parent.mkdir(parents=True, exist_ok=True)
    (root / where / name).write_bytes((root / "normal/0.png").read_bytes())
    assert aside(root) == {CLUTTER: 1}
    assert len(find_images(root).files) == 4


def test_documents_and_archives_beside_the_class_folders_are_named(root: Path) -> None:
    for name in ("README", "labels.csv", "archive.zip", "masks/0.npy"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("text")
    (root / "normal" / "notes.txt").write_text("text")
    found = {left.reason: (left.files, left.example) for left in find_images(root / ".").left_aside}
    assert found[DOCUMENTS] == (3, "README")
    assert found[OTHER_FORMATS] == (2, "archive.zip")


def test_slices_of_another_format_in_a_class_folder_stop_the_run(root: Path) -> None:
    (root / "normal/5.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"normal/5\.npy: not an image in one of the formats"):
        read_images(root, 16)
    assert [path for path, _ in read_images(root, 16, skip_unreadable=True).unreadable] == ["normal/5.npy"]


def test_linked_folders_are_followed_but_not_in_circles(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere/7.png", 7)
    (root / "normal/linked").symlink_to(tmp_path / "elsewhere")
    (root / "normal/circle").symlink_to(root)
    (root / "normal/itself.png").symlink_to(root / "normal/itself.png")
    image_set = read_images(root, 16, skip_unreadable=True)
    assert "normal/linked/7.png" in set(image_set.table["path"])
    assert aside(root)[LOOPS] == 1
    assert [path for path, _ in image_set.unreadable] == ["normal/itself.png"]


def test_a_folder_that_cannot_be_opened_stops_the_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(root / "normal/locked/7.png", 7)
    real = os.scandir

    def scandir(path: object) -> object:  # the tests may run as root, for whom no folder is locked
        if isinstance(path, Path) and path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(scan.os, "scandir", scandir)
    with pytest.raises(DataError, match="normal/locked/: the folder cannot be opened: Permission denied"):
        read_images(root, 16)
    assert len(read_images(root, 16, skip_unreadable=True).table) == 4


def test_pipes_and_devices_are_named_at_once(root: Path) -> None:
    os.mkfifo(root / "normal/pipe.png")
    (root / "normal/zero.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"pipe\.png: not a regular file\n.*zero\.png: not a regular file"):
        read_images(root, 16)


def test_a_name_that_is_not_utf8_is_named(root: Path) -> None:
    Path(os.fsdecode(os.fsencode(root) + b"/normal/M\xfcller.png")).write_bytes((root / "normal/0.png").read_bytes())
    with pytest.raises(DataError, match=r"normal/M\\xfcller\.png: the name is not UTF-8; rename it"):
        read_images(root, 16)
    assert len(read_images(root, 16, skip_unreadable=True).table) == 4


def test_a_class_whose_files_have_no_usable_name_is_not_lost_without_a_word(root: Path) -> None:
    for file in (root / "normal").iterdir():
        file.rename(os.fsdecode(bytes(root / "normal") + b"/\xff" + bytes(file.name, "utf-8")))
    with pytest.raises(DataError, match=r"without the 2 files that cannot be read, .* fewer than two classes"):
        read_images(root, 32, skip_unreadable=True)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_meet_composed_or_decomposed(root: Path, form: str) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    save(root / unicodedata.normalize(form, "Bösartig") / unicodedata.normalize(form, "Müller.png"), 9)
    (root / "groups.csv").write_text(unicodedata.normalize(other, "path,group\nBösartig/Müller.png,Müller\n"))
    class_map = {unicodedata.normalize(other, "bösartig"): unicodedata.normalize(other, "bösartig")}
    image_set = read_images(root, 16, class_map=class_map)
    assert unicodedata.normalize("NFC", "bösartig") in image_set.classes
    assert image_set.table["is_listed"].sum() == 1


@pytest.mark.parametrize(
    "name", ["a\nb.png", 'quote".png', "=1+1.png", "<b>.png", "\u202egnp.png", "100%.png", "#.png", "é" * 120 + ".png"]
)
def test_any_other_name_is_read(root: Path, name: str) -> None:
    save(root / "normal" / name, 9)
    assert f"normal/{name}" in set(read_images(root, 16).table["path"])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("./normal/0.png", r"line 3: the path './normal/0.png' is named twice, first as 'normal/0.png'"),
        ("adenocarcinoma/../normal/0.png", "named twice"),
        ("normal/9.png", "line 3: the path 'normal/9.png' is no image's"),
        ("../images/normal/1.png", "is no image's"),
    ],
)
def test_a_path_has_one_line_in_groups_csv(root: Path, second: str, message: str) -> None:
    (root / "groups.csv").write_text(f"path,group\nnormal/0.png,a\n{second},b\n")
    with pytest.raises(DataError, match=message):
        read_images(root, 16)


def test_groups_of_other_images_are_left_aside(root: Path) -> None:
    (root / "notes").mkdir()
    (root / "notes" / "groups.csv").write_text("path,group\nelsewhere.png,a\n")
    assert aside(root) == {DOCUMENTS: 1}


def test_files_of_other_formats_beside_split_folders_are_named(tmp_path: Path) -> None:
    two_classes(tmp_path / "train")
    for name in ("model.pth", "weights/model.pth", "train/model.pth", "train/weights/model.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"weights")
    assert aside(tmp_path) == {OTHER_FORMATS: 4}


def test_class_folders_are_found_inside_the_folders_of_an_archive(tmp_path: Path) -> None:
    inner = two_classes(tmp_path / "data set/data set")
    save(tmp_path / "data set/Test cases/1.png", 8)
    image_set = read_images(tmp_path, 16)
    assert len(image_set.table) == 4 and inner.name in image_set.table["path"][0]
    assert {left.reason: left.files for left in image_set.left_aside} == {OUTSIDE: 1}


def test_class_folders_in_two_places_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        two_classes(tmp_path / name)
    with pytest.raises(DataError, match="class folders in several places: one/, two/"):
        read_images(tmp_path, 16)


def test_class_folders_beside_data_are_refused(root: Path) -> None:
    two_classes(root / "Data")
    with pytest.raises(DataError, match=r"not known:\n  Data/"):
        read_images(root, 16)
