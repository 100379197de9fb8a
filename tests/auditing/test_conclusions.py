"""What an audit concludes from its figures."""

from __future__ import annotations

from typing import Any

from lungct_tune.auditing.conclusions import conclude


def figures_of(leaks: tuple[str, ...] = (), alike: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """The figures of an audit of two classes that has nothing to say, but for what is asked."""
    none = {"with_copy": 0, "byte_identical": 0, "by_class": {}}
    others = {"images": 9, "nearest_neighbour_right": 8, "expected_of_unseen_groups": 0.5}
    health = [
        {
            "part": part,
            "before": before,
            "images": 10,
            "seen": int(part in leaks),
            "copies": none,
            "by_class": {},
            "nearest_neighbour_accuracy": 0.8,
            "others": others | {"too_alike": part in alike},
        }
        for part, before in (("valid", ["train"]), ("test", ["train", "valid"]))
    ]
    audit = {
        "images": 60,
        "classes": ["cancer", "normal"],
        "split": {"parts": ["train", "valid", "test"]},
        "split_health": health,
        "permuted": None,
        "conflicts": [],
        "shortcuts": {"given_away": []},
        "groups": {"by_class": {"cancer": 9, "normal": 9}, "patients_known": True},
        "inventory": {
            "unreadable": [],
            "without_content": [],
            "by_class": {"cancer": {"train": 9, "valid": 9, "test": 9}},
        },
    }
    return audit | more


def test_a_verdict_is_about_what_really_leaks() -> None:
    assert conclude(figures_of())["headline"] == "No reason was found to doubt test accuracy on this split."
    valid, test = conclude(figures_of(leaks=("valid",))), conclude(figures_of(leaks=("test",)))
    assert valid["level"] == test["level"] == "leaks"
    assert valid["headline"].startswith("Valid leaks; no leak was found in test") and "--folds" in valid["advice"][0]
    assert test["headline"].startswith("This split leaks: test accuracy on it does not show")
    assert "1 of 10 test images are copies of images in train or valid" in test["reasons"][0]


def test_what_only_looks_like_a_leak_is_not_called_none() -> None:
    verdict = conclude(figures_of(alike=("valid",)))
    assert verdict["level"] == "caution" and "No leak was found" not in verdict["headline"]
    assert (
        "Of the 9 valid images" in verdict["reasons"][0]
        and "valid probably shows further slices" in verdict["reasons"][0]
    )


def test_a_file_that_is_left_out_says_nothing_about_lungs() -> None:
    inventory = figures_of()["inventory"] | {"unreadable": ["a.png"]}
    verdict = conclude(figures_of(inventory=inventory))
    assert verdict["level"] == "caution" and "lungs" not in verdict["headline"]


def test_a_shortcut_to_one_of_two_classes_is_said_once() -> None:
    given = [{"class": name, "by": "the histogram of greys", "auroc": 0.99} for name in ("cancer", "normal")]
    verdict = conclude(figures_of(shortcuts={"given_away": given}))
    assert verdict["headline"].startswith("No leak was found in this split, but test accuracy on it does not depend on")
    (reason,), (advice,) = verdict["reasons"], verdict["advice"]
    assert reason.startswith("cancer and normal are recognised by") and "other classes" not in advice


def test_a_class_without_images_in_a_part_is_named() -> None:
    counts = {"cancer": {"train": 9, "valid": 0, "test": 0}}
    verdict = conclude(figures_of(inventory={"unreadable": [], "without_content": [], "by_class": counts}))
    assert verdict["level"] == "caution" and "no images of a class" in verdict["headline"]
    for part, reason in zip(("valid", "test"), verdict["reasons"], strict=True):
        assert reason.startswith(f"No image of cancer is in {part}: ")
