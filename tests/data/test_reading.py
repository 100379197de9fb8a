"""Each kind of file that the documentation lists is read as the same slice stored plainly, or refused with a reason."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from lungct_tune.data.decode import PLAIN, decode, read_file
from lungct_tune.data.grey import read_grey

SIDE = 64


def a_slice() -> np.ndarray:
    """(SIDE, SIDE) uint8: unlike itself turned or mirrored, with enough black and white for the percentiles."""
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    slice_HW = np.array(coarse)
    slice_HW[:4], slice_HW[4:6, :40] = 0, 255
    return slice_HW


SLICE = a_slice()
DEEP = SLICE.astype(np.uint16) * 16  # 12 of 16 bits, as scanners write them


def png(
    path: Path, depth: int, colour: int, rows: list[bytes], *chunks: tuple[bytes, bytes], interlace: int = 0
) -> None:
    """A PNG that Pillow cannot write itself."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, interlace)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    content = chunk(b"IHDR", header) + b"".join(chunk(*extra) for extra in chunks) + chunk(b"IDAT", data)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))


def deep_png(path: Path, colour: int, channels: list[np.ndarray], *chunks: tuple[bytes, bytes]) -> None:
    values_HWC = np.stack(channels, axis=2).astype(">u2")
    png(path, 16, colour, [row.tobytes() for row in values_HWC], *chunks)


