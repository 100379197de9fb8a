"""Optuna's TPE for a search of thousands of trials: a suggestion's cost does not grow with their number."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.search_space import SearchSpace
from lungct_tune.tuning.ray_compat import storage_of, suggest_value

MOST_AT_RANDOM = 10

ALL_UP_TO = 500
"""TPE gets all ended trials up to this number."""

SEEN = 250
"""So many ended trials TPE gets of more. It takes a tenth of them as good ones, but at most `GOOD`: of this number it
takes the same good ones as of any larger number."""

GOOD = 25
"""How many trials TPE takes as good ones at most (Optuna's `default_gamma`)."""

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
"""The states of ended trials that TPE learns from."""


def startup_trials(trials: int) -> int:
    """How many trials of a search are drawn at random before TPE starts: a third, at least 3, at most 10."""
    return max(3, min(MOST_AT_RANDOM, trials // 3))


def first_trials(space: SearchSpace, *, seed: int, trials: int, slots: int) -> list[Hyperparameters]:
    """The hyperparameters of a search's first trials, which depend on no result.

    They are the fixed ones, and those that are drawn before enough trials have ended for TPE.
    """
    startup, fixed = startup_trials(trials), space.fixed_trials
    study = optuna.create_study(sampler=SearchSampler(space.distributions, (), seed=seed, startup=startup))
    drawn = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for _ in range(startup + slots - 1):
            trial = study.ask()
            for name, distribution in space.distributions.items():
                suggest_value(trial, name, distribution)
            drawn.append(space.hyperparameters(trial.params))
    return [*fixed, *drawn[len(fixed) :]][:trials]


class SearchSampler(BaseSampler):
    """Multivariate TPE with constant liar, whose suggestions depend on seed, trial number and results only.

    TPE compares the density of good trials with the density of all others, which costs time in proportion to their
    number: 0.03 s for 1,000 trials, 0.24 s for 10,000. Above `ALL_UP_TO` ended trials it gets the good ones, a random
    part of the others, and the running ones.

    Args:
        distributions: of all parameters of a trial.
        ended: the trials that have ended before.
        startup: how many trials must have ended before TPE starts; until then parameters are drawn at random.
    """

    def __init__(
        self,
        distributions: Mapping[str, BaseDistribution],
        ended: Iterable[FrozenTrial],
        *,
        seed: int,
        startup: int,
    ) -> None:
        self._varied = {name: of for name, of in sorted(distributions.items()) if not of.single()}
        self._seed, self._startup = seed, startup
        self._number, self._tpe = -1, TPESampler()
        self._ended: list[tuple[tuple[float, ...], FrozenTrial]] = []
        """The trials that have ended, the best ones first."""
        for trial in ended:
            self.add(trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._varied

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(self._excerpt(study, trial), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(self._excerpt(study, trial), trial, param_name, param_distribution)

    def _of(self, trial: FrozenTrial) -> TPESampler:
        if trial.number != self._number:
            (seed,) = np.random.SeedSequence([self._seed, trial.number]).generate_state(1)
            self._number = trial.number
            self._tpe = TPESampler(
                seed=int(seed), n_startup_trials=self._startup, multivariate=True, constant_liar=True
            )
        return self._tpe

    def add(self, trial: FrozenTrial) -> None:
        """Adds a trial that has ended to those that suggestions are made from."""
        if trial.state in ENDED:
            bisect.insort(self._ended, (_rank(trial), trial))

    def _excerpt(self, study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
        """The study, or one with the same storage that has a part of its trials."""
        if len(self._ended) <= ALL_UP_TO:
            return study
        generator = np.random.default_rng([self._seed, trial.number, 1])
        others = GOOD + generator.choice(len(self._ended) - GOOD, SEEN - GOOD, replace=False)
        seen = [each for _, each in self._ended[:GOOD]] + [self._ended[i][1] for i in others]
        seen += study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        seen.sort(key=lambda each: each.number)
        return optuna.Study(study.study_name, storage=_Excerpt(storage_of(study), seen))  # type: ignore[arg-type]


def _rank(trial: FrozenTrial) -> tuple[float, ...]:
    """The best trials first, as TPE sorts them: completed ones by value, then pruned ones by epoch and value."""
    if trial.state is TrialState.COMPLETE:
        return 0, -float(trial.value or 0.0), 0.0, trial.number
    step = trial.last_step or 0
    return 1, -step, -trial.intermediate_values.get(step, 0.0), trial.number


class _Excerpt:
    """A storage of which a part of the trials is seen. All else goes to the storage itself."""

    def __init__(self, storage: BaseStorage, trials: Sequence[FrozenTrial]) -> None:
        self._storage, self._trials = storage, trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]
