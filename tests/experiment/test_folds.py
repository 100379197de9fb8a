"""How many folds a search has where the user says nothing, and what its plan says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lungct_tune.config.search_space import parse_space
from lungct_tune.config.settings import Settings
from lungct_tune.data import read_images, split_images
from lungct_tune.data.split import DataSplit
from lungct_tune.experiment import folds
from lungct_tune.experiment.folds import decide_folds, folds_line
from lungct_tune.experiment.forecast import Forecast, Workload, as_range
from lungct_tune.experiment.plan import Plan, plan_search, read_plan
from lungct_tune.training.pace import Pace

PACE = Pace("CPU", 2.0, 0.1, 16, (2, 10, 30), (0.05, 0.1, 0.4), (0.001, 0.002, 0.008))


@pytest.fixture(scope="module")
def split(phantoms: Path) -> DataSplit:
    images = read_images(phantoms, 32, progress=False)
    return DataSplit(images, split_images(images, "grouped", 0), None)


def planned(folder: Path, **settings: object) -> Plan:
    mine = {"data": folder, "storage": str(folder), "name": "one"} | settings
    return plan_search(Settings.model_validate(mine), set())


def never() -> bool:
    raise AssertionError("no cluster is needed for this answer")


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({}, True, 5),
        ({}, False, 1),
        ({"workers": 5}, True, 5),
        ({"workers": 6}, None, 1),
        ({"data": None}, None, 1),
        ({"folds": 1}, None, 1),
        ({"ensemble": True}, None, 5),
        ({"ensemble": True, "data": None}, None, 5),
    ],
)
def test_few_images_of_the_users_own_have_five_folds_on_gpus(
    settings: dict[str, object], gpus: bool | None, expected: int, split: DataSplit, tmp_path: Path
) -> None:
    plan, folded = decide_folds(planned(tmp_path, **settings), split, never if gpus is None else lambda: bool(gpus))
    assert plan.settings.folds == len(folded.folds) == expected
    assert (folded.fold is None) == (expected == 1)
    np.testing.assert_array_equal(folded.split, split.split)


def test_many_images_have_no_folds(split: DataSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "FEW_IMAGES", len(split.searched_rows))
    plan, folded = decide_folds(planned(tmp_path), split, never)
    assert plan.settings.folds == 1 and folds_line(plan, folded, None) == ""


def test_a_class_with_too_few_groups_has_no_folds_by_default(split: DataSplit, tmp_path: Path) -> None:
    table = split.images.table
    few = replace(split, images=replace(split.images, table=table.assign(group=table["label"])))
    plan, folded = decide_folds(planned(tmp_path), few, lambda: True)
    assert plan.settings.folds == 1 and folded.fold is None
    assert folds_line(plan, folded, None).endswith("a class has too few groups for 5 folds")


def test_a_search_keeps_the_folds_that_it_began_with(split: DataSplit, tmp_path: Path) -> None:
    """It goes on where there are no GPUs, and the other way round; one of an earlier version has no number."""
    begun, folded = decide_folds(planned(tmp_path), split, lambda: True)
    begun.save(folded)
    file = Path(begun.experiment.uri, "settings.yaml")
    assert yaml.safe_load(file.read_text())["folds"] == 5
    again, _ = decide_folds(read_plan(begun.experiment, set()), folded, never)
    assert again.settings.folds == 5 and folds_line(again, folded, None).startswith("5: ")
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"folds": None}))
    old, unfolded = decide_folds(read_plan(begun.experiment, set()), split, never)
    assert old.settings.folds == 1 and unfolded.fold is None and folds_line(old, unfolded, None) == ""


def forecast(split: DataSplit) -> Forecast:
    train_rows, valid_rows = split.folds[0]
    work = Workload(
        trials=8,
        epochs=9,
        rungs=(3,),
        slots=1,
        train_images=len(train_rows),
        valid_images=len(valid_rows),
        searched_images=len(split.searched_rows),
        test_images=len(split.test_rows),
        batch_size=8,
        folds=len(split.folds),
    )
    return Forecast(work, parse_space("truncation_depth: {low: 2, high: 30}", "space"), PACE)


def test_the_plan_says_what_folds_cost(split: DataSplit, tmp_path: Path) -> None:
    without, one = decide_folds(planned(tmp_path), split, lambda: False)
    with_folds, five = decide_folds(planned(tmp_path), split, lambda: True)
    pooled, valid = len(split.searched_rows), len(split.validation_rows)
    offered, made = folds_line(without, one, forecast(one)), folds_line(with_folds, five, forecast(five))
    assert offered.startswith(f"1: a trial is evaluated on {valid} images; with --folds 5 on all {pooled}")
    assert made.startswith(f"5: a trial has as many models, evaluated on all {pooled} images")
    assert f"--folds 1 evaluates one model on {valid}" in made
    times = forecast(one).total(), forecast(five).total()
    assert times[1][0] > 2 * times[0][0], "five models take longer than one"
    assert made.endswith(f"takes {as_range(*times[0])}") and offered.endswith(f"takes {as_range(*times[1])}")
    assert folds_line(without, one, None).endswith("and takes about 5 times as long")
    assert folds_line(planned(tmp_path, data=None), one, forecast(one)) == ""
