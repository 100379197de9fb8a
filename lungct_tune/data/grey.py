"""Turns an image of any mode into 8-bit grey, as its file says that its pixels are meant.

Followed: orientation (EXIF), colours, palettes, transparency, gamma (PNG), colour profiles (ICC) of grey and RGB, white
as zero and separate planes (TIFF), 8 to 32 bits. An image with several frames is refused, since each slice needs a file
of its own.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageFile, ImageOps, TiffImagePlugin

MOST_PIXELS = 20_000_000
"""Of an image's file. CT slices have a quarter of a million; a small compressed file can hold very many more."""

MOST_BYTES = 500_000_000
"""Of an image's file."""

PERCENTILES = (0.5, 99.5)
"""The values of a deep image that become 0 and 255. A few pixels of metal or of padding do not decide its contrast."""

_SAMPLE = 1_000_000  # pixels of which the percentiles are computed
_BLOCK = 1_000_000  # values that are scaled at a time, since float64 takes eight times the memory
_FULL = 65535
_SCREEN_GAMMA = 2.2
_NEW_SUBFILE_TYPE, _REDUCED = 254, 1  # a TIFF tag, and its bit for a thumbnail of another page
_MOST_THUMBNAILS = 16

Curve = Callable[[np.ndarray | float], np.ndarray | float]
"""From a stored value, 0 to 1, to what a screen shows, 0 to 1."""

_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""Of a colour of 16 bits Pillow keeps the high byte only. Read in the opposite byte order, it keeps the low one."""


class Grey(NamedTuple):
    """An image in grey, and how its file stored it."""

    image: Image.Image
    """Mode "L", upright."""
    stored: str
    """Pillow's mode of the file, and what else the file says of its pixels: "L", "RGB;16", "L turned", ..."""


def read_grey(image: Image.Image) -> Grey:
    """8-bit grey of an image that is not loaded yet, upright.

    Deeper images (16-bit, 32-bit, float) are scaled linearly from their `PERCENTILES` to 0..255. A file does not record
    which range it uses (12 of 16 bits, Hounsfield units, 0..1), and scaling by the nominal depth would turn a 12-bit
    CT slice almost black. Colours become ITU-R 601 luma. Transparency is composited over black.

    Raises:
        ValueError: the file has several frames, or pixels of a kind that is not read.
    """
    _refuse_frames(image)
    stored = [image.mode]
    is_turned = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(ExifTags.Base.Orientation, 1) != 1
    (curve, followed), alpha_HW = _brightness(image), None
    if (deep := _deep_colours(image)) is not None:
        stored[0] += ";16"
        values_HW, alpha_HW = deep
    else:
        if isinstance(image, ImageFile.ImageFile):
            image.filename = ""  # or else Pillow maps an uncompressed TIFF into memory, wrongly if it is turned
        image.load()
        if is_deep := image.mode.startswith(("I", "F")):
            values_HW = _numbers(image)
            if "transparency" in image.info:
                alpha_HW = np.where(values_HW == image.info["transparency"], 0, 255).astype(np.uint8)
    alpha = None if alpha_HW is None else Image.fromarray(alpha_HW)
    if deep is not None or is_deep:
        grey = Image.fromarray(scaled(values_HW, curve))
    else:
        grey = image.convert("L")
        if curve is not None:
            grey = grey.point([round(255 * float(curve(value / 255))) for value in range(256)])
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
    if _white_is_zero(image):
        grey = ImageOps.invert(grey)
    if alpha is not None:
        grey = ImageChops.multiply(grey, alpha)
    if followed:
        stored.append(followed)
    if (orientation := image.getexif().get(ExifTags.Base.Orientation, 1)) != 1:
        is_turned = True
        grey.getexif()[ExifTags.Base.Orientation] = orientation
        grey = ImageOps.exif_transpose(grey)
    if is_turned:  # by these lines, or a TIFF by Pillow
        stored.append("turned")
    return Grey(grey, " ".join(stored))


def _refuse_frames(image: Image.Image) -> None:
    if not getattr(image, "is_animated", False):
        return
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        for page in range(1, _MOST_THUMBNAILS + 2):
            try:
                image.seek(page)
            except EOFError:
                image.seek(0)
                return
            if not image.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & _REDUCED:
                break
    raise ValueError("has several frames, and one slice is read from a file; save each frame as a file of its own")


def _rawmode(image: Image.Image) -> str:
    """How Pillow unpacks the file's pixels; "" once they are loaded."""
    tiles: Sequence[Any] = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else ""
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""


