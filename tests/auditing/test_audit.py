"""The audit says what is wrong with images and split, and nothing where nothing is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import CT_IMAGES
from PIL import Image, ImageOps
from pydantic import TypeAdapter
from test_shortcuts import an_image_set

from lungct_tune import search
from lungct_tune.audit import main
from lungct_tune.auditing.audit import audit_images, refuse_leaks, too_alike
from lungct_tune.auditing.findings import Audit
from lungct_tune.data import DataError, fold_images, make_phantoms, read_images
from lungct_tune.data.split import DataSplit, read_split
from lungct_tune.reporting.html import pairs_of_copies


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """60 images of 20 phantom patients, no patient in two parts, no two slices so near that they pass for copies."""
    return make_phantoms(tmp_path, seed=2, patients=20, size=64)


def read_audit(content: dict[str, Any]) -> Audit:
    audit: Audit = TypeAdapter(Audit).validate_python(content)
    return audit


def audited(folder: Path, *arguments: str) -> dict[str, Any]:
    figures = folder.parent / "audit.json"
    assert main(["--data", str(folder), "--json", str(figures), "--image-size", "48", *arguments]) == 0
    audit: dict[str, Any] = json.loads(figures.read_text())
    return audit


def copy_across(folder: Path, images: int = 4) -> list[str]:
    """Copies images of train into valid, byte for byte; their paths in valid."""
    copied = []
    for path in sorted((folder / "train" / "normal").iterdir())[:images]:
        copied.append(shutil.copy(path, folder / "valid" / "normal" / f"copy-{path.name}"))
    return [Path(path).relative_to(folder).as_posix() for path in copied]


def test_what_was_done_to_a_copy_is_said(clean: Path) -> None:
    original, other, *_ = sorted((clean / "train" / "normal").iterdir())
    Image.open(original).convert("L").transpose(Image.Transpose.ROTATE_90).save(clean / "valid/normal/turned.png")
    ImageOps.invert(ImageOps.mirror(Image.open(other).convert("L"))).save(clean / "valid/normal/negative.png")
    pairs = audited(clean, "--split", "official")["copies"]["pairs"]
    changes = {pair["second"]["path"]: pair["change"] for pair in pairs}
    assert changes["valid/normal/turned.png"] == "turned left by 90°"
    assert changes["valid/normal/negative.png"] == "flipped left-right, inverted"


@pytest.mark.parametrize(("split", "seed"), [("official", 0), ("official", 1), ("grouped", 2)])
def test_clean_data_have_no_leak(tmp_path: Path, seed: int, split: str) -> None:
    audit = audited(make_phantoms(tmp_path, seed=seed, patients=20, size=64), "--split", split)
    assert audit["verdict"]["level"] != "leaks"
    assert audit["groups"]["cut_by_the_split"] == 0
    assert not any(across["with_copy"] for across in audit["copies"]["across"])
    assert audit["conflicts"] == []
    for health in audit["split_health"]:
        assert health["seen"] == 0


def test_copies_across_the_split_are_a_leak_and_counted(clean: Path) -> None:
    copied = copy_across(clean)
    shutil.copy(clean / copied[0], clean / "test" / "normal" / "copy.png")
    audit = audited(clean, "--split", "official")
    assert audit["verdict"]["level"] == "leaks"
    assert [(health["part"], health["seen"]) for health in audit["split_health"]] == [("valid", 4), ("test", 1)]
    assert not any(row["with_copy"] for row in audit["copies"]["inside"])
    across = {(row["part"], row["other"]): row for row in audit["copies"]["across"]}
    assert across["valid", "train"]["byte_identical"] == across["valid", "train"]["with_copy"] == len(copied)
    assert across["valid", "train"]["by_class"] == {"normal": 4}
    assert across["test", "train"]["with_copy"] == across["test", "valid"]["with_copy"] == 1
    shown = {pair[side]["path"] for pair in audit["copies"]["pairs"] for side in ("first", "second")}
    assert shown >= {*copied, "test/normal/copy.png"}
    assert any("4 are copies, byte for byte (4 normal)" in reason for reason in audit["verdict"]["reasons"])


def test_a_grouped_split_of_the_same_data_does_not_leak(clean: Path) -> None:
    copy_across(clean)
    audit = audited(clean, "--split", "grouped")
    assert audit["verdict"]["level"] != "leaks"
    assert audit["copies"]["pairs_by_kind"]["byte-identical"] == 4


def test_copies_inside_a_part_are_shown_and_are_no_leak(clean: Path) -> None:
    original = sorted((clean / "train" / "normal").iterdir())[0]
    Image.open(original).resize((50, 50)).save(original.with_name("small.png"))
    audit = audited(clean, "--split", "official")
    assert audit["verdict"]["level"] != "leaks"
    assert {row["part"]: row["by_class"] for row in audit["copies"]["inside"]}["train"] == {"normal": 2}
    (pair,) = audit["copies"]["pairs"]
    assert (pair["kind"], pair["change"]) == ("near-identical", "64x64 and 50x50 pixels")


def test_permuted_labels_prove_no_leak_where_there_is_none(clean: Path) -> None:
    audit = audited(clean, "--permuted")
    assert {run["part"] for run in audit["permuted"]} == {"valid", "test"}
    assert not any(run["proves_a_leak"] for run in audit["permuted"])


def test_permuted_labels_prove_a_leak_where_most_of_valid_stands_in_train(clean: Path) -> None:
    for folder in (clean / "train").iterdir():
        for path in folder.iterdir():
            shutil.copy(path, clean / "valid" / folder.name / f"copy-{path.name}")
    audit = audited(clean, "--split", "official", "--permuted")
    proofs = {(run["part"], run["rule"]) for run in audit["permuted"] if run["proves_a_leak"]}
    assert ("valid", "pixels") in proofs
    assert not any(part == "test" for part, _ in proofs)
    assert any(reason.startswith("Proof") for reason in audit["verdict"]["reasons"])
    assert "As a whole, valid is a near copy of train" in audit["verdict"]["reasons"][0]


def test_a_class_that_its_file_gives_away_is_named(clean: Path) -> None:
    for path in clean.glob("*/normal/*.png"):
        Image.open(path).resize((96, 64)).convert("RGB").save(path)
    audit = audited(clean)
    (found,) = [found for found in audit["shortcuts"]["given_away"] if "file" in found["by"]]
    assert found["class"] == "normal"
    assert found["auroc"] > 0.97
    assert any(reason.startswith("normal is recognised by the size") for reason in audit["verdict"]["reasons"])


def test_images_under_two_classes_and_files_that_are_something_else_are_named(clean: Path) -> None:
    original = sorted((clean / "train" / "normal").iterdir())[0]
    other = next(path for path in (clean / "train").iterdir() if path.name.startswith("adeno")) / "copy.png"
    shutil.copy(original, other)
    Image.open(sorted((clean / "test" / "normal").iterdir())[0]).save(clean / "test/normal/is.png", "JPEG")
    audit = audited(clean)
    (conflict,) = audit["conflicts"]
    assert conflict["classes"] == ["adenocarcinoma", "normal"]
    (pair, *_) = audit["copies"]["pairs"]
    assert {pair["first"]["split"], pair["second"]["split"]} == {"left out"}
    assert audit["inventory"]["not_what_the_suffix_says"] == [{"path": "test/normal/is.png", "format": "JPEG"}]


def test_strict_refuses_a_split_that_leaks(clean: Path) -> None:
    copy_across(clean)
    images = read_images(clean, 32, cache=clean.parent)
    folders = images.table["folder"].to_numpy(dtype=str)
    fold = fold_images(images, np.flatnonzero(folders != "test"), 2, 0)
    refuse_leaks(audit_images(images, DataSplit(images, folders, fold).parts, "official"))  # folds cut no group
    with pytest.raises(DataError, match=r"4 of .* valid images are copies .*--split grouped"):
        refuse_leaks(audit_images(images, folders, "official"))


def test_a_strict_search_ends_before_it_begins(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_across(clean)
    results = clean.parent / "results"
    arguments = [
        "--data",
        str(clean),
        "--split",
        "official",
        "--strict",
        "--weights",
        "none",
        "--storage",
        str(results),
    ]
    assert search.main([*arguments, "--image-size", "32"]) == 2
    said = capsys.readouterr()
    assert "--strict" in said.err
    assert "4 are copies, byte for byte" in said.out
    (hint,) = [line for line in said.out.splitlines() if "all of it: " in line]
    assert main(shlex.split(hint.partition("lungct_tune.audit ")[2])) == 0
    assert "4 are copies, byte for byte" in capsys.readouterr().out
    assert not results.exists()


def test_copy_numbers_join_what_is_a_copy_of_the_same(clean: Path) -> None:
    copied = copy_across(clean, 2)
    images = read_images(clean, 32, cache=clean.parent)
    numbers = pd.Series(images.copy_numbers(), index=images.table["path"])
    assert numbers.nunique() == len(numbers) - 2
    assert all(numbers[path] == numbers[path.replace("valid", "train").replace("copy-", "")] for path in copied)


def test_copies_across_a_split_file_are_a_leak_whatever_its_groups_say(clean: Path) -> None:
    copied = copy_across(clean, 2)
    images = read_images(clean, 32, cache=clean.parent)
    split_file = clean.parent / "split.csv"
    rows = pd.DataFrame({"path": images.table["path"], "split": images.table["folder"], "group": images.table["path"]})
    rows.to_csv(split_file, index=False)
    (health, _) = audited(clean, "--split-file", str(split_file))["split_health"]
    assert (health["part"], health["seen"]) == ("valid", len(copied))
    with pytest.raises(DataError, match="leaks"):
        refuse_leaks(audit_images(*read_split(images, split_file), "file"))


@pytest.mark.parametrize("folders", [("train", "valid"), ("train", "test")])
def test_parts_may_be_missing(clean: Path, folders: tuple[str, ...]) -> None:
    (clean / "groups.csv").unlink()
    for part in {"train", "valid", "test"} - set(folders):
        shutil.rmtree(clean / part)
    audit = audited(clean)
    assert audit["split"] == {"how": "official", "parts": list(folders)}
    assert [health["part"] for health in audit["split_health"]] == [folders[1]]


def test_bare_class_folders_are_split_as_a_search_would_or_audited_without_a_split(
    clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (clean / "groups.csv").unlink()
    for part in ("valid", "test"):
        shutil.rmtree(clean / part)
    for folder in (clean / "train").iterdir():
        folder.rename(clean / folder.name)
    (clean / "train").rmdir()
    assert audited(clean)["split"]["how"] == "grouped"
    assert main(["--data", str(clean), "--split", "official"]) == 2
    assert "choose --split grouped" in capsys.readouterr().err
    for path in sorted((clean / "normal").iterdir())[1:]:
        path.unlink()
    audit = audited(clean)
    assert audit["split"] == {"how": "no", "parts": ["unsplit"]}
    assert audit["verdict"]["headline"].startswith("These images cannot be split")
    assert "Images of normal: 1, in groups: 1" in " ".join(audit["verdict"]["reasons"])
    assert main(["--data", str(clean), "--split", "grouped", "--image-size", "48"]) == 2
    assert "--split official" not in capsys.readouterr().err


# The page


def test_the_page_needs_no_network_and_shows_the_pairs(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = copy_across(clean, 3)
    page = clean.parent / "audit.html"
    audit = audited(clean, "--html", str(page))
    text = page.read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|url\(|@import|<script", text)
    assert text.count("<img") == 2 * 3 == text.count("across the split</b>") * 2
    assert all(path in text for path in copied)
    said = capsys.readouterr().out
    for sentence in audit["verdict"]["reasons"]:
        assert sentence in said


def test_a_class_with_markup_in_its_name_is_shown_as_it_is(clean: Path) -> None:
    page = clean.parent / "audit.html"
    audited(clean, "--class-map", "normal=<b>[red]odd</b>", "--html", str(page))
    assert "<b>[red]odd" not in page.read_text()
    assert "&lt;b&gt;[red]odd" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere"], "data 'nowhere' is not a folder"),
        (["--data", ".", "--split", "odd"], "split = 'odd'"),
        (["--data", ".", "--image-size", "3"], "image_size = '3'"),
    ],
)
def test_slips_are_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_page_that_cannot_be_written_is_said(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(clean), "--image-size", "48", "--html", str(clean / "none" / "a.html")]) == 2
    assert f"there is no folder {clean}/none; make it first" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "name"), [("--html", "notes.html"), ("--json", "figures.json")])
def test_a_file_of_the_users_is_never_overwritten_and_an_audit_is(
    clean: Path, flag: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (own := clean.parent / name).write_text('{"mine": 1}')
    ask = ["--data", str(clean), "--image-size", "48", flag]
    assert main([*ask, str(own)]) == 2
    assert f"choose another {flag}" in capsys.readouterr().err and own.read_text() == '{"mine": 1}'
    for _ in range(2):
        assert main([*ask, str(clean.parent / f"new-{name}")]) == 0


def test_a_pair_whose_files_were_removed_since_is_named_without_pictures(clean: Path) -> None:
    copied = copy_across(clean, 2)
    audit = read_audit(audited(clean))
    (clean / copied[0]).unlink()
    shown = pairs_of_copies(audit, clean, most=9)
    pictures = {side.path: picture for pair in shown for side, picture in pair["sides"]}
    assert pictures[copied[0]] == "" and pictures[copied[1]].startswith("data:image/webp")


@pytest.mark.parametrize("elsewhere", ["../private.png", "ABSOLUTE"])
def test_a_pair_from_elsewhere_on_this_machine_is_not_shown(clean: Path, elsewhere: str) -> None:
    """A stored audit may have been changed by others."""
    copy_across(clean, 2)
    audit = audited(clean)
    private = clean.parent / "private.png"
    shutil.copy(next(clean.rglob("*.png")), private)
    audit["copies"]["pairs"][0]["first"]["path"] = elsewhere.replace("ABSOLUTE", str(private))
    (_, first), (_, second) = pairs_of_copies(read_audit(audit), clean, most=1)[0]["sides"]
    assert first == "" and second


def test_folders_without_train_have_nothing_to_learn_permuted_labels_from(clean: Path) -> None:
    shutil.rmtree(clean / "train")
    (clean / "groups.csv").unlink()
    assert audited(clean, "--permuted")["permuted"] == []


@pytest.mark.parametrize(("groups", "expected"), [(16, 0.6), (45, 0.6), (16, 0.35)])
def test_unseen_groups_are_not_called_too_alike_however_alike_their_own_images_are(
    groups: int, expected: float
) -> None:
    rng, of_groups = np.random.default_rng(0), np.repeat(np.arange(groups), 3)
    alarms = [too_alike((rng.random(groups) < expected)[of_groups], of_groups, expected) for _ in range(400)]
    assert sum(alarms) <= 12  # 4 are to be expected at 1 %
    assert too_alike(np.ones(len(of_groups), dtype=bool), of_groups, expected)


def test_more_images_than_the_sample_do_not_make_independent_images_too_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearer the nearest neighbour, the more often it is right, and among all images it is nearer."""
    monkeypatch.setattr("lungct_tune.auditing.shortcuts.MOST_IMAGES", 300)
    n, at_W = 3000, np.arange(32)
    where_N2 = np.random.default_rng(0).random((n, 2))
    bumps_N2W = np.exp(-((at_W - 31 * where_N2[..., None]) ** 2) / 128)
    images_NHW = (255 * bumps_N2W[:, 0, :, None] * bumps_N2W[:, 1, None]).astype(np.uint8)
    labels_N = (where_N2 * 6).astype(int).sum(axis=1) % 2  # as on a chessboard
    images = an_image_set(n, np.arange(n), labels_N, images_NHW)
    images.table["has_patient"] = False
    split = np.repeat(["train", "valid", "test"], [2100, 300, 600])
    audit = audit_images(images, split, "grouped")
    assert not any(part.others.too_alike for part in audit.split_health)
    assert audit.verdict.level == "clean"
    groups_N = np.where(np.arange(n) < 2400, np.arange(n), np.arange(n) - 600)
    leaking = an_image_set(n, groups_N, labels_N, images_NHW).table.assign(has_patient=False)
    assert audit_images(replace(images, table=leaking), split, "file").split_health[1].seen == 600