def tiff(path: Path, content: bytes, order: str = "<", **tags: tuple[int, ...] | int) -> None:
    """A TIFF of one strip for each plane, uncompressed."""
    numbers = {
        "width": 256,
        "height": 257,
        "bits": 258,
        "compression": 259,
        "photometric": 262,
        "offsets": 273,
        "samples": 277,
        "rows": 278,
        "counts": 279,
        "planar": 284,
        "sample_format": 339,
    }
    given = {"width": SIDE, "height": SIDE, "compression": 1, "samples": 1, "rows": SIDE, **tags}
    strips = given["samples"] if given.get("planar") == 2 else 1
    given["counts"] = (len(content) // strips,) * strips
    given["offsets"] = tuple(8 + i * given["counts"][0] for i in range(strips))
    entries, beyond = [], b""
    start = 8 + len(content)
    table = start + 2 + 12 * len(given) + 4
    for name, value in sorted(given.items(), key=lambda item: numbers[item[0]]):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(packed) > 4:
            place = struct.pack(f"{order}I", table + len(beyond))
            beyond += packed
        else:
            place = packed
        entries.append(struct.pack(f"{order}HHI", numbers[name], 4, len(values)) + place)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + struct.pack(f"{order}I", 0)
    path.write_bytes(head + content + directory + beyond)


def with_orientation(path: Path, orientation: int, format: str, image: Image.Image) -> None:
    """A slice as a camera stores it that was held in another way."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions
    stored = image.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 100, "lossless": True} if format != "TIFF" else {}
    stored.save(path, format=format, exif=exif, **options)


def palette(path: Path) -> None:
    """Grey 3 is stored as number 252, and so on."""
    image = Image.fromarray(255 - SLICE).convert("P")
    image.putpalette([value for grey in range(255, -1, -1) for value in (grey, grey, grey)])
    image.save(path, "PNG")


def page_with_thumbnail(path: Path) -> None:
    image = Image.fromarray(SLICE)
    thumbnail = image.resize((8, 8))
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    image.save(path, "TIFF", save_all=True, append_images=[thumbnail])


def save(mode: str, format: str, **options: object) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(SLICE).convert(mode).save(path, format=format, **options)


def array(values: np.ndarray, format: str) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(values).save(path, format=format)


def big(values: np.ndarray) -> bytes:
    return values.astype(">u2").tobytes()


def gamma_profile(gamma: float, space: bytes = b"GRAY") -> bytes:
    """An ICC profile (version 2) of greys with one power as its curve."""
    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(gamma * 256), 0)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)  # D50
    table = struct.pack(">I4sII4sII", 2, b"kTRC", 156, len(curve), b"wtpt", 156 + len(curve), len(white))
    size = 128 + len(table) + len(curve) + len(white)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02200000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + curve + white


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SHOWN = SLICE / 255.0
IN_LIGHT = np.where(SHOWN <= 0.04045, SHOWN / 12.92, ((SHOWN + 0.055) / 1.055) ** 2.4)
IN_LIGHT_OF_1_8 = np.round(255 * IN_LIGHT ** (1 / 1.8)).astype(np.uint8)  # with 8 bits a power of 1 loses dark greys
RGB16 = np.stack([DEEP] * 3, axis=2)
LINEAR = np.round(65535 * (SLICE / 255.0) ** 2.2)
READ: dict[str, Callable[[Path], None]] = {
    "PNG, grey": save("L", "PNG"),
    "PNG, colours": save("RGB", "PNG"),
    "PNG, palette": palette,
    "PNG, palette of 4 bits": lambda path: png(
        path,
        4,
        3,
        [bytes(row[0::2] // 17 * 16 + row[1::2] // 17) for row in SLICE // 17 * 17],
        (b"PLTE", bytes(17 * (i // 3) for i in range(48))),
    ),
    "PNG, transparency": save("RGBA", "PNG"),
    "PNG, grey and transparency": save("LA", "PNG"),
    "PNG, 16-bit grey": array(DEEP, "PNG"),
    "PNG, 16-bit grey and transparency": lambda path: deep_png(path, 4, [DEEP, np.full_like(DEEP, 65535)]),
    "PNG, 16-bit colours": lambda path: deep_png(path, 2, [DEEP] * 3),
    "PNG, 16-bit colours and transparency": lambda path: deep_png(path, 6, [DEEP] * 3 + [np.full_like(DEEP, 65535)]),
    "PNG, 16-bit grey with a transparent value": lambda path: deep_png(
        path, 0, [DEEP], (b"tRNS", struct.pack(">H", 0))
    ),
    "PNG, 16-bit colours with a transparent colour": lambda path: deep_png(
        path, 2, [DEEP] * 3, (b"tRNS", struct.pack(">HHH", 0, 0, 0))
    ),
    "PNG, gamma of a screen": lambda path: png(
        path, 8, 0, [row.tobytes() for row in SLICE], (b"gAMA", struct.pack(">I", 45455))
    ),
    "PNG, linear light": lambda path: deep_png(path, 0, [LINEAR], (b"gAMA", struct.pack(">I", 100000))),
    "PNG, sRGB before gamma": lambda path: png(
        *(path, 8, 0, [row.tobytes() for row in SLICE]),
        (b"sRGB", b"\0"),
        (b"gAMA", struct.pack(">I", 100000)),
    ),
    "PNG, profile of the screen": save("RGB", "PNG", icc_profile=SRGB),
    "PNG, grey with a profile of the screen's colours": save("L", "PNG", icc_profile=SRGB),
    "PNG, profile": lambda path: Image.fromarray(IN_LIGHT_OF_1_8).save(path, "PNG", icc_profile=gamma_profile(1.8)),
    "PNG, 16 bits, profile": lambda path: Image.fromarray(
        np.round(65535 * IN_LIGHT ** (1 / 1.8)).astype(np.uint16)
    ).save(path, "PNG", icc_profile=gamma_profile(1.8)),
    "TIFF, profile": lambda path: Image.fromarray(IN_LIGHT_OF_1_8).save(path, "TIFF", icc_profile=gamma_profile(1.8)),
    "JPEG, profile": lambda path: Image.fromarray(IN_LIGHT_OF_1_8).save(
        path, "JPEG", quality=100, icc_profile=gamma_profile(1.8)
    ),
    "TIFF, floats with a profile": lambda path: Image.fromarray(SLICE.astype(np.float32)).save(
        path, "TIFF", icc_profile=gamma_profile(1.8)
    ),
    "JPEG, grey": save("L", "JPEG", quality=100),
    "JPEG, colours": save("RGB", "JPEG", quality=100, subsampling=0),
    "JPEG, CMYK": save("CMYK", "JPEG", quality=100, subsampling=0),
    "BMP": save("RGB", "BMP"),
    "BMP, palette": save("L", "BMP"),
    "GIF": save("L", "GIF"),
    "WebP": save("RGB", "WEBP", lossless=True),
    "TIFF": save("L", "TIFF"),
    "TIFF, compressed": save("RGB", "TIFF", compression="tiff_lzw"),
    "TIFF, white is zero": lambda path: tiff(path, (255 - SLICE).tobytes(), bits=8, photometric=0),
    "TIFF, 16 bits, white is zero": lambda path: tiff(path, (4080 - DEEP).tobytes(), bits=16, photometric=0),
    "TIFF, 16-bit grey": array(DEEP, "TIFF"),
    "TIFF, 16-bit grey, other byte order": lambda path: tiff(path, big(DEEP), ">", bits=16, photometric=1),
    "TIFF, 16 bits with sign": lambda path: tiff(
        path, (DEEP.astype(np.int16) - 1024).tobytes(), bits=16, photometric=1, sample_format=2
    ),
    "TIFF, 32 bits": array(SLICE.astype(np.int32) * 1000 - 99, "TIFF"),
    "TIFF, 32 bits without sign": lambda path: tiff(
        path, (SLICE.astype(np.uint32) * 16_000_000).tobytes(), bits=32, photometric=1, sample_format=1
    ),
    "TIFF, floats": array(SLICE.astype(np.float32) / 255, "TIFF"),
    "TIFF, separate planes": lambda path: tiff(
        path, SLICE.tobytes() * 3, bits=(8, 8, 8), photometric=2, samples=3, planar=2
    ),
    "TIFF, separate planes of 16 bits": lambda path: tiff(
        path, DEEP.tobytes() * 3, bits=(16, 16, 16), photometric=2, samples=3, planar=2
    ),
    "TIFF, 16-bit colours": lambda path: tiff(path, RGB16.tobytes(), bits=(16, 16, 16), photometric=2, samples=3),
    "TIFF, 16-bit colours, other byte order": lambda path: tiff(
        path, big(RGB16), ">", bits=(16, 16, 16), photometric=2, samples=3
    ),
    "TIFF, a page and its thumbnail": page_with_thumbnail,
    **{
        f"{format}, orientation {n}": (
            lambda path, n=n, format=format: with_orientation(path, n, format, Image.fromarray(SLICE))
        )
        for format in ("JPEG", "PNG", "WEBP", "TIFF")
        for n in range(2, 9)
    },
}


@pytest.mark.parametrize("kind", READ)
def test_a_file_is_read_as_the_same_slice_stored_plainly(tmp_path: Path, kind: str) -> None:
    READ[kind](tmp_path / "x")
    expected_HW = SLICE // 17 * 17 if "4 bits" in kind else SLICE
    difference_HW = np.abs(decode(tmp_path / "x", SIDE).image_HW.astype(int) - expected_HW)
    assert difference_HW.max() <= (9 if "JPEG" in kind else 2)


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "32 bits", "floats", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_slice_that_is_not_square_is_turned_upright(tmp_path: Path, orientation: int, kind: str) -> None:
    """Pillow maps an uncompressed TIFF into memory, and took the height of one that is turned for its width."""
    oblong_HW = SLICE[:, :40]
    values = {
        "16 bits": oblong_HW.astype(np.uint16) * 16,
        "32 bits": oblong_HW.astype(np.int32) * 1000 - 99,
        "floats": oblong_HW.astype(np.float32) / 255,
    }.get(kind, oblong_HW)
    image = Image.fromarray(values)
    image = image.convert(kind) if kind in ("RGBA", "CMYK") else image
    with_orientation(tmp_path / "x", orientation, "TIFF", image)
    grey, mode, _ = read_file(tmp_path / "x")
    assert grey.size == (40, SIDE) and mode.endswith(" turned")
    assert np.abs(np.asarray(grey).astype(int) - oblong_HW).max() <= 2


def frames(format: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        first, *others = (Image.fromarray(np.roll(SLICE, n, axis=0)) for n in range(3))
        first.save(path, format=format, save_all=True, append_images=others)

    return write


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "TIFF, pages": (frames("TIFF"), "several frames"),
    "GIF, frames": (frames("GIF"), "several frames"),
    "PNG, frames": (frames("PNG"), "several frames"),
    "WebP, frames": (frames("WEBP"), "several frames"),
    "JPEG, several images": (frames("MPO"), "several frames"),
    "TIFF, 16-bit CMYK": (
        lambda path: tiff(
            path, np.stack([DEEP] * 4, axis=2).tobytes(), bits=(16, 16, 16, 16), photometric=5, samples=4
        ),
        "CMYK;16L are not read",
    ),
    "PNG, damaged profile": (save("L", "PNG", icc_profile=b"no profile"), "colour profile cannot be used"),
    "JPEG 2000": (save("L", "JPEG2000"), "not an image in one of the formats"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_would_be_read_in_part_or_wrongly_is_refused(tmp_path: Path, kind: str) -> None:
    write, message = REFUSED[kind]
    write(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        decode(tmp_path / "x", SIDE)


def test_a_profile_that_is_not_applied_is_named(tmp_path: Path) -> None:
    values = SLICE.astype(np.float32)
    for name, profile, mode in (("none", None, "F"), ("grey", gamma_profile(1.8), "F profile not applied")):
        Image.fromarray(values).save(tmp_path / name, "TIFF", icc_profile=profile)
        assert decode(tmp_path / name, SIDE).properties.mode == mode
    Image.fromarray(SLICE).save(tmp_path / "lab", "PNG", icc_profile=gamma_profile(1.8, b"Lab "))
    assert decode(tmp_path / "lab", SIDE).properties.mode == "L profile not applied"


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((SIDE, SIDE, 4), np.uint8),
        np.full((SIDE, SIDE), 7, np.uint8),
        np.full((SIDE, SIDE), 900, np.uint16),
        np.where(np.arange(SIDE * SIDE).reshape(SIDE, SIDE) < 4, 255, 0).astype(np.uint8),
    ],
)
def test_an_image_without_content_is_told(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png", SIDE).is_plain
    assert 1 - 4 / SIDE**2 >= PLAIN


def test_a_pixel_of_metal_changes_no_other_grey() -> None:
    metal = DEEP.copy()
    metal[30, 30] = 65535
    with_metal, without = (np.asarray(read_grey(Image.fromarray(values)).image).astype(int) for values in (metal, DEEP))
    assert with_metal[30, 30] == 255
    with_metal[30, 30] = without[30, 30]
    assert np.abs(with_metal - without).max() <= 2


@pytest.mark.parametrize("where", ["pipe", "/dev/zero", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, where: str) -> None:
    path = Path(where) if where.startswith("/") else tmp_path / where
    if where == "pipe":
        os.mkfifo(path)
    elif where == "folder":
        path.mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        decode(path, SIDE)
