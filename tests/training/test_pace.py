"""The pace of this machine: measured in processes of its own, kept, and read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lungct_tune.training import pace
from lungct_tune.training.graphed_step import WARM_UP_STEPS
from lungct_tune.training.pace import (
    Pace,
    PaceOrder,
    depths_to_measure,
    device_name,
    measured_pace,
    measured_slowdown,
)

ORDER = PaceOrder(32, 4, (2, 8), 1, False, 1, device_name(gpu=False))


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lungct_tune"


def test_a_pace_is_measured_once_and_then_read(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured_pace(ORDER)
    assert first is not None and first.depths == (2, 8) and first.images == 4
    assert 0 < first.step_s[0] < first.step_s[1] and min(first.predict_s) > 0 and first.start_s > 0
    assert [file.name for file in own_home.iterdir()] == [ORDER.file.name]  # and no half-written file

    monkeypatch.setattr(pace.sys, "executable", "/nowhere/python")  # it cannot be measured any more
    assert measured_pace(ORDER) == first
    assert measured_pace(replace(ORDER, images=6)) is None


def test_an_entry_is_of_one_device_size_batch_and_number_of_workers(own_home: Path) -> None:
    others = [
        replace(ORDER, **change)
        for change in ({"image_size": 64}, {"images": 8}, {"beside": 2}, {"threads": 2}, {"device": "other"})
    ]
    assert len({order.file for order in [ORDER, *others]}) == 6


def test_a_damaged_entry_is_measured_again(own_home: Path) -> None:
    own_home.mkdir()
    ORDER.file.write_text('{"device": "CPU"}')
    again = measured_pace(ORDER)
    assert again is not None and again.depths == ORDER.depths


def test_depths_are_interpolated_and_never_negative() -> None:
    it = Pace("CPU", 1.0, 0.1, 10, (4, 10, 40), (0.1, 0.4, 1.0), (0.001, 0.002, 0.01))
    assert it.step(10) == pytest.approx(0.4) and it.step(7) == pytest.approx(0.25) and it.step(25) == pytest.approx(0.7)
    assert it.step(49) == pytest.approx(1.18)
    assert all(it.step(depth, frozen) > 0 for depth in range(1, 50) for frozen in range(depth + 1))
    assert it.step(40, 40) >= 10 * it.predict(40)


def test_the_measured_depths_are_the_ends_of_the_space_and_of_the_stages() -> None:
    assert depths_to_measure(2, 22) == (2, 10, 22)
    assert depths_to_measure(4, 49) == (4, 10, 22, 40, 49)
    assert depths_to_measure(5, 5) == (5,)
    assert Pace("CPU", 1, 0.1, 8, (5,), (0.1,), (0.01,)).step(11) == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_neither_the_first_steps_of_a_gpu_nor_the_capture_of_its_graph_are_timed(steps: int) -> None:
    """Found: the timed epoch began with the capture."""
    calls, clock = 0, 0.0

    def train_epoch() -> None:
        nonlocal calls, clock
        for _ in range(steps):
            calls += 1
            clock += 0.5 if calls <= WARM_UP_STEPS else 20 if calls == WARM_UP_STEPS + 1 else 0.01

    trainer = SimpleNamespace(steps=steps, train_epoch=train_epoch)
    assert pace._step_seconds(trainer, True, lambda: clock) == pytest.approx(0.01)
    assert calls == (pace._untimed_epochs(steps, on_gpu=True) + 1) * steps <= WARM_UP_STEPS + 2 * steps


def test_one_epoch_of_a_cpu_is_not_timed_or_none_if_it_is_slow() -> None:
    for first, expected in ((1.0, 0.1), (9.0, 3.0)):
        seconds, clock = iter([first, 0.3]), [0.0]
        trainer = SimpleNamespace(steps=3, train_epoch=lambda: clock.append(clock[-1] + next(seconds)))  # noqa: B023
        it = pace._step_seconds(trainer, False, lambda: clock[-1])  # noqa: B023
        assert it == pytest.approx(expected)


def test_processes_are_never_faster_than_on_a_quiet_machine() -> None:
    assert measured_slowdown(1) >= 1
