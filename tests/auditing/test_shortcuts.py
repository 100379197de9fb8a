"""Simple rules that see no lung: what each sees, and what it scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lungct_tune.auditing.shortcuts import RULES, measure_shortcuts, predict_by_shortcuts
from lungct_tune.data import ImageSet


def an_image_set(n: int, groups: np.ndarray, labels: np.ndarray, images: np.ndarray, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"path": [f"{i}.png" for i in range(n)], "folder": "", "label": labels, "digest": "", "group": groups}
    ).assign(is_listed=False)
    table = table.assign(width=rng.integers(90, 100, n), height=100, mode="L", format="PNG", bytes=5000)
    return ImageSet(Path("somewhere"), table, images, ("a", "b"), [], [], [], [], "")


@pytest.mark.parametrize("seed", range(5))
def test_rules_are_at_chance_on_noise_even_where_groups_hold_copies(seed: int) -> None:
    """Ten copies of each image: cross-validation that cut groups would find the class by likeness."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(40), 10)
    originals = rng.integers(0, 256, (40, 32, 32), dtype=np.uint8)
    images = an_image_set(400, groups, groups % 2, originals[groups], seed)
    for name, shortcut in measure_shortcuts(images, np.arange(400)).items():
        assert 0.2 < shortcut.balanced_accuracy < 0.8, name


@pytest.mark.parametrize("rule", ["file", "histogram", "border"])
def test_each_rule_sees_what_it_is_for(rule: str) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    pixels = rng.integers(0, 256, (80, 64, 64), dtype=np.uint8)
    if rule == "histogram":
        pixels[labels == 1] //= 2
    if rule == "border":
        pixels[labels == 1, :4] = 255 - pixels[labels == 1, -4:] // 2
    images = an_image_set(80, np.arange(80), labels, pixels)
    if rule == "file":
        images.table["bytes"] += 100 * labels
    shortcuts = measure_shortcuts(images, np.arange(80))
    assert shortcuts[rule].per_class[1] > 0.95
    predicted = predict_by_shortcuts(images, np.arange(40), np.arange(40, 80))
    right = {name: (of_rule == labels[40:]).mean() for name, of_rule in predicted.items()}
    assert right.keys() == RULES.keys() and right[rule] > 0.8


@pytest.mark.parametrize(("rare", "of_each"), [(3, 1), (2, 30), (400, 1)])
def test_a_sample_has_every_class_in_several_groups(rare: int, of_each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one group is larger than the sample, and where a class is rare."""
    monkeypatch.setattr("lungct_tune.auditing.shortcuts.MOST_IMAGES", 100)
    groups = np.concatenate([np.zeros(300, int), np.arange(1, 301), np.repeat(np.arange(301, 301 + rare), of_each)])
    labels = (groups > 300).astype(int)
    images = an_image_set(len(groups), groups, labels, np.zeros((len(groups), 32, 32), dtype=np.uint8))
    scores = measure_shortcuts(images, np.arange(len(groups)))
    assert all(shortcut.per_class.keys() == {0, 1} for shortcut in scores.values()) and scores


def test_shortcuts_never_learn_from_the_labels_of_the_unseen() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    images = an_image_set(80, np.arange(80), labels, rng.integers(0, 256, (80, 32, 32), dtype=np.uint8))
    first = predict_by_shortcuts(images, np.arange(60), np.arange(60, 80))
    images.table.loc[60:, "label"] = 1 - images.table.loc[60:, "label"]
    second = predict_by_shortcuts(images, np.arange(60), np.arange(60, 80))
    for rule in RULES:
        np.testing.assert_array_equal(first[rule], second[rule])
