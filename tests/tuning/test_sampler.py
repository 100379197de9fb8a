"""Suggestions of TPE: as Optuna makes them in small searches, and at a constant cost in large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from lungct_tune.tuning.ray_compat import storage_of
from lungct_tune.tuning.sampler import ALL_UP_TO, GOOD, SEEN, SearchSampler

SPACE = {"width": FloatDistribution(0.0, 1.0), "depth": IntDistribution(1, 49), "fixed": IntDistribution(5, 5)}

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def study_of(trials: int, running: int = 3) -> optuna.Study:
    """A study with trials that completed or were stopped early, and others that run."""
    generator = np.random.default_rng(0)
    study = optuna.create_study(direction="maximize")
    for number in range(trials + running):
        value, depth = float(generator.random()), int(generator.integers(1, 50))
        state = (TrialState.COMPLETE, TrialState.PRUNED)[number % 3 == 2] if number < trials else TrialState.RUNNING
        study.add_trial(
            create_trial(
                state=state,
                value=value * depth / 49 if state.is_finished() else None,
                params={"width": value, "depth": depth, "fixed": 5},
                distributions=SPACE,
                intermediate_values={1: value},
            )
        )
    return study


def ask(study: optuna.Study, sampler: optuna.samplers.BaseSampler) -> dict[str, Any]:
    study.sampler = sampler
    return study.ask(SPACE).params


def plain(number: int, startup: int) -> TPESampler:
    """TPE as it was used before there was a limit."""
    seed = int(np.random.SeedSequence([1, number]).generate_state(1)[0])
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)


@pytest.mark.parametrize(("trials", "startup"), [(0, 4), (3, 4), (40, 10), (ALL_UP_TO, 10)])
def test_up_to_the_limit_suggestions_are_those_of_optuna(trials: int, startup: int) -> None:
    expected = [ask(study, plain(trials + 3 + i, startup)) for study in [study_of(trials)] for i in range(4)]
    study = study_of(trials)
    sampler = SearchSampler(SPACE, study.trials, seed=1, startup=startup)
    assert [ask(study, sampler) for _ in range(4)] == expected


def seen_by_tpe(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], set[int]]:
    """A suggestion, and the numbers of the trials that it is made from."""
    seen: set[int] = set()

    def look(self: TPESampler, study: optuna.Study, trial: Any, space: Any) -> dict[str, Any]:
        seen.update(each.number for each in storage_of(study).get_all_trials(0, deepcopy=False))
        return original(self, study, trial, space)

    original: Callable[..., dict[str, Any]] = TPESampler.sample_relative
    with monkeypatch.context() as patch:
        patch.setattr(TPESampler, "sample_relative", look)
        return ask(study, SearchSampler(SPACE, study.trials, seed=1, startup=10)), seen


def test_above_the_limit_tpe_sees_the_best_the_running_and_some_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(2 * ALL_UP_TO, running=3)
    suggested, seen = seen_by_tpe(study, monkeypatch)
    complete = [trial for trial in study.trials if trial.state is TrialState.COMPLETE]
    best = {trial.number for trial in sorted(complete, key=lambda trial: -(trial.value or 0.0))[:GOOD]}
    running = {trial.number for trial in study.trials if trial.state is TrialState.RUNNING}
    assert best | running <= seen and len(seen) == SEEN + len(running)
    assert set(suggested) == set(SPACE)


def test_above_the_limit_a_suggestion_depends_on_seed_number_and_results_only(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = (seen_by_tpe(study_of(ALL_UP_TO + 200), monkeypatch) for _ in range(2))
    next_one = seen_by_tpe(study_of(ALL_UP_TO + 200, running=4), monkeypatch)
    assert first == again
    assert first[1] != next_one[1] and first[0] != next_one[0]


def test_optunas_number_of_good_trials_is_the_one_that_is_assumed_here() -> None:
    from optuna.samplers._tpe.sampler import default_gamma

    assert default_gamma(SEEN) == default_gamma(10**6) == GOOD
