"""Reads DICOM files with pydicom: what a file shows, and its pixels as 8-bit grey.

No value of a file is in a message of this module, because any value may identify a patient.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lungct_tune.config.window import Window
from lungct_tune.data.folders import DataError
from lungct_tune.data.grey import MOST_BYTES, MOST_PIXELS, scaled
from lungct_tune.files import open_file

if TYPE_CHECKING:
    from pydicom import Dataset

VERSION = 3
"""Part of every cache key. Raise it when a change gives other pixels, groups or reasons for the same file."""

NO_IMAGES = "DICOM objects without an image: reports, plans, doses, segmentations, directories"
LOCALISERS = "DICOM localisers"
CAPTURES = "DICOM secondary captures, such as screenshots and dose reports"
ANNOTATED = "DICOM images with burned-in annotations, which may be names"

MOST_INFLATED = 200_000_000
"""Bytes of a file that is compressed as a whole (deflated), once it is not."""

_PREAMBLE, _MAGIC = 128, b"DICM"
_PIXEL_DATA, _FIRST_PIXEL_TAG = 0x7FE00010, 0x7FE00008
_NEEDED = ("Rows", "Columns", "BitsStored", "PhotometricInterpretation")
_NO_IMAGE_MODALITIES = {"SEG", "RTDOSE"}  # these have pixels that are no grey values
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7."  # of one frame; with 1 to 4 behind it, of several
_GREYS, _PALETTE = ("MONOCHROME1", "MONOCHROME2"), "PALETTE COLOR"
_COLOURS = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
_HOUNSFIELD = ("HU", "HU_MOD", "US")  # rescale types; US is unspecified
_OF_FRAMES = {
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
}
_BLOCK = 1_000_000  # pixels that are scaled at a time, since float64 takes four times the memory

_FRAME_SIZES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers of JPEG and JPEG-LS: start of frame
_JPEG_2000 = b"\xff\x4f\xff\x51"  # start of codestream, then the size


def is_dicom(path: Path) -> bool:
    """Whether a file's content says that it is DICOM.

    Raises:
        OSError: it cannot be opened.
    """
    with open_file(path, MOST_BYTES) as file:
        return file.read(_PREAMBLE + len(_MAGIC))[_PREAMBLE:] == _MAGIC


def packages() -> dict[str, str]:
    """The versions of the packages that decode DICOM files, for cache keys; "" for a missing one."""
    versions = {}
    for name in ("pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


@cache
def load_pydicom() -> None:
    """Imports pydicom and silences it: its warnings quote values of the file.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pydicom.config
    except ImportError as error:
        raise DataError("DICOM files are read with pydicom; install it: pip install 'lungct-tune[dicom]'") from error
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for name in ("pydicom", "pylibjpeg"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # also of the loggers below it
    warnings.filterwarnings("ignore", module=r"pydicom\.")


def read_header(path: Path) -> tuple[Dataset, bool]:
    """A file's elements before its pixels, and whether there are pixels.

    Raises:
        DataError: pydicom is not installed.
        OSError, ValueError, MemoryError: the file cannot be read.
    """
    load_pydicom()
    from pydicom.filereader import read_partial

    found: list[int] = []

    def at_pixels(tag: int, _: str | None, __: int) -> bool:
        if tag >= _FIRST_PIXEL_TAG:
            found.append(tag)
        return tag >= _FIRST_PIXEL_TAG

    with open_file(path, MOST_BYTES) as file, nameless("its DICOM header cannot be read"):
        _refuse_bomb(path, file)
        return read_partial(file, at_pixels), found == [_PIXEL_DATA]


def why_aside(header: Dataset, has_pixels: bool) -> str:
    """The reason for which a file is no slice to learn from, one of four; "" if it may be one.

    An image that has lost its pixels is a fault, and none of these.
    """
    from pydicom.uid import UID

    given = header.get("SOPClassUID"), header.file_meta.get("MediaStorageSOPClassUID")  # one of them may be damaged
    kinds = [UID(str(uid)) for uid in given if uid]
    is_image = has_pixels or not kinds or any("Image Storage" in kind.name for kind in kinds)
    if not is_image or header.get("Modality") in _NO_IMAGE_MODALITIES:
        return NO_IMAGES
    if any(f"{kind}.".startswith(_SECONDARY_CAPTURE) for kind in kinds):
        return CAPTURES
    if "LOCALIZER" in (header.get("ImageType") or ()):
        return LOCALISERS
    return ANNOTATED if header.get("BurnedInAnnotation") == "YES" else ""


def read_dicom(path: Path, window: Window | None) -> tuple[Image.Image, str]:
    """A file's slice as 8-bit grey, and how it is stored: "MONOCHROME2;12", "RGB;8", ...

    Grey values are rescaled (slope and intercept), and then `window` is applied, or else the first window of the file.
    Without any, values of more than 8 bits are scaled by their percentiles, as in files of other formats. MONOCHROME1
    is inverted. Colours become ITU-R 601 luma. Overlays and lookup tables of grey values (VOI LUT) are not applied.

    Raises:
        DataError: pydicom is not installed.
        OSError, ValueError, MemoryError: it is no slice, has several frames, or cannot be read.
    """
    header, has_pixels = read_header(path)
    with nameless("its DICOM header cannot be read"):
        if reason := why_aside(header, has_pixels):
            raise _Refused(f"not used: {reason}")
        if not has_pixels:
            raise _Refused("has no pixels")
        if missing := [name for name in _NEEDED if header.get(name) is None]:
            raise _Refused(f"has no {', '.join(missing)}")
        width, height, frames = int(header.Columns), int(header.Rows), int(header.get("NumberOfFrames") or 1)
        photometric, depth = str(header.PhotometricInterpretation), int(header.BitsStored)
        if photometric not in (*_GREYS, *_COLOURS, _PALETTE):
            raise _Refused("its photometric interpretation is not read")
        _unfold(header)
        is_rescaled = header.get("RescaleSlope") is not None and header.get("RescaleIntercept") is not None
        in_hounsfield = header.get("Modality", "CT") == "CT" and is_rescaled
        in_hounsfield = in_hounsfield and (header.get("RescaleType") or "HU") in _HOUNSFIELD
    if frames > 1:
        raise ValueError("has several frames, and one slice is read from a file; save each frame as a file of its own")
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels; at most {MOST_PIXELS:,} pixels are decoded")
    if window is not None and not (in_hounsfield and photometric in _GREYS):
        raise ValueError(
            "the window cannot be applied: its values are not in Hounsfield units, because it is no CT, has no "
            "rescale slope and intercept, or has another rescale type"
        )
    from pydicom import dcmread

    with open_file(path, MOST_BYTES) as file, nameless("its pixels cannot be decoded"):
        dataset = dcmread(file)
        _unfold(dataset)
        values = _decoded(dataset)
        is_grey = photometric in _GREYS
        grey = Image.fromarray(_in_grey(values, dataset, window)) if is_grey else _luma(values, dataset)
    return grey, f"{photometric};{depth}"


def _unfold(dataset: Dataset) -> None:
    """Puts what an enhanced image says of its only frame where other images say it (PS3.3, C.7.6.16)."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (dataset.get(groups) or [])[:1]:
            for sequence, names in _OF_FRAMES.items():
                for item in (group.get(sequence) or [])[:1]:
                    for name in names:
                        if name in item:
                            setattr(dataset, name, item.get(name))


class _Refused(ValueError):
    """A fault that this module has found itself, in its own words."""


@contextmanager
def nameless(what: str) -> Iterator[None]:
    """Replaces any error of pydicom or a decoder, whose message may quote the file, by a ValueError with its kind."""
    try:
        yield
    except (OSError, MemoryError, DataError, _Refused):
        raise
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__})") from None


def _refuse_bomb(path: Path, file: BufferedReader) -> None:
    """Refuses a deflated file that is too large when it is inflated; pydicom inflates all of it into memory."""
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        # the length of the group is the value of its first element, which has 12 bytes
        file.seek(_PREAMBLE + len(_MAGIC) + 12 + int(meta.FileMetaInformationGroupLength))
        inflating, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := inflating.unconsumed_tail or file.read(_BLOCK):
            if (size := size + len(inflating.decompress(chunk, _BLOCK))) > MOST_INFLATED:
                raise _Refused(f"it is deflated, and has more than {MOST_INFLATED:,} bytes when it is inflated")
            if inflating.eof:
                break
    file.seek(0)


def _decoded(dataset: Dataset) -> np.ndarray:
    """The stored values, (H, W), or (H, W, 3) of colours."""
    from pydicom.encaps import get_frame
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array
    from pydicom.uid import RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise _Refused("its compression (transfer syntax) is not read") from None
    if not decoder.is_available:
        raise _Refused(
            f"it is compressed as {syntax.name}, which needs pylibjpeg; install it: pip install 'lungct-tune[dicom]'"
        )
    if syntax.is_encapsulated and syntax != RLELossless:
        size = _coded_size(get_frame(dataset.PixelData, 0, number_of_frames=1))
        if size != (dataset.Columns, dataset.Rows):  # a decoder would take memory for the former
            raise _Refused("its compressed image is damaged, or has another size than the file says")
    # pylibjpeg's decoder of RLE meets damaged files with an error that is no Exception
    values = np.asarray(pixel_array(dataset, decoding_plugin="pydicom" if syntax == RLELossless else ""))
    if values.shape[2:] != ((3,) if dataset.PhotometricInterpretation in _COLOURS else ()):
        raise _Refused("its samples per pixel do not fit its photometric interpretation")
    return values


def _coded_size(frame: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a JPEG, JPEG-LS or JPEG 2000 image; None if there are none.

    Sources: ITU-T T.81 annex B, T.87 annex C, T.800 annex A.5.
    """
    try:
        if (start := frame.find(_JPEG_2000)) >= 0 and frame[:2] != b"\xff\xd8":
            right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
            return right - left, bottom - top
        at = 2
        while frame[at] == 0xFF:
            marker, length = struct.unpack_from(">xBH", frame, at)
            if marker in _FRAME_SIZES:
                height, width = struct.unpack_from(">2H", frame, at + 5)
                return width, height
            at += 2 + length
    except (IndexError, struct.error):
        pass
    return None


def _in_grey(values_HW: np.ndarray, dataset: Dataset, window: Window | None) -> np.ndarray:
    """Stored grey values as uint8, (H, W): rescaled, windowed, black as 0."""
    if window is not None:
        dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = *window, "LINEAR"
    full = 2 ** int(dataset.BitsStored) - 1
    if _has_value(dataset, "WindowCenter") and _has_value(dataset, "WindowWidth"):
        grey_HW = _windowed(values_HW, dataset)
    elif full <= 255 and not dataset.PixelRepresentation:
        grey_HW = np.round(values_HW * (255 / full)).astype(np.uint8)
    else:
        grey_HW = scaled(_without_padding(values_HW, dataset))
    return 255 - grey_HW if dataset.PhotometricInterpretation == "MONOCHROME1" else grey_HW


def _windowed(values_HW: np.ndarray, dataset: Dataset) -> np.ndarray:
    from pydicom.pixels.processing import apply_rescale, apply_windowing

    rescale = [_has_value(dataset, name) for name in ("RescaleSlope", "RescaleIntercept")]
    if any(rescale) != all(rescale) or _has_value(dataset, "ModalityLUTSequence"):
        raise _Refused(
            "its window is for rescaled values, and it has a lookup table or only one of slope and intercept"
        )
    # where a window begins and ends in what apply_windowing returns depends on how the values are stored
    try:
        black, white = apply_windowing(np.array([-np.inf, np.inf]), dataset)
    except (ValueError, TypeError):  # a width below 1, or no number
        black = white = 0.0
    if not np.isfinite([black, white]).all() or black == white:
        raise _Refused("its rescale slope, intercept or window cannot be used")
    grey_HW = np.empty(values_HW.shape, np.uint8)
    rows = max(1, _BLOCK // values_HW.shape[1])
    for start in range(0, len(values_HW), rows):
        block = slice(start, start + rows)
        shown_HW = apply_windowing(apply_rescale(values_HW[block], dataset), dataset)
        grey_HW[block] = np.round((shown_HW - black) * (255 / (white - black)))
    return grey_HW


def _without_padding(values_HW: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Gives the pixels outside of the scanned circle, which have a value of their own, the darkest of the others."""
    if not isinstance(padding := dataset.get("PixelPaddingValue"), int):
        return values_HW
    # as stored: scanners write -2000 also as 63536, its bits without sign
    is_padding_HW = values_HW == np.array(padding).astype(values_HW.dtype)
    if is_padding_HW.all():
        return values_HW
    others_M = values_HW[~is_padding_HW]
    darkest = others_M.max() if dataset.PhotometricInterpretation == "MONOCHROME1" else others_M.min()
    return np.where(is_padding_HW, darkest, values_HW)


def _luma(values: np.ndarray, dataset: Dataset) -> Image.Image:
    """Colours, or indices into a palette, as ITU-R 601 luma of 8 bits."""
    from pydicom.pixels.processing import apply_color_lut

    depth = int(dataset.BitsStored)
    if dataset.PhotometricInterpretation == _PALETTE:
        values = apply_color_lut(values, dataset)
        depth = 8 * values.itemsize
    if depth < 8:
        raise _Refused("colours of fewer than 8 bits are not read")
    return Image.fromarray((values[..., :3] >> (depth - 8)).astype(np.uint8)).convert("L")


def _has_value(dataset: Dataset, name: str) -> bool:
    """Whether an element is there and has a value."""
    value: Any = dataset.get(name)
    return value is not None and value != "" and value != []