# Shortcuts


@pytest.mark.skipif(not CT_IMAGES.is_dir(), reason=f"the real CT images are not at {CT_IMAGES}")
def test_what_is_known_of_the_published_images_is_found() -> None:
    images = read_images(CT_IMAGES, 64)
    audit = audit_images(images, images.table["folder"].to_numpy(dtype=str), "official")
    assert audit.verdict.level == "leaks"
    across = {(row.part, row.other): row for row in audit.copies.across}
    assert across["train", "valid"].byte_identical == 34
    assert across["train", "valid"].by_class.keys() == {"normal"}
    (conflict,) = audit.conflicts
    assert [Path(path).name for path in conflict.paths] == ["l4.png", "sq2.png"]
    assert {Path(file.path).name for file in audit.inventory.not_what_the_suffix_says} == {
        *("n7.png", "n7 (2).png", "n7 - Copy.png", "n7 (2) - Copy.png")
    }
    width, height = audit.inventory.sizes["width"], audit.inventory.sizes["height"]
    assert (width.min, width.max, height.min, height.max) == (168, 1200, 110, 874)
    assert {away.class_name for away in audit.shortcuts.given_away} == {"normal"}
    (valid,) = audit.split_health
    assert 0.83 < valid.nearest_neighbour_accuracy < 0.88
    assert valid.by_class["normal"].seen == 10
    # told by its file almost perfectly, as long as copies may be told by their copies: grouped, the width, mode and
    # bytes of the file say less than the greys do
    of_normal = {rule.rule: rule.auroc["normal"] for rule in audit.shortcuts.rules}
    assert 0.85 < of_normal["file"] < 0.95 and of_normal["histogram"] > 0.98
    inside = {row.part: row for row in audit.copies.inside}
    assert inside["train"].by_class["normal"] > 100
