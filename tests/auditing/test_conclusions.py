"""What an audit concludes from its findings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lungct_tune.auditing.conclusions import conclude
from lungct_tune.auditing.findings import (
    Chance,
    Copies,
    CopyCounts,
    Findings,
    GivenAway,
    Groups,
    Inventory,
    Shortcuts,
    Similarity,
    Split,
    Unreadable,
    UnseenImages,
)


def found(leaks: tuple[str, ...] = (), alike: tuple[str, ...] = (), **inventory: Any) -> Findings:
    """The findings of an audit of two classes that has nothing to say, but for what is asked."""
    counts = {"cancer": {"train": 9, "valid": 9, "test": 9}}
    nothing = Inventory(
        by_class=counts, formats={}, modes={}, sizes={}, distinct_sizes=1, not_what_the_suffix_says=[], unreadable=[]
    )
    health = [
        Similarity(
            part=part,
            before=before,
            images=10,
            seen=int(part in leaks),
            copies=CopyCounts(images=10, with_copy=0, byte_identical=0, by_class={}),
            nearest_neighbour_accuracy=0.8,
            others=UnseenImages(9, nearest_neighbour_right=8, expected_of_unseen_groups=0.5, too_alike=part in alike),
            by_class={},
        )
        for part, before in (("valid", ["train"]), ("test", ["train", "valid"]))
    ]
    return Findings(
        data="ct",
        fingerprint="",
        images=60,
        classes=["cancer", "normal"],
        split=Split("grouped", ["train", "valid", "test"]),
        inventory=replace(nothing, **inventory),
        copies=Copies(0.98, pairs_by_kind={}, images_by_class={}, across=[], inside=[], pairs=[]),
        conflicts=[],
        groups=Groups(
            threshold=0.9,
            groups=18,
            largest=1,
            by_class={"cancer": 9, "normal": 9},
            images_in_groups_csv=60,
            of_several_classes=0,
            cut_by_the_split=0,
            by_threshold=[],
            patients_known=True,
        ),
        shortcuts=Shortcuts(Chance(0.5, 0.5), rules=[], given_away=[]),
        split_health=health,
        permuted=None,
    )


def test_a_verdict_is_about_what_really_leaks() -> None:
    assert conclude(found()).headline == "No reason was found to doubt test accuracy on this split."
    valid, test = conclude(found(leaks=("valid",))), conclude(found(leaks=("test",)))
    assert valid.level == test.level == "leaks"
    assert valid.headline.startswith("Valid leaks; no leak was found in test") and "--folds" in valid.advice[0]
    assert test.headline.startswith("This split leaks: test accuracy on it does not show")
    assert "1 of 10 test images are copies of images in train or valid" in test.reasons[0]


def test_what_only_looks_like_a_leak_is_not_called_none() -> None:
    verdict = conclude(found(alike=("valid",)))
    assert verdict.level == "caution" and "No leak was found" not in verdict.headline
    assert "Of the 9 valid images" in verdict.reasons[0]
    assert "valid probably shows further slices" in verdict.reasons[0]


def test_a_file_that_is_left_out_says_nothing_about_lungs() -> None:
    verdict = conclude(found(unreadable=[Unreadable("a.png", "damaged")]))
    assert verdict.level == "caution" and "lungs" not in verdict.headline


def test_a_shortcut_to_one_of_two_classes_is_said_once() -> None:
    given = [GivenAway(name, by="the histogram of greys", auroc=0.99) for name in ("cancer", "normal")]
    findings = found()
    verdict = conclude(replace(findings, shortcuts=replace(findings.shortcuts, given_away=given)))
    assert verdict.headline.startswith("No leak was found in this split, but test accuracy on it does not depend on")
    (reason,), (advice,) = verdict.reasons, verdict.advice
    assert reason.startswith("cancer and normal are recognised by") and "other classes" not in advice


def test_a_class_without_images_in_a_part_is_named() -> None:
    verdict = conclude(found(by_class={"cancer": {"train": 9, "valid": 0, "test": 0}}))
    assert verdict.level == "caution" and "no images of a class" in verdict.headline
    for part, reason in zip(("valid", "test"), verdict.reasons, strict=True):
        assert reason.startswith(f"No image of cancer is in {part}: ")
