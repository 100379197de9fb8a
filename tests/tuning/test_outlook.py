"""What the plan says of time and price, before there is a cluster and without starting one."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import ray
from conftest import REPOSITORY, SMALL

from lungct_tune.config.settings import read_settings
from lungct_tune.experiment.forecast import Workload
from lungct_tune.experiment.plan import Plan, plan_search
from lungct_tune.training import pace
from lungct_tune.tuning import outlook
from lungct_tune.tuning.allocation import workers_that_fit
from lungct_tune.tuning.outlook import look_ahead


def planned(phantoms: Path, space: Path, folder: Path, *flags: str) -> Plan:
    words = ["--data", str(phantoms), "--space", str(space), *SMALL, "--storage", str(folder), "--name", "one"]
    return plan_search(*read_settings([*words, "--trials", "4", "--epochs", "3", "--slots", "1", "--plan", *flags]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, without a cluster.yaml."""
    monkeypatch.chdir(tmp_path)
    if ray.is_initialized():
        pytest.skip("another test has started Ray in this process")
    return tmp_path


def test_the_plan_says_the_time_and_starts_no_ray(phantoms: Path, space: Path, folder: Path) -> None:
    plan = planned(phantoms, space, folder)
    seen = look_ahead(plan, plan.load_and_split())
    assert seen.seconds is not None and 0 < seen.seconds[0] < seen.seconds[1]
    assert set(seen.lines) == {"cluster", "time"}  # there is no cluster with prices
    assert " to " in seen.lines["time"] and "measured on this machine" in seen.lines["time"]
    assert not ray.is_initialized()
    started = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [words for words in started if "raylet" in words or "gcs_server" in words or "pace" in words]


def test_a_second_plan_measures_nothing(
    phantoms: Path, space: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(phantoms, space, folder)
    split = plan.load_and_split()
    first = look_ahead(plan, split)
    monkeypatch.setattr(pace, "_measure_side_by_side", None)
    again = look_ahead(plan, split)
    assert first.forecast is not None and again.forecast is not None and again.forecast.pace == first.forecast.pace


def test_without_a_measured_pace_the_plan_says_so(
    phantoms: Path, space: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlook, "measured_pace", lambda order: None)
    plan = planned(phantoms, space, folder, "--hold-test")
    seen = look_ahead(plan, plan.load_and_split())
    assert not seen.work.retrains, "so the time left, which is estimated from the first epoch on, has no retraining"
    assert "not known" in seen.lines["time"] and seen.forecast is None and seen.seconds is None


@pytest.mark.parametrize(
    ("device", "said"),
    [("some CPU", "the time above is for this machine's devices"), ("NVIDIA L4", "on 4 workers and the head")],
)
def test_a_cluster_that_is_not_there_yet_has_its_price(
    phantoms: Path, space: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, said: str
) -> None:
    """What the search takes there is said only if this machine has the same GPU."""
    (folder / "cluster.yaml").symlink_to(REPOSITORY / "cluster.yaml")
    monkeypatch.setattr(outlook, "measured_pace", lambda order: pace.Pace(device, 2, 0.1, 8, (4,), (0.1,), (0.01,)))
    plan = planned(phantoms, space, folder)
    price = look_ahead(plan, plan.load_and_split()).lines["price"]
    assert said in price and "dollars" in price and "check before use" in price and "g6.xlarge" in price


@pytest.mark.parametrize(
    ("workers", "gpus", "slots", "expected", "final"),
    [(1, 1.0, None, 4, 4), (2, 1.0, None, 2, 2), (1, 0.25, None, 8, 8), (1, 1.0, 2, 2, 2), (8, 1.0, None, 1, 1)],
)
def test_a_cluster_that_is_not_there_yet_gets_the_slots_that_fit(
    workers: int, gpus: float, slots: int | None, expected: int, final: int
) -> None:
    """Four GPUs, and eight trials."""
    there = workers_that_fit([{"GPU": 1}] * 4, {"GPU": gpus})
    work = Workload(8, 4, (), 1, 64, 16, 80, 20, 16, workers=workers, final_workers=workers)
    found = outlook._on_workers(work, there, slots)
    assert (found.slots, found.final_slots) == (expected, final)


def test_a_node_type_without_a_price_is_named(phantoms: Path, space: Path, folder: Path) -> None:
    (folder / "cluster.yaml").symlink_to(REPOSITORY / "cluster.yaml")
    (folder / "clusters").mkdir()
    line = "m7i.xlarge: {on_demand: 0.2, looked_up: today}"
    (folder / "clusters" / "prices.yaml").write_text(f"currency: dollars\nnode_types: {{{line}}}\n")
    plan = planned(phantoms, space, folder)
    price = look_ahead(plan, plan.load_and_split()).lines["price"]
    assert price.startswith("not known: clusters/prices.yaml has no g6.xlarge; add")
