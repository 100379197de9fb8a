"""Copies are found whatever was done to them, and images of different patients are none."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from conftest import CT_IMAGES
from near_copies import jpeg, rescaled, shifted, windowed
from PIL import Image, ImageOps

from lungct_tune.data import group_overlap, make_phantoms, read_images, split_images
from lungct_tune.data.copies import PRINT, WAYS, Copy, find_copies

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 30": lambda image: jpeg(image, 30),
    "half as large": lambda image: rescaled(image, 0.5),
    "1.7 times as large": lambda image: rescaled(image, 1.7),
    "flipped left-right": ImageOps.mirror,
    "flipped top-bottom": ImageOps.flip,
    "turned by 180°": lambda image: ImageOps.flip(ImageOps.mirror(image)),
    "turned right by 90°": lambda image: image.transpose(Image.Transpose.ROTATE_270),
    "turned left by 90°": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned right by 90° and flipped left-right": lambda image: ImageOps.mirror(
        image.transpose(Image.Transpose.ROTATE_270)
    ),
    "turned left by 90° and flipped left-right": lambda image: ImageOps.mirror(
        image.transpose(Image.Transpose.ROTATE_90)
    ),
    "inverted": ImageOps.invert,
    "shifted": lambda image: shifted(image, 0.04, -0.03),
    "narrower window": lambda image: windowed(image, 0.05, 0.9, 1),
    "gamma": lambda image: windowed(image, 0, 1, 0.6),
}


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    """One slice of each of 40 phantom patients."""
    folder = make_phantoms(tmp_path_factory.mktemp("patients"), seed=3, patients=40, size=160)
    first = pd.read_csv(folder / "groups.csv").groupby("group")["path"].first()
    return [Image.open(folder / path).convert("L") for path in first]


def copies_among(images: list[Image.Image]) -> list[Copy]:
    prints = np.stack([np.asarray(image.resize((PRINT, PRINT), Image.Resampling.BILINEAR)) for image in images])
    names = [str(i) for i in range(len(images))]
    return find_copies(prints, names, names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_copy_is_found_and_nothing_else(patients: list[Image.Image], kind: str) -> None:
    found = copies_among(patients + [KINDS[kind](image) for image in patients[:20]])
    assert {(copy.first, copy.second) for copy in found} == {(i, 40 + i) for i in range(20)}
    assert {copy.kind for copy in found} == {"near-identical"}
    assert {copy.way for copy in found} == {kind if kind in WAYS else ""}
    assert {copy.is_inverted for copy in found} == {kind == "inverted"}
    assert all((copy.shift > 0.02) == (kind == "shifted") for copy in found)


@pytest.mark.parametrize("way", [way for way in WAYS if way])
def test_a_negative_of_half_the_height_is_found_whatever_way_it_was_turned(
    patients: list[Image.Image], way: str
) -> None:
    flat = [image.resize((image.width, image.height // 2)) for image in patients[:20]]
    changed = [ImageOps.invert(jpeg(KINDS[way](image), 60)) for image in flat]
    found = copies_among(flat + changed)
    assert [(copy.first, copy.second, copy.way, copy.is_inverted) for copy in found] == [
        (i, 20 + i, way, True) for i in range(20)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_different_patients_have_no_copies(tmp_path: Path, seed: int) -> None:
    folder = make_phantoms(tmp_path, seed=seed, patients=24, size=80)
    image_set = read_images(folder, 32, cache=tmp_path)
    patient_of = pd.read_csv(folder / "groups.csv").set_index("path")["group"]
    assert not [copy for copy in image_set.copies if patient_of[copy.path] != patient_of[copy.other]]


@pytest.mark.parametrize("seed", range(3))
def test_of_copies_changed_in_several_ways_at_once_nine_in_ten_are_found_and_nothing_else(
    patients: list[Image.Image], seed: int
) -> None:
    random = np.random.default_rng(seed)

    def change(image: Image.Image) -> Image.Image:
        image = shifted(image, *random.uniform(-0.03, 0.03, 2))
        image = windowed(image, random.uniform(0, 0.1), random.uniform(0.9, 1), 1)
        return jpeg(ImageOps.mirror(image) if random.random() < 0.5 else image, int(random.integers(60, 96)))

    found = {(copy.first, copy.second) for copy in copies_among(patients + [change(image) for image in patients])}
    planted = {(i, len(patients) + i) for i in range(len(patients))}
    assert found <= planted and len(found) >= 0.9 * len(planted)


def test_identical_ones_are_told_from_near_ones() -> None:
    prints = np.random.default_rng(0).integers(0, 256, (4, PRINT, PRINT), dtype=np.uint8)[[0, 1, 0, 0, 1]]
    found = find_copies(prints, ["a", "b", "a", "c", "d"], ["A", "B", "A", "A", "C"])
    assert [copy[:3] for copy in found] == [
        (0, 2, "byte-identical"),
        (0, 3, "pixel-identical"),
        (1, 4, "near-identical"),
    ]


def test_images_of_one_grey_are_like_identical_ones_only() -> None:
    prints = np.stack([np.full((PRINT, PRINT), grey, np.uint8) for grey in (0, 0, 7, 255)])
    found = find_copies(prints, ["a", "a", "b", "c"], ["A", "A", "B", "C"])
    assert [copy[:3] for copy in found] == [(0, 1, "byte-identical")]


def test_few_images_are_no_special_case(patients: list[Image.Image]) -> None:
    assert find_copies(np.empty((0, PRINT, PRINT), np.uint8), [], []) == []
    assert copies_among(patients[:1]) == copies_among(patients[:2]) == []


def test_the_more_copies_of_an_image_the_more_pairs_but_one_set(patients: list[Image.Image]) -> None:
    """More copies of an image than neighbours are looked at."""
    found = copies_among(patients + [jpeg(patients[7], quality) for quality in range(50, 90, 2)])
    reached = {7}
    for _ in range(20):
        reached |= {i for copy in found if reached & {copy.first, copy.second} for i in (copy.first, copy.second)}
    assert reached == {7, *range(40, 60)}


@pytest.mark.parametrize(
    "kind", ["half as large", "flipped top-bottom", "turned left by 90°", "inverted", "shifted", "narrower window"]
)
@pytest.mark.parametrize("where", ["train", "test"])
def test_no_grouped_split_parts_copies_and_the_official_one_counts_them(tmp_path: Path, kind: str, where: str) -> None:
    folder = make_phantoms(tmp_path, seed=5, patients=12, size=96)
    (folder / "groups.csv").unlink()
    original = next((folder / "train" / "normal").glob("*.png"))
    copy = folder / where / "normal" / "copy.png"
    KINDS[kind](Image.open(original).convert("L")).save(copy)
    image_set = read_images(folder, 32, cache=tmp_path)
    group_of = image_set.table.set_index("path")["group"]
    paths = [path.relative_to(folder).as_posix() for path in (original, copy)]
    assert group_of[paths[0]] == group_of[paths[1]]
    assert not group_overlap(image_set, split_images(image_set, "grouped", 0)).any()
    official = split_images(image_set, "official", 0)
    tests = image_set.table["path"].to_numpy()[official == "test"]
    twins = tests[group_overlap(image_set, official)]
    assert (paths[1] in twins) == (where == "test")


def test_a_changed_copy_under_another_class_is_a_conflict(tmp_path: Path) -> None:
    folder = make_phantoms(tmp_path, seed=5, patients=12, size=96)
    original = next((folder / "train" / "normal").glob("*.png"))
    copy = next(path for path in (folder / "valid").iterdir() if path.name.startswith("adeno")) / "copy.png"
    ImageOps.mirror(Image.open(original).convert("L")).save(copy)
    image_set = read_images(folder, 32, cache=tmp_path)
    paths = [path.relative_to(folder).as_posix() for path in (original, copy)]
    (conflict,) = image_set.conflicts
    assert set(paths) <= set(conflict)
    assert not set(conflict) & set(image_set.table["path"])


@pytest.mark.skipif(not CT_IMAGES.is_dir(), reason=f"the real CT images are not at {CT_IMAGES}")
def test_the_copies_of_the_published_images() -> None:
    image_set = read_images(CT_IMAGES, 64)
    assert image_set.conflicts == [
        (
            "train/large.cell.carcinoma_left.hilum_T2_N2_M0_IIIa/l4.png",
            "train/squamous.cell.carcinoma_left.hilum_T1_N2_M0_IIIa/sq2.png",
        )
    ]
    table = image_set.table
    assert len(table) == 683
    is_train = (table["folder"] == "train").to_numpy()
    with_twin = table[is_train & table["digest"].isin(table["digest"][~is_train])]
    assert len(with_twin) == 34
    assert {image_set.classes[label] for label in with_twin["label"]} == {"normal"}
    # 466 by likeness alone; the others are joined by copies, all of which are named like copies
    assert table["group"].nunique() == 462
    (at_series,) = [count for threshold, count in image_set.group_counts if threshold == 0.9]
    assert at_series == 462
    between = [c for c in image_set.copies if c.class_name != c.other_class and c.kind == "near-identical"]
    assert between == []


def test_copies_are_found_while_processes_are_forked() -> None:
    """Found: a search ended with "Work item submitted after shutdown" when Ray started while images were compared."""
    noise_NHW = np.random.default_rng(0).integers(0, 256, (40, PRINT, PRINT), dtype=np.uint8)
    names = [str(number) for number in range(len(noise_NHW))]
    with ThreadPoolExecutor(1) as thread:
        comparing = [thread.submit(find_copies, noise_NHW, names, names) for _ in range(10)]
        while not comparing[-1].done():  # Python forks only if there is a preexec_fn, as Ray has; else it calls vfork
            subprocess.run(["true"], check=True, preexec_fn=lambda: None)
    assert [future.result() for future in comparing] == [[]] * 10
