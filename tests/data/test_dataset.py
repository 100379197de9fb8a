"""Images are found whatever their folders are called, decoded whatever they are, and only once."""

from __future__ import annotations

import errno
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lungct_tune.data import DataError, ImageSet, read_images
from lungct_tune.data.decode import Decoded, decode
from lungct_tune.errors import UserError

FOUR = ("adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma")
PUBLISHED = (
    "adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib",
    "large.cell.carcinoma_left.hilum_T2_N2_M0_IIIa",
    "normal",
    "squamous.cell.carcinoma_left.hilum_T1_N2_M0_IIIa",
)


def picture(seed: int, side: int = 40) -> Image.Image:
    """Coarse noise: unlike the picture of any other seed, and still itself after recompression."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def save(path: Path, seed: int, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **options)
    return path


def two_classes(root: Path, *, images: int = 2) -> Path:
    for number, name in enumerate(("normal", "adenocarcinoma")):
        for i in range(images):
            save(root / name / f"{i}.png", 100 * number + i)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lungct_tune"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "images"


def pixels_of(image_set: ImageSet, path: str) -> np.ndarray:
    return image_set.images_NHW[image_set.table["path"].tolist().index(path)]


# Finding


@pytest.mark.parametrize(
    "spelling",
    [
        FOUR,
        PUBLISHED,
        ("Adenocarcinoma", "Large Cell Carcinoma", "Normal", "Squamous Cell Carcinoma"),
        ("ADENOCARCINOMA", "large_cell_carcinoma", "NORMAL", "squamous_cell_carcinoma_left.hilum_T1"),
        ("adenocarcinoma_T2", "LargeCellCarcinoma", "normal_", "squamous-cell-carcinoma"),
    ],
)
def test_class_folders_are_recognised_in_any_spelling(root: Path, spelling: tuple[str, ...]) -> None:
    for i, name in enumerate(spelling):
        save(root / name / "1.png", i)
    image_set = read_images(root, 16)
    assert image_set.classes == FOUR
    assert [image_set.classes[label] for label in image_set.table["label"]] == [
        FOUR[spelling.index(path.split("/")[0])] for path in image_set.table["path"]
    ]


@pytest.mark.parametrize("between", ["", "Data/"])
@pytest.mark.parametrize("split_folders", [("train", "valid", "test"), ("Training", "validation", "TESTING")])
def test_split_folders_are_recognised_with_and_without_data_in_between(
    root: Path, between: str, split_folders: tuple[str, ...]
) -> None:
    for i, split in enumerate(split_folders):
        save(root / f"{between}{split}/normal/patient 1/a.png", 2 * i)
        save(root / f"{between}{split}/adenocarcinoma/b.png", 2 * i + 1)
    table = read_images(root, 16).table
    assert sorted(zip(table["path"], table["folder"], strict=True)) == sorted(
        (f"{between}{folder}/{file}", split)
        for folder, split in zip(split_folders, ("train", "valid", "test"), strict=True)
        for file in ("normal/patient 1/a.png", "adenocarcinoma/b.png")
    )


def test_bare_class_folders_have_no_published_split(root: Path) -> None:
    assert set(read_images(two_classes(root), 16).table["folder"]) == {""}


def test_files_that_are_clearly_no_images_are_ignored(root: Path) -> None:
    two_classes(root)
    for name in (".DS_Store", "Thumbs.db", "README", "readme.md", "labels.csv", "._0.png", "__MACOSX/0.png"):
        for folder in (root, root / "normal"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("not an image")
    assert len(read_images(root, 16).table) == 4


def test_unknown_classes_are_refused_with_what_was_found_and_how_to_map(root: Path) -> None:
    two_classes(root)
    save(root / "Malignant cases" / "1.png", 7)
    with pytest.raises(DataError, match=r"Malignant cases/ \(1 image\)[\s\S]*--class-map"):
        read_images(root, 16)


def test_class_map_opens_the_door_to_other_data_sets(root: Path) -> None:
    for i, name in enumerate(("Bengin cases", "Malignant_cases", "LCC")):
        save(root / name / "1.png", i)
    class_map = {"bengin cases": "benign", "malignant.cases": "malignant", "lcc": "Large.Cell.Carcinoma"}
    assert read_images(root, 16, class_map=class_map).classes == (
        "benign",
        "large cell carcinoma",
        "malignant",
    )


def test_a_sign_makes_another_number_and_is_else_refused_where_it_would_make_another_class(root: Path) -> None:
    """Found: -1=normal,1=cancer and nodule-=normal,nodule+=cancer were one class each."""
    for i, name in enumerate(("-1", "1", "1.5", "15")):
        save(root / name / "1.png", i)
    class_map = {"1": "one", "-1": "minus one", "15": "many", "1.5": "one and a half"}
    images = read_images(root, 16, class_map=class_map)
    named = {
        path: images.classes[label] for path, label in zip(images.table["path"], images.table["label"], strict=True)
    }
    assert named == {f"{folder}/1.png": name for folder, name in class_map.items()}
    with pytest.raises(UserError, match=r"'nodule-' as normal, and as cancer a name that differs only in"):
        read_images(root, 16, class_map={"nodule+": "cancer", "nodule-": "normal"})


def test_a_class_map_with_a_folder_that_is_not_there_is_refused(root: Path) -> None:
    two_classes(root)
    read_images(root, 16, class_map={"Normal": "healthy", "large cell carcinoma": "adenocarcinoma"})
    with pytest.raises(DataError) as refused:
        read_images(root, 16, class_map={"Normals": "other", "foo": "normal", "normal": "normal"})
    assert f"no class folder in {root} is called 'Normals' (did you mean normal?), 'foo'; there are" in str(
        refused.value
    )
    assert "--class-map (for evaluate: --map)" in str(refused.value)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([], "found no images"),
        (["normal/1.png"], "only the class 'normal'"),
        (["normal/1.png", "adenocarcinoma/"], "adenocarcinoma/ in .* holds no images"),
        (["normal/a/Squamous_Cell_Carcinoma/1.png"], "of another class, Squamous_Cell_Carcinoma/"),
        (
            ["normal/adenocarcinoma/1.png", "adenocarcinoma/1.png"],
            "normal/ in .* has a folder of another class, adenocarcinoma/; move",
        ),
        (["normal/1.png", "adenocarcinoma/1.png", "2.png"], "in no class folder, such as '2.png'"),
        (["train/normal/1.png", "train/adenocarcinoma/1.png", "train/2.png"], "in no class folder"),
        (["train/normal/1.png", "train/adenocarcinoma/1.png", "2.png"], "images has 1 file in no class folder"),
        (["train/normal/1.png", "adenocarcinoma/1.png"], "keep either split folders or class folders"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(root: Path, layout: list[str], message: str) -> None:
    root.mkdir()
    for i, name in enumerate(layout):
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            save(root / name, i)
    with pytest.raises(DataError, match=message):
        read_images(root, 16)


def test_a_missing_folder_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_images(root, 16)


# Decoding


def test_the_suffix_does_not_matter(root: Path) -> None:
    two_classes(root)
    save(root / "normal/jpeg inside.png", 5, format="JPEG", quality=95)
    save(root / "normal/bitmap inside.jpg", 6, format="BMP")
    image_set = read_images(root, 40)
    for name, seed in (("jpeg inside.png", 5), ("bitmap inside.jpg", 6)):
        difference = pixels_of(image_set, f"normal/{name}").astype(int) - np.asarray(picture(seed))
        assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"])
def test_every_mode_becomes_the_same_8_bit_grey(root: Path, mode: str) -> None:
    two_classes(root)
    grey = picture(3)
    if mode == "1":
        grey = grey.convert("1").convert("L")
    values = np.asarray(grey)
    images = {
        "P": lambda: grey.convert("RGB").quantize(256),
        "I": lambda: Image.fromarray(values.astype(np.int32) * 100_000 - 7_000_000),
        "I;16": lambda: Image.fromarray(values.astype(np.uint16) * 16),  # a 12-bit slice in a 16-bit file
        "F": lambda: Image.fromarray(values.astype(np.float32) / 255),
    }
    images.get(mode, lambda: grey.convert(mode))().save(root / "normal/x.tif", format="TIFF")
    stretched = (values - float(values.min())) * 255 / (int(values.max()) - int(values.min()))
    expected = stretched if mode[0] in "IF" else values
    got = pixels_of(read_images(root, 40), "normal/x.tif")
    assert got.dtype == np.uint8
    assert np.abs(got - expected).max() <= 2


def test_transparency_is_composited_over_black(root: Path) -> None:
    two_classes(root)
    image = picture(3).convert("RGBA")
    image.paste((255, 255, 255, 0), (0, 0, 20, 40))
    image.save(root / "normal/x.png")
    got = pixels_of(read_images(root, 40), "normal/x.png")
    assert (got[:, :20] == 0).all()
    assert (got[:, 20:] == np.asarray(picture(3))[:, 20:]).all()


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header promises width times height pixels."""
    buffer = io.BytesIO()
    picture(1).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def broken_files(folder: Path) -> dict[str, bytes]:
    png = save(folder / "whole.png", 50).read_bytes()
    jpeg = save(folder / "whole.jpg", 51).read_bytes()
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty.png": b"",
        "text.png": b"this is no picture",
        "truncated.png": png[: len(png) // 2],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "flipped byte.png": bytes(flipped),
        "bomb.png": png_claiming(60_000, 60_000),
        "half a bomb.png": png_claiming(10_000, 10_000),
    }


