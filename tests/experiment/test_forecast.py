"""The arithmetic of a forecast: what makes a search longer or shorter, and that the time left only falls."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungct_tune.config.hyperparameters import PUBLISHED, Hyperparameters
from lungct_tune.config.search_space import parse_space
from lungct_tune.experiment.forecast import BEGINNING, Forecast, Progress, Workload, as_range
from lungct_tune.experiment.study import PLANNED, planned_and_taken, rungs, search_cost
from lungct_tune.training.pace import Pace

SPACE = parse_space("truncation_depth: {low: 2, high: 30}\nfrozen_share: {low: 0.0, high: 1.0}", "space")
PACE = Pace("CPU", 2.0, 0.1, 16, (2, 10, 30), (0.05, 0.1, 0.4), (0.001, 0.002, 0.008))

played = settings(deadline=None, max_examples=20)

works = st.builds(
    lambda trials, epochs, slots, compares, seeds, images: Workload(
        trials=trials,
        epochs=epochs,
        rungs=rungs(epochs),
        slots=slots,
        train_images=7 * images,
        valid_images=images,
        searched_images=8 * images,
        test_images=2 * images,
        batch_size=16,
        compares=compares,
        seeds=seeds,
    ),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 4),
    st.integers(4, 60),
)


def forecast(work: Workload) -> Forecast:
    return Forecast(work, SPACE, PACE)


def not_above(less: tuple[float, float], more: tuple[float, float]) -> bool:
    return all(a <= b + 1e-6 for a, b in zip(less, more, strict=True))


@played
@given(works, st.integers(1, 20))
def test_more_trials_are_never_shorter(work: Workload, more: int) -> None:
    assert not_above(forecast(work).total(), forecast(replace(work, trials=work.trials + more)).total())


@played
@given(works, st.integers(1, 20))
def test_more_slots_are_never_longer(work: Workload, more: int) -> None:
    assert not_above(forecast(replace(work, slots=work.slots + more)).total(), forecast(work).total())
    assert not_above(forecast(replace(work, final_slots=1 + more)).total(), forecast(work).total())


@played
@given(works)
def test_a_comparison_seeds_and_more_images_are_never_shorter(work: Workload) -> None:
    plain = forecast(replace(work, compares=False, seeds=0)).total()
    assert not_above(plain, forecast(replace(work, compares=True, seeds=0)).total())
    assert not_above(plain, forecast(replace(work, compares=False, seeds=3)).total())
    assert not_above(forecast(replace(work, retrains=False)).total(), plain)
    larger = replace(work, compares=False, seeds=0, train_images=2 * work.train_images)
    assert not_above(plain, forecast(larger).total())


@played
@given(works)
def test_a_range_begins_above_zero_and_does_not_end_before_it_begins(work: Workload) -> None:
    low, high = forecast(work).total()
    assert 0 < low <= high


@played
@given(works, st.floats(1.1, 5))
def test_a_busy_machine_takes_longer_and_that_is_less_certain(work: Workload, times: float) -> None:
    quiet, busy = forecast(work).total(), Forecast(work, SPACE, PACE, times).total()
    assert busy[1] > quiet[1] * times * 0.97 and busy[1] / busy[0] >= quiet[1] / quiet[0] * 0.98


def states_without_stops(forecast: Forecast) -> list[Progress]:
    """What a search with one slot has done after each epoch, if ASHA stops no trial."""
    work, states = forecast.work, [BEGINNING, Progress(started=True)]
    for trial in range(work.trials):
        for epoch in range(1, work.epochs):
            running = [(trial, PUBLISHED, epoch)]
            states.append(Progress(ended=trial, running=running, slowness=1.0, started=True))
        states.append(Progress(ended=trial + 1, slowness=1.0, started=True))
    after = Progress(ended=work.trials, slowness=1.0, started=True)
    states += [replace(after, retraining=[(PUBLISHED, epoch)]) for epoch in range(work.epochs + 1)]
    return [*states, replace(after, retraining=[])]


@played
@given(works)
def test_the_time_left_never_grows_when_epochs_are_done_at_the_forecasts_pace(work: Workload) -> None:
    """One depth and no rung: each epoch takes what the forecast says, so each state is an epoch nearer to the end."""
    space = parse_space("truncation_depth: {low: 20, high: 20}", "space")
    trials, epochs = min(work.trials, 3), min(work.epochs, 5)
    alone = replace(work, trials=trials, epochs=epochs, slots=1, rungs=(), seeds=0, compares=False)
    it = Forecast(alone, space, PACE)
    left = [it.left(state) for state in states_without_stops(it)]
    for before, after in pairwise(left):
        assert not_above(after, before)
    epoch = it.epoch_s(PUBLISHED)
    first, second = it.left(Progress(started=True)), it.left(Progress(running=[(0, PUBLISHED, 1)], started=True))
    assert first[1] - second[1] >= epoch * 0.99 or alone.epochs == 1


def test_deeper_networks_take_longer_and_frozen_layers_save_time() -> None:
    work = Workload(4, 4, (2,), 1, 70, 10, 80, 20, 16)
    it = forecast(work)
    by_depth = [it.epoch_s(Hyperparameters(truncation_depth=depth)) for depth in (2, 7, 10, 25, 30)]
    assert by_depth == sorted(by_depth) and by_depth[0] < by_depth[-1]
    frozen = [it.epoch_s(Hyperparameters(truncation_depth=30, frozen_share=share)) for share in (0, 0.5, 1)]
    assert frozen == sorted(frozen, reverse=True) and frozen[-1] < frozen[0]


def test_an_epoch_is_its_steps_its_norms_and_its_validation() -> None:
    """64 images in steps of 16, at a measured depth."""
    it = forecast(Workload(1, 1, (), 1, 64, 10, 74, 20, 16))
    assert it.epoch_s(Hyperparameters(truncation_depth=10)) == pytest.approx(4 * 0.1 + 64 * 0.002 + 10 * 0.002)


def test_of_very_many_trials_the_first_are_played_and_stand_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: a million trials took minutes and gigabytes."""
    work = Workload(2_000, 9, (3,), 4, 64, 16, 80, 0, 16)
    all_played = forecast(work).total()
    monkeypatch.setattr("lungct_tune.experiment.forecast.MOST_OF_ROUND", 500)
    it = forecast(work)
    assert it.total() == pytest.approx(all_played, rel=0.1)
    assert all(len(draws._table) == 500 for draws in it._draws.values())


