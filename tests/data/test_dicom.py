"""DICOM files give the grey values that they mean, or are left aside or refused with a reason that names nobody."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import PATIENT_ID, PLANTED, UID_ROOT, WAYS, as_dicom, write_slice
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.pixels import apply_rescale, apply_windowing
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless
from test_reading import SIDE, SLICE

from lungct_tune.auditing.audit import audit_images
from lungct_tune.config.window import WINDOWS, Window, parse_window
from lungct_tune.data import DataError, dicom, read_images, split_images
from lungct_tune.data.decode import decode
from lungct_tune.data.dicom import ANNOTATED, CAPTURES, LOCALISERS, NO_IMAGES, is_dicom
from lungct_tune.data.dicom_headers import read_header
from lungct_tune.data.inputs import find_inputs
from lungct_tune.reporting.audit_page import audit_page

FILES = Path(pydicom.__file__).parent / "data"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_slice_is_read_as_the_same_slice_stored_as_png(tmp_path: Path, way: dict[str, Any]) -> None:
    path = write_slice(tmp_path / "no suffix", SLICE, **way)
    np.testing.assert_array_equal(decode(path, SIDE).image_HW, SLICE)


@pytest.mark.parametrize("way", [way for way in WAYS if "window" not in way], ids=str)
def test_a_given_window_replaces_that_of_the_file(tmp_path: Path, way: dict[str, Any]) -> None:
    path = write_slice(tmp_path / "x", SLICE, **way, WindowCenter=[999, -5], WindowWidth=[3, 9])
    np.testing.assert_array_equal(decode(path, SIDE, WINDOWS["lung"]).image_HW, SLICE)
    assert (decode(path, SIDE).image_HW != SLICE).any()
    path = write_slice(tmp_path / "x", SLICE, **way, without=("WindowCenter", "WindowWidth"))
    np.testing.assert_array_equal(decode(path, SIDE, parse_window("-600,1500")).image_HW, SLICE)


def test_an_enhanced_image_of_one_frame_has_window_and_rescale_in_groups(tmp_path: Path) -> None:
    path = write_slice(tmp_path / "x", SLICE)
    dataset, shared, frame, values, shown = pydicom.dcmread(path), *(pydicom.Dataset() for _ in range(4))
    for item, names in ((values, ("RescaleSlope", "RescaleIntercept")), (shown, ("WindowCenter", "WindowWidth"))):
        for name in names:
            item[name] = dataset[name]
            del dataset[name]
    shared.PixelValueTransformationSequence, frame.FrameVOILUTSequence = [values], [shown]
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], [frame]
    dataset.save_as(path)
    for window in (None, WINDOWS["lung"]):
        np.testing.assert_array_equal(decode(path, SIDE, window).image_HW, SLICE)


def test_without_any_window_deep_values_are_scaled_by_percentiles_and_padding_is_black(tmp_path: Path) -> None:
    windowless = ("WindowCenter", "WindowWidth")
    path = write_slice(tmp_path / "x", SLICE, without=windowless)
    assert np.abs(decode(path, SIDE).image_HW.astype(int) - SLICE).max() <= 2
    dataset = pydicom.dcmread(path)
    values_HW = dataset.pixel_array.copy()
    values_HW[:4] = 0  # black in SLICE; far below all other values
    dataset.PixelData = values_HW.tobytes()
    dataset.add_new("PixelPaddingValue", "US", 0)
    dataset.save_as(path)
    assert np.abs(decode(path, SIDE).image_HW.astype(int) - SLICE).max() <= 4


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_also_if_its_value_is_written_without_sign(tmp_path: Path, photometric: str) -> None:
    path = tmp_path / "x"
    write_slice(path, SLICE, signed=True, bits=16, intercept=0, PhotometricInterpretation=photometric)
    dataset = pydicom.dcmread(path)
    del dataset.WindowCenter, dataset.WindowWidth
    values_HW = dataset.pixel_array.copy()
    is_black_HW = np.zeros((SIDE, SIDE), bool)
    is_black_HW[:, : SIDE // 4] = True
    values_HW[is_black_HW] = -2000
    dataset.PixelData = values_HW.tobytes()
    dataset.add_new("PixelPaddingValue", "US", 63536)  # -2000, as GE's scanners write it
    dataset.save_as(path)
    grey_HW = decode(path, SIDE).image_HW
    assert (grey_HW[is_black_HW] == 0).all()
    assert np.abs(grey_HW.astype(int) - SLICE)[~is_black_HW].max() <= 4


@settings(max_examples=60, deadline=None)
@given(
    center=st.floats(-1500, 1500),
    width=st.floats(2, 3000),
    slope=st.sampled_from([0.25, 1.0, 1.7]),
    intercept=st.integers(-2000, 500),
    signed=st.booleans(),
    inverted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_window_is_that_of_pydicom_from_black_to_white(
    tmp_path_factory: pytest.TempPathFactory,
    center: float,
    width: float,
    slope: float,
    intercept: int,
    signed: bool,
    inverted: bool,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("hypothesis") / "x"
    write_slice(path, SLICE, signed=signed, bits=16, PhotometricInterpretation=f"MONOCHROME{1 if inverted else 2}")
    dataset = pydicom.dcmread(path)
    values_HW = np.random.default_rng(seed).integers(-2000 if signed else 0, 4096, (SIDE, SIDE))
    dataset.PixelData = values_HW.astype("i2" if signed else "u2").tobytes()
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    dataset.WindowCenter, dataset.WindowWidth = f"{center:.4f}", f"{width:.4f}"
    dataset.save_as(path)
    expected_HW = apply_windowing(apply_rescale(dataset.pixel_array, dataset), dataset)
    ends = apply_windowing(np.array([-1e9, 1e9]), dataset)
    expected_HW = np.round((expected_HW - ends[0]) / (ends[1] - ends[0]) * 255)
    grey_HW = decode(path, SIDE).image_HW.astype(int)
    assert np.abs(grey_HW - (255 - expected_HW if inverted else expected_HW)).max() <= 1  # at ties
    given = decode(path, SIDE, Window(float(f"{center:.4f}"), float(f"{width:.4f}"))).image_HW
    np.testing.assert_array_equal(given, grey_HW)


def test_compressions_of_pydicoms_files_give_the_pixels_of_the_plain_file() -> None:
    plain = decode(FILES / "test_files/MR_small.dcm", 64).pixel_digest
    for name in ("RLE", "jpeg_ls_lossless", "jp2klossless", "implicit", "bigendian", "padded"):
        assert decode(FILES / f"test_files/MR_small_{name}.dcm", 64).pixel_digest == plain


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """The phantoms as DICOM files, stored in all `WAYS`."""
    return as_dicom(phantoms, tmp_path_factory.mktemp("dicom"))


def test_phantoms_as_dicom_have_the_pixels_classes_and_groups_of_the_pngs(series: Path, phantoms: Path) -> None:
    drawn, stored = read_images(phantoms, 32), read_images(series, 32)
    np.testing.assert_array_equal(drawn.images_NHW, stored.images_NHW)
    for column in ("folder", "label", "group", "width", "height"):
        assert drawn.table[column].equals(stored.table[column])
    assert [f"{path}.png" for path in stored.table["path"]] == list(drawn.table["path"])
    assert stored.table["has_patient"].all() and not stored.table["is_listed"].any()
    assert drawn.table["is_listed"].all() and not drawn.table["has_patient"].any()


def test_the_audit_says_how_many_groups_come_from_patient_ids(series: Path) -> None:
    images = read_images(series, 32)
    groups = audit_images(images, split_images(images, "grouped", 0), "grouped").groups
    assert groups.images_with_patient_id == 60
    assert groups.groups_from_patient_ids == groups.groups == images.table["group"].nunique()


def test_copies_in_dicom_are_shown_on_the_audits_page(tmp_path: Path) -> None:
    root = slices(tmp_path)
    (root / "normal/again").write_bytes((root / "normal/0").read_bytes())
    images = read_images(root, 32)
    page = audit_page(audit_images(images, split_images(images, "grouped", 0), "grouped"), root).decode()
    assert "normal/again" in page and page.count("data:image/webp") == 2


def slices(root: Path, **tags: Any) -> Path:
    """Two classes of three images that look different, each of another patient."""
    rng = np.random.default_rng(3)
    for number in range(6):
        folder = root / ("normal", "adenocarcinoma")[number % 2]
        small = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).resize((32, 32), Image.Resampling.NEAREST)
        write_slice(folder / str(number), np.asarray(small), **{"PatientID": f"{PATIENT_ID}{number}", **tags})
    return root


def test_images_of_one_patient_are_one_group_and_groups_csv_has_priority(tmp_path: Path) -> None:
    root = slices(tmp_path)
    assert read_images(root, 32).table["group"].nunique() == 6
    for path in ("normal/0", "normal/2", "adenocarcinoma/1"):
        dataset = pydicom.dcmread(root / path)
        dataset.PatientID = " the same "
        dataset.save_as(root / path)
    group_of = read_images(root, 32).table.set_index("path")["group"]
    assert group_of["normal/0"] == group_of["normal/2"] == group_of["adenocarcinoma/1"]
    assert group_of.nunique() == 4
    (root / "groups.csv").write_text("path,group\nnormal/0,a\nnormal/4,a\n")
    table = read_images(root, 32).table.set_index("path")
    assert table["group"]["normal/0"] == table["group"]["normal/4"] != table["group"]["normal/2"]
    assert list(table.index[table["is_listed"]]) == ["normal/0", "normal/4"]
    assert table["has_patient"].sum() == 4


def test_images_without_a_patient_id_are_grouped_by_likeness(tmp_path: Path) -> None:
    root = slices(tmp_path, without=("PatientID",))
    dataset = pydicom.dcmread(root / "normal/0")
    pixels_HW = dataset.pixel_array.copy()
    pixels_HW[0, 0] += 100
    dataset.PixelData = pixels_HW.tobytes()
    dataset.save_as(root / "normal/again")
    table = read_images(root, 32).table.set_index("path")
    assert table["group"]["normal/0"] == table["group"]["normal/again"]
    assert table["group"].nunique() == 6 and not table["has_patient"].any()


def test_groups_and_fingerprint_do_not_depend_on_the_users_key(tmp_path: Path) -> None:
    root = slices(tmp_path / "data")
    first, second = (read_images(root, 32, cache=tmp_path / name) for name in ("one", "two"))
    assert first.fingerprint == second.fingerprint
    assert list(first.table["group"]) == list(second.table["group"])
    assert read_images(root, 32, cache=tmp_path / "one", window=WINDOWS["mediastinum"]).fingerprint != first.fingerprint


ASIDE = {
    LOCALISERS: {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
    CAPTURES: {"SOPClassUID": pydicom.uid.SecondaryCaptureImageStorage},
    NO_IMAGES: {"Modality": "SEG"},
    ANNOTATED: {"BurnedInAnnotation": "YES"},
}


@pytest.mark.parametrize("reason", ASIDE)
def test_what_is_no_slice_is_left_aside_with_a_reason_and_a_count(tmp_path: Path, reason: str) -> None:
    root = slices(tmp_path / "data")
    for number in range(2):
        write_slice(root / f"normal/aside{number}", SLICE, **ASIDE[reason])
    images = read_images(root, 32)
    assert [(left.reason, left.files, left.example) for left in images.left_aside] == [(reason, 2, "normal/aside0")]
    assert len(images.table) == 6
    found = find_inputs([str(root)])
    assert len(found.images) == 6 and found.left_aside == {reason: 2}
    with pytest.raises(ValueError, match=f"not used: {reason}"):
        decode(root / "normal/aside0", 32)


def test_a_class_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    root = slices(tmp_path)
    for number in (1, 3, 5):
        write_slice(root / f"adenocarcinoma/{number}", SLICE, **ASIDE[LOCALISERS])
    with pytest.raises(DataError, match=f"no image of adenocarcinoma is left in .*: its files are {LOCALISERS}"):
        read_images(root, 32)


def test_an_index_of_a_cd_is_no_loose_image(tmp_path: Path) -> None:
    root = slices(tmp_path)
    (root / "DICOMDIR").write_bytes((FILES / "test_files/dicomdirtests/DICOMDIR").read_bytes())
    assert [(left.files, left.example) for left in read_images(root, 32).left_aside] == [(1, "DICOMDIR")]


def test_patients_of_predict_are_hashes_unless_groups_csv_names_them(tmp_path: Path) -> None:
    root = slices(tmp_path, PatientID="one")
    found = find_inputs([str(root), str(root / "normal/0")]).images
    assert len({image.group for image in found}) == 1 and found[0].group.startswith("patient-")
    (root / "groups.csv").write_text("path,group\nnormal/0,a\n")
    assert find_inputs([str(root)]).images[-3].group == "a"
    assert find_inputs([str(write_slice(tmp_path / "one/x", SLICE))]).images[0].group == str(tmp_path / "one")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "frames": ({"NumberOfFrames": 2}, "several frames"),
    "no pixels": ({"without": ("PixelData",)}, "has no pixels$"),
    "no rows": ({"without": ("Rows",)}, "has no Rows$"),
    "huge": ({"Rows": 60_000, "Columns": 60_000}, "at most 20,000,000 pixels"),
    "more rows than pixels": ({"Rows": 2 * SIDE}, "pixels cannot be decoded"),
    "no number": ({"WindowCenter": "1e999"}, "cannot be used|cannot be decoded"),
    "no width": ({"WindowWidth": 0}, "rescale slope, intercept or window cannot be used"),
    "no slope": ({"RescaleSlope": "0"}, "rescale slope, intercept or window cannot be used"),
    "unknown colours": ({"PhotometricInterpretation": "PLANTED"}, "photometric interpretation is not read"),
    "one sample of colours": ({"PhotometricInterpretation": "RGB"}, "samples per pixel|cannot be decoded"),
    "a window for no CT": ({"Modality": "MR", "read": WINDOWS["lung"]}, "not in Hounsfield units"),
    "a window for another quantity": ({"RescaleType": "ED", "read": WINDOWS["lung"]}, "another rescale type"),
    "no slope but an intercept": ({"without": ("RescaleSlope",)}, "only one of slope and intercept"),
    "a lookup table": ({"ModalityLUTSequence": [pydicom.Dataset()]}, "has a lookup table"),
    "a window without rescale": ({"window": None, "bits": 8, "read": WINDOWS["lung"]}, "not in Hounsfield units"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_would_be_read_wrongly_is_refused(tmp_path: Path, kind: str) -> None:
    how, message = REFUSED[kind]
    window = how.get("read")
    path = write_slice(tmp_path / "x", SLICE, **{name: value for name, value in how.items() if name != "read"})
    with pytest.raises(ValueError, match=message) as refused:
        decode(path, SIDE, window)
    assert not any(value in str(refused.value) for value in ("PLANTED", "planted", UID_ROOT))


def test_a_window_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = write_slice(tmp_path / "x", SLICE)
    width = b"DS\x06\x001500.0"
    assert width in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(width, width.replace(b".", b",")))
    with pytest.raises(ValueError, match="rescale slope, intercept or window cannot be used"):
        decode(path, SIDE)


def test_a_compression_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = write_slice(tmp_path / "x", SLICE, syntax=RLELossless)
    path.write_bytes(path.read_bytes().replace(RLELossless.encode(), RLELossless[:-1].encode() + b"8"))
    with pytest.raises(ValueError, match=r"its compression \(transfer syntax\) is not read"):
        decode(path, SIDE)


def test_a_compressed_image_of_another_size_than_its_file_says_is_not_decoded(tmp_path: Path) -> None:
    path = write_slice(tmp_path / "x", SLICE, syntax=JPEG2000Lossless)
    content = bytearray(path.read_bytes())
    at = content.find(b"\xff\x4f\xff\x51") + 8
    content[at : at + 4] = struct.pack(">I", 1_000_000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="has another size than the file says"):
        decode(path, SIDE)


def test_a_deflated_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = write_slice(tmp_path / "x", SLICE, syntax=pydicom.uid.DeflatedExplicitVRLittleEndian)
    meta = pydicom.filereader.read_file_meta_info(path)
    head = path.read_bytes()[: 132 + 12 + meta.FileMetaInformationGroupLength]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(head + b"".join(deflate.compress(bytes(10**7)) for _ in range(30)) + deflate.flush())
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match="more than 200,000,000 bytes when it is inflated"):
        decode(path, SIDE)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_damaged_files_end_in_a_reason(tmp_path: Path, syntax: str) -> None:
    if syntax == JPEGLSLossless:  # there is no encoder
        whole = (FILES / "test_files/MR_small_jpeg_ls_lossless.dcm").read_bytes()
    else:
        whole = write_slice(tmp_path / "x", SLICE, syntax=syntax).read_bytes()
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "damaged", 0
    for _ in range(60):
        content = np.frombuffer(whole, np.uint8).copy()
        at = rng.integers(132, len(content), rng.integers(1, 20))
        content[at] = rng.integers(0, 256, len(at))
        path.write_bytes(content.tobytes()[: int(rng.choice([len(whole), rng.integers(200, len(whole))]))])
        read_header(path, lambda kind, value: kind + value)
        try:
            decode(path, SIDE)
        except (OSError, ValueError) as error:
            refused += 1
            assert not any(value in str(error) for value in PLANTED.values())
    assert refused > 10


def test_without_pydicom_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    root = slices(tmp_path)
    dicom.load_pydicom.cache_clear()
    monkeypatch.setitem(sys.modules, "pydicom.config", None)
    with pytest.raises(DataError, match=r"install it: pip install 'lungct-tune\[dicom\]'"):
        read_images(root, 32, skip_unreadable=True)


def outcome(path: Path) -> str:
    """Whether a file is used, and if not, why."""
    if not is_dicom(path):
        with pytest.raises((ValueError, OSError), match="not an image in one of the formats"):
            decode(path, 32)
        return "no DICOM"
    aside = read_header(path, lambda kind, value: value).aside
    try:
        decoded = decode(path, 32)
    except ValueError as error:
        return aside if str(error) == f"not used: {aside}" else f"refused: {error}"
    assert not aside and decoded.properties.format == "DICOM"
    return "used"


def test_what_happens_to_each_file_that_pydicom_ships() -> None:
    files = (path for path in FILES.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    found = {path.relative_to(FILES).as_posix(): outcome(path) for path in files}
    expected = json.loads((Path(__file__).parent / "pydicom_files.json").read_text())
    assert found == {path: how for how, paths in expected.items() for path in paths}