def _deep_colours(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Luma (H, W) uint16 and alpha (H, W) uint8 of an image with colours of 16 bits; None for any other.

    Pillow keeps the high byte of such colours. So the file is read twice, the second time for the low byte.
    """
    rawmode = _rawmode(image)
    planes = _is_planar(image) and image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))[0] == 16  # type: ignore[attr-defined]
    if not planes and (rawmode[-4:-1] != ";16" or image.mode.startswith("I")):
        return None
    if rawmode.split(";")[0] not in ("RGB", "RGBX", "RGBA", "LA", "R") or not isinstance(image, ImageFile.ImageFile):
        raise ValueError(f"pixels stored as {rawmode} are not read; save it with 8 bits")
    if planes and image.tile[0].codec_name != "raw":
        raise ValueError("compressed separate planes of 16 bits are not read; save it uncompressed, or with 8 bits")
    order = "L" if planes and image.tag_v2.prefix == b"II" else "B" if planes else rawmode[-1]  # type: ignore[attr-defined]
    with Image.open(image.filename, formats=[image.format or ""]) as again:
        assert isinstance(again, ImageFile.ImageFile)
        if planes:
            _unpack(image, lambda band: f"{band};16{order}")
            _unpack(again, lambda band: f"{band};16{_OTHER_BYTE[order]}")
        elif rawmode == "LA;16B":  # four bytes: as if they were four channels
            _unpack(again, lambda _: "RGBA")
        else:
            _unpack(again, lambda _: rawmode[:-1] + _OTHER_BYTE[order])
        high_HWC, low_HWC = np.asarray(image), np.asarray(again)
    alpha_HW = high_HWC[..., 3] if high_HWC.shape[2] == 4 else None
    if rawmode == "LA;16B":
        return low_HWC[..., 0].astype(np.uint16) * 256 + low_HWC[..., 1], alpha_HW
    height, width = high_HWC.shape[:2]
    luma_HW = np.empty((height, width), np.uint16)
    transparent = image.info.get("transparency")
    if transparent is not None:
        alpha_HW = np.empty((height, width), np.uint8)
    rows = max(1, _BLOCK // width)
    for start in range(0, height, rows):
        block = slice(start, start + rows)
        rgb_HWC = high_HWC[block, :, :3].astype(np.uint32) * 256 + low_HWC[block, :, :3]
        luma_HW[block] = (rgb_HWC @ np.array([19595, 38470, 7471], np.uint32) + 0x8000) >> 16  # as Pillow's "L"
        if transparent is not None and alpha_HW is not None:
            alpha_HW[block] = np.where((rgb_HWC == transparent).all(axis=2), 0, 255)
    return luma_HW, alpha_HW


def _unpack(image: ImageFile.ImageFile, how: Callable[[str], str]) -> None:
    """Makes Pillow unpack the file's pixels in another way; `how` gives it from the present one."""
    for number, tile in enumerate(image.tile):
        arguments: Any = tile.args  # the raw mode, alone or followed by others
        changed = how(arguments) if isinstance(arguments, str) else (how(arguments[0]), *arguments[1:])
        image.tile[number] = tile._replace(args=changed)


def _is_planar(image: Image.Image) -> bool:
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    return is_tiff and image.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2  # type: ignore[attr-defined]


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a deep TIFF is stored inverted. Pillow itself inverts those of up to 8 bits."""
    return (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.mode.startswith(("I", "F"))
        and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    )


def _numbers(image: Image.Image) -> np.ndarray:
    """The values of an image of mode I or F, (H, W)."""
    values_HW = np.asarray(image)
    unsigned = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(339, (1,)) == (1,)
    return values_HW.view(np.uint32) if unsigned and values_HW.dtype == np.int32 else values_HW


def _brightness(image: Image.Image) -> tuple[Curve | None, str]:
    """The curve of an image whose pixels are not encoded for a screen, and what says so; None if there is none.

    A PNG says it by gAMA. A colour profile counts by what it makes of greys, since CT slices are grey.
    """
    if profile := image.info.get("icc_profile"):
        is_scaled = image.mode.startswith(("I", "F")) and not (image.mode.startswith("I;16"))
        if is_scaled or _white_is_zero(image) or (shown_V := _shown_greys(profile)) is None:
            return None, "profile not applied"
        greys_V = np.linspace(0, 1, len(shown_V))
        if np.abs(shown_V - greys_V).max() < 0.01:  # as sRGB
            return None, ""
        return lambda value: np.interp(value, greys_V, shown_V), "profile"
    gamma = image.info.get("gamma")
    if gamma is None or "srgb" in image.info:
        return None, ""
    if not 0.01 <= gamma <= 100:
        raise ValueError(f"the file's gamma is {gamma}")
    exponent = 1 / (gamma * _SCREEN_GAMMA)
    return (None, "") if abs(exponent - 1) < 0.02 else (lambda value: value**exponent, "gamma")


@lru_cache(maxsize=16)
def _shown_greys(profile: bytes) -> np.ndarray | None:
    """What a screen shows of 256 greys under a colour profile, 0 to 1; None if it is neither of grey nor of RGB.

    Raises:
        ValueError: it is damaged.
    """
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"GRAY": "L", "RGB": "RGB"}.get(opened.profile.xcolor_space.strip())
        if mode is None:
            return None
        screen = ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(ramp.convert(mode), opened, screen, outputMode="RGB")
    except (OSError, ImageCms.PyCMSError) as error:
        raise ValueError(f"its colour profile cannot be used ({error}); save it without") from error
    assert shown is not None  # only a change in place returns nothing
    shown_V: np.ndarray = np.asarray(shown.convert("L"))[0] / 255
    return shown_V


def scaled(values_HW: np.ndarray, curve: Curve | None = None) -> np.ndarray:
    """Scales deep values to 0..255 uint8, from their `PERCENTILES`.

    Args:
        values_HW: of any type.
        curve: for values of 16 bits that are not encoded for a screen.

    Raises:
        ValueError: some are not finite.
    """
    values_M = values_HW.ravel()
    if not np.isfinite([float(values_M.min()), float(values_M.max())]).all():
        raise ValueError("has pixels that are not finite numbers")
    low, high = np.percentile(values_M[:: max(1, values_M.size // _SAMPLE)], PERCENTILES)
    if low == high:  # nearly all pixels have one value
        low, high = values_M.min(), values_M.max()
    if curve is not None:
        low, high = curve(low / _FULL), curve(high / _FULL)
    factor = 255 / (float(high) - float(low)) if high > low else 0
    grey_M = np.empty(values_M.size, np.uint8)
    for start in range(0, values_M.size, _BLOCK):
        block_M: np.ndarray = values_M[start : start + _BLOCK].astype(np.float64)
        if curve is not None:
            block_M = np.asarray(curve(block_M / _FULL))
        grey_M[start : start + _BLOCK] = np.clip(np.round((block_M - float(low)) * factor), 0, 255)
    return grey_M.reshape(values_HW.shape)