def test_an_ensemble_takes_a_training_for_each_fold() -> None:
    work = Workload(8, 5, (2,), 1, train_images=64, valid_images=16, searched_images=80, test_images=20, batch_size=16)
    plain, ensemble = forecast(replace(work, folds=5)), forecast(replace(work, folds=5, ensemble=True))
    assert ensemble.retraining_s(PUBLISHED, 5) == pytest.approx(0.8 * plain.retraining_s(PUBLISHED, 5), rel=0.1)
    assert not_above(plain.total(), ensemble.total())
    last_epoch = Progress(ended=8, started=True, retraining=[(PUBLISHED, 4)])
    assert not_above(ensemble.left(last_epoch), plain.total())


def test_workers_of_a_retraining_share_its_images() -> None:
    """Also if the pace was measured with the share of one of them."""
    work = Workload(8, 5, (2,), 1, train_images=64, valid_images=16, searched_images=320, test_images=80, batch_size=16)
    norms, alone = 320 * 0.002, forecast(work).retraining_s(Hyperparameters(truncation_depth=10), 5)
    for workers in (2, 4):
        slot = replace(work, workers=workers, final_workers=workers)
        it = Forecast(slot, SPACE, replace(PACE, images=16 // workers, step_s=tuple(s / workers for s in PACE.step_s)))
        shared = it.retraining_s(Hyperparameters(truncation_depth=10), 5)
        assert shared - norms == pytest.approx((alone - norms) / workers), "each worker estimates the norms"
        slow = replace(it, work=replace(slot, message_s=0.001)).retraining_s(Hyperparameters(truncation_depth=10), 5)
        assert slow - shared == pytest.approx(5 * 20 * 2 * 10 * 0.001), "epochs, steps, messages of each norm"


def test_five_retrainings_in_two_slots_take_three_turns_and_a_slot_without_workers_starts_first() -> None:
    work = Workload(8, 100, (2,), 2, 64, 16, 80, 0, 16, folds=5, ensemble=True)

    def after(slots: int, models: int, started: int = 9) -> float:
        left = Progress(ended=8, winner=PUBLISHED, retraining=[(PUBLISHED, 0)] * models, final_slots=started)
        return forecast(replace(work, final_slots=slots)).left(left)[0]

    page, turn = after(1, 0), after(1, 1) - after(1, 0)
    assert after(1, 5) - page == pytest.approx(5 * turn)
    assert after(2, 5) - page == pytest.approx(3 * turn)
    assert after(6, 5) - page == pytest.approx(turn)
    assert after(2, 2) < after(2, 2, started=1) < after(1, 2)


def test_trainings_with_other_seeds_take_turns_in_the_slots_and_are_left_by_their_epochs() -> None:
    it = forecast(Workload(8, 9, (3,), 2, 64, 16, 80, 0, 16, seeds=4))

    def after(*epochs: int) -> float:
        left = Progress(ended=8, winner=PUBLISHED, retraining=[], seeds=[(PUBLISHED, epoch) for epoch in epochs])
        return it.left(left)[0]

    page, epoch = after(), after(8) - after()
    assert after(0, 0, 0, 0) == pytest.approx(it.left(Progress(ended=8, winner=PUBLISHED, retraining=[]))[0])
    assert after(9, 9, 9, 9) == page
    assert after(4, 3, 0, 0) - page == pytest.approx((6 + 9) * epoch)
    assert after(0, 0) - page > 9 * epoch  # with the start of the workers


def test_folds_train_one_model_after_the_other_on_each_worker() -> None:
    work = Workload(1, 1, (), 1, 64, 10, 74, 20, 16)
    one = forecast(work).epoch_s(PUBLISHED)
    assert forecast(replace(work, folds=5)).epoch_s(PUBLISHED) == pytest.approx(5 * one)
    assert forecast(replace(work, folds=5, workers=2)).epoch_s(PUBLISHED) == pytest.approx(3 * one)


def test_asha_shortens_a_search() -> None:
    work = Workload(40, 30, rungs(30), 2, 70, 10, 80, 20, 16)
    stopped, whole = forecast(work).total(), forecast(replace(work, rungs=())).total()
    assert stopped[1] < whole[0]


def test_the_time_left_follows_what_was_measured() -> None:
    it = forecast(Workload(20, 9, (3,), 2, 700, 100, 800, 200, 16, retrains=False))  # the page is not trained
    half = {"ended": 10, "reached": {3: 10}, "started": True}
    usual, slow = it.left(Progress(**half, slowness=1.0)), it.left(Progress(**half, slowness=2.0))
    assert slow == pytest.approx([2 * end for end in usual])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((40, 55.2), "40 to 55 s"),
        ((100, 200), "1.7 to 3.3 min"),
        ((900, 1500), "15 to 25 min"),
        ((7000, 9000), "1.9 to 2.5 h"),
        ((90_000, 130_000), "25 to 36 h"),
        ((50, 50), "about 50 s"),
        ((0, 5.5), "at most 6 s"),
        ((0, 0.3), "at most 1 s"),
    ],
)
def test_a_range_as_text(seconds: tuple[float, float], text: str) -> None:
    assert as_range(*seconds) == text


def test_the_study_keeps_the_plan_and_the_time_since_then() -> None:
    study = optuna.create_study()
    assert planned_and_taken(study) is None and search_cost(study, [], 2).planned_s is None
    study.set_user_attr(PLANNED, {"seconds": [60, 90], "slowdown": 1.0, "began": time.time() - 75})
    kept = search_cost(study, [], 2)
    assert kept.planned_s == (60, 90) and kept.took_s == pytest.approx(75, abs=5)
    study.set_user_attr(PLANNED, None)  # it was resumed
    assert planned_and_taken(study) is None
