"""DICOM headers are read once, say whose image a file is to this user only, and are never missing without a word."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import UID_ROOT, write_slice
from test_dataset import picture
from test_dicom import ASIDE, slices
from test_reading import SLICE

from lungct_tune.data import DataError, dicom, read_images
from lungct_tune.data.dicom import LOCALISERS
from lungct_tune.data.dicom_headers import pseudonyms, read_header
from lungct_tune.data.folders import LeftAside
from lungct_tune.data.image_table import UNLISTED
from lungct_tune.data.inputs import find_inputs

AGAIN = "it could not be read at first; run the command again"


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = slices(tmp_path / "data")
    before = read_images(root, 32, cache=tmp_path / "cache").table
    monkeypatch.setattr(dicom, "read_header", None)
    pd_equal = read_images(root, 32, cache=tmp_path / "cache").table
    assert before.equals(pd_equal)


@pytest.mark.parametrize("failure", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_a_header_that_can_be_read_again_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    root = slices(tmp_path / "data", PatientID="one")

    def fail(*arguments: Any) -> None:
        raise failure

    with monkeypatch.context() as broken:
        broken.setattr("pydicom.filereader.read_partial", fail)
        with pytest.raises(DataError, match=r"normal/0: (MemoryError|.*Input/output error)"):
            read_images(root, 32, cache=tmp_path / "cache")
    assert read_images(root, 32, cache=tmp_path / "cache").table["has_patient"].all()


def test_hashes_are_those_of_one_user(tmp_path: Path) -> None:
    path = write_slice(tmp_path / "x", SLICE, PatientID="17")
    first, again, other = (read_header(path, pseudonyms(tmp_path / name)) for name in ("one", "one", "two"))
    assert first == again and first.patient != other.patient and first.series != other.series
    assert first.patient.removeprefix("patient-") != "17" and len(first.patient) == 24
    key = tmp_path / "one/pseudonyms.key"
    assert key.stat().st_size == 32 and key.stat().st_mode & 0o77 == 0


Breaker = Callable[[pytest.MonkeyPatch, Path], None]


def broken_header(failure: Exception) -> Breaker:
    """Makes reading a file's header fail once."""

    def break_it(monkeypatch: pytest.MonkeyPatch, broken: Path) -> None:
        read, failed = dicom.read_header, []

        def fail_once(path: Path) -> Any:
            if path == broken and not failed:
                failed.append(path)
                raise failure
            return read(path)

        monkeypatch.setattr(dicom, "read_header", fail_once)

    return break_it


def broken_opening(monkeypatch: pytest.MonkeyPatch, broken: Path) -> None:
    """Makes the first look at a file fail, which tells whether it is DICOM."""
    open_file, failed = dicom.open_file, []

    def fail_once(path: Path, most: int) -> Any:
        if path == broken and not failed:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return open_file(path, most)

    monkeypatch.setattr(dicom, "open_file", fail_once)


ONCE = {
    "memory": broken_header(MemoryError()),
    "disk": broken_header(OSError(errno.EIO, "Input/output error")),
    "opening": broken_opening,
}
fails_once = pytest.mark.parametrize("break_it", ONCE.values(), ids=ONCE)


@fails_once
@pytest.mark.parametrize("kind", ["a slice", "a localiser"])
def test_a_header_that_fails_once_makes_the_file_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Breaker, kind: str
) -> None:
    root, cache = slices(tmp_path / "data", PatientID="one"), tmp_path / "cache"
    if kind == "a localiser":
        write_slice(root / "normal/0", SLICE, **ASIDE[LOCALISERS])
    break_it(monkeypatch, root / "normal/0")
    with pytest.raises(DataError, match=f"normal/0: {AGAIN}"):
        read_images(root, 32, cache=cache)
    break_it(monkeypatch, root / "normal/0")
    images = read_images(root, 32, cache=cache, skip_unreadable=True)
    assert images.unreadable == [("normal/0", AGAIN)] and len(images.table) == 5
    assert images.table["has_patient"].all() and images.table["group"].nunique() == 1
    again = read_images(root, 32, cache=cache)
    assert not again.unreadable and again.table["has_patient"].all()
    assert len(again.table) + sum(left.files for left in again.left_aside) == 6


@fails_once
def test_a_file_whose_series_could_not_be_read_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Breaker
) -> None:
    root, table = tmp_path / "data", tmp_path / "table.csv"
    for number in range(6):
        write_slice(root / str(number), np.asarray(picture(number)), SeriesInstanceUID=f"{UID_ROOT}{number // 2}")
    table.write_text(f"class,SeriesInstanceUID\ncancer,{UID_ROOT}0\nnormal,{UID_ROOT}1\n")
    break_it(monkeypatch, root / "3")
    with pytest.raises(DataError, match=f"3: {AGAIN}"):
        read_images(root, 16, table=table)
    break_it(monkeypatch, root / "3")
    images = read_images(root, 16, table=table, skip_unreadable=True)
    assert images.unreadable == [("3", AGAIN)] and list(images.table["path"]) == ["0", "1", "2"]
    assert LeftAside(UNLISTED, 2, "4") in images.left_aside
    (root / "2").unlink()
    break_it(monkeypatch, root / "3")
    with pytest.raises(DataError, match=r"no file of this series; run the command again, since 3 could not be read"):
        read_images(root, 16, table=table, skip_unreadable=True)


@fails_once
def test_predict_does_not_take_a_folder_for_the_patient_of_a_header_that_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Breaker
) -> None:
    root = slices(tmp_path, PatientID="one")
    broken = root / "normal/0"
    for named in (root, broken):
        break_it(monkeypatch, broken)
        faults = {image.source: image.fault for image in find_inputs([str(named)]).images}
        assert faults.pop(str(broken)).endswith("; run the command again") and not any(faults.values())


def test_a_link_that_leads_nowhere_is_a_fault_that_stays(tmp_path: Path) -> None:
    root = slices(tmp_path, PatientID="one")
    (root / "normal/link").symlink_to(tmp_path / "nowhere")
    faults = {image.source: image.fault for image in find_inputs([str(root)]).images}
    assert faults.pop(str(root / "normal/link")) == "No such file or directory" and not any(faults.values())
    unreadable = read_images(root, 32, cache=tmp_path / "cache", skip_unreadable=True).unreadable
    assert unreadable == [("normal/link", "No such file or directory")]