def test_unreadable_files_stop_the_run_and_are_all_named(root: Path) -> None:
    two_classes(root)
    broken = broken_files(root / "normal")
    for name, content in broken.items():
        (root / "normal" / name).write_bytes(content)
    (root / "normal/dangling.png").symlink_to(root / "nowhere")
    names = {f"normal/{name}" for name in [*broken, "dangling.png"]}
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=r"8 files [\s\S]*--skip-unreadable") as error:
            read_images(root, 16)
        assert all(name in str(error.value) for name in names)

    image_set = read_images(root, 16, skip_unreadable=True)
    assert {path for path, _ in image_set.unreadable} == names
    assert all(reason for _, reason in image_set.unreadable)
    assert dict(image_set.unreadable)["normal/empty.png"] == "empty file"
    assert len(image_set.images_NHW) == len(image_set.table) == 6
    assert not names & set(image_set.table["path"])
    np.testing.assert_array_equal(
        pixels_of(image_set, "normal/whole.png"),
        np.asarray(picture(50).resize((16, 16), Image.Resampling.BILINEAR)),
    )


def test_many_unreadable_files_are_counted(root: Path) -> None:
    two_classes(root)
    for i in range(25):
        (root / "normal" / f"broken {i}.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"25 files [\s\S]* and 5 more"):
        read_images(root, 16)


def test_a_class_that_loses_all_its_images_is_an_error(root: Path) -> None:
    two_classes(root)
    (root / "squamous cell carcinoma").mkdir()
    (root / "squamous cell carcinoma/x.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no usable image of squamous cell carcinoma"):
        read_images(root, 16, skip_unreadable=True)


# The cache


def test_the_second_reading_takes_everything_from_the_cache(root: Path, cache: Path) -> None:
    first = read_images(two_classes(root), 16)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    second = read_images(root, 16)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert len(before) == 2  # and no scratch is left
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.images_NHW, first.images_NHW)


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_a_damaged_cache_is_rebuilt(root: Path, cache: Path, suffix: str, damage: str) -> None:
    expected = np.array(read_images(two_classes(root), 16).images_NHW)
    (file,) = cache.glob(f"*{suffix}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.unlink()
    if damage != "removed":
        file.write_bytes(content if damage == "flipped" else content[:20])
    np.testing.assert_array_equal(read_images(root, 16).images_NHW, expected)


@pytest.mark.parametrize("lost", ["sha256", "copies", "plain"])
def test_a_cache_entry_that_lacks_something_is_rebuilt(root: Path, cache: Path, lost: str) -> None:
    expected = read_images(two_classes(root), 16).fingerprint
    (file,) = cache.glob("*.json")
    file.write_text(json.dumps({name: found for name, found in json.loads(file.read_text()).items() if name != lost}))
    assert read_images(root, 16).fingerprint == expected


def test_a_cache_larger_than_an_images_file_may_be_is_checked_too(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungct_tune.data.cache.MOST_BYTES", 10_000)
    expected = np.array(read_images(two_classes(root), 64).images_NHW)
    (pixels,) = cache.glob("*.npy")
    assert pixels.stat().st_size > 10_000
    pixels.write_bytes(pixels.read_bytes()[:-5000])
    np.testing.assert_array_equal(read_images(root, 64).images_NHW, expected)


def test_pixels_are_memory_mapped_and_read_only(root: Path) -> None:
    images_NHW = read_images(two_classes(root), 16).images_NHW
    assert isinstance(images_NHW, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images_NHW[0] = 0


def test_the_fingerprint_follows_content_names_classes_and_size(root: Path) -> None:
    two_classes(root)
    seen = {read_images(root, 16).fingerprint, read_images(root, 24).fingerprint}
    save(root / "normal/0.png", 77)
    seen.add(read_images(root, 16).fingerprint)
    (root / "normal/0.png").rename(root / "normal/z.png")
    seen.add(read_images(root, 16).fingerprint)
    (root / "normal").rename(root / "large cell carcinoma")
    seen.add(read_images(root, 16).fingerprint)
    assert len(seen) == 5


@pytest.mark.parametrize("failure", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_a_file_that_can_be_read_again_is_read_again(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    two_classes(root)

    def fail_once(path: Path, *arguments: Any) -> Decoded:
        if path.match("normal/1.png"):
            raise failure
        return decode(path, *arguments)

    monkeypatch.setattr("lungct_tune.data.cache.decode", fail_once)
    image_set = read_images(root, 40, skip_unreadable=True)
    assert [path for path, _ in image_set.unreadable] == ["normal/1.png"] and not list(cache.iterdir())
    np.testing.assert_array_equal(pixels_of(image_set, "normal/0.png"), np.asarray(picture(0)))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    assert len(read_images(root, 40).table) == 4 and len(list(cache.iterdir())) == 2


def test_a_file_that_could_not_be_opened_at_first_is_no_copy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a digest two files would pass for identical."""
    two_classes(root)
    monkeypatch.setattr("lungct_tune.data.dataset.file_digest", lambda path: "" if path.name == "0.png" else path.name)
    with pytest.raises(DataError, match=r"normal/0\.png: it could not be read at first; run the command again"):
        read_images(root, 16)


def test_a_cache_folder_that_cannot_be_used_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        read_images(two_classes(root), 16, cache=tmp_path / "file" / "cache")
