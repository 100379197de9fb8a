"""The search, as the report shows it: what a sceptical reader asks, charts, and every trial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.config.search_space import in_range
from lungct_tune.experiment.results import SearchResults
from lungct_tune.experiment.study import (
    BASELINE,
    COMPLETED,
    DIVERGED,
    FAILED,
    best_figures,
    how_ended,
    hyperparameters_of,
)
from lungct_tune.reporting import search_charts as charts
from lungct_tune.reporting.format import SAME_GROUP, endings, percent
from lungct_tune.training.objective import OBJECTIVE, OBJECTIVE_NAME, OBJECTIVE_SD

EDGE = 0.02
"""A value within this share of a range from its end counts as lying at the edge of the space."""


LATE = 0.1
"""A best epoch within this share of the epochs from the last counts as still improving."""


FEWEST = 4
"""Completed trials that it takes to ask which parameter matters."""


def about_the_search(found: SearchResults) -> list[str]:
    """What a sceptical reader asks of a search, a sentence or two each."""
    judged_on = {name: n for name, n in found.searched_on.items() if n}
    smallest, n = min(judged_on.items(), key=lambda pair: pair[1])
    without = [name for name in found.classes if name not in judged_on]
    seen = f", but of {found.seen} test images {SAME_GROUP}" if found.seen else ""
    said = [
        "The rule that chose the winner was fixed before the search began: of the trials that ran to their end "
        f"without diverging, the one with the highest {OBJECTIVE_NAME} {found.judged} at its best epoch; of equals, "
        f"the one with the lower log loss. No trial was shown a test image{seen}.",
        f"{found.done} of {found.settings['trials']} trials have ended: {endings(found)}.",
        f"Trials were judged {found.judged}: on {sum(judged_on.values())} images, the fewest, {n}, of {smallest}. One "
        f"of these changes the {OBJECTIVE_NAME} by {100 / (len(judged_on) * n):.1f} points; smaller differences "
        "between trials say nothing." + (f" There was none of {' and '.join(without)}." if without else ""),
    ]
    if found.winner is None:
        return said
    if spread := best_figures(found.winner).get(OBJECTIVE_SD):
        said.append(f"Over the folds, the winner's {OBJECTIVE_NAME} has a standard deviation of {percent(spread)}.")
    said += [_edges(found, found.winner), _improving(found, found.winner)]
    if found.winner.number == BASELINE:
        said.append(
            "The winner is the published configuration: "
            + ("nothing else was tried." if found.done == 1 else "nothing else that was tried did better.")
        )
    elif found.baseline is not None:
        gain = best_figures(found.winner)[OBJECTIVE] - best_figures(found.baseline)[OBJECTIVE]
        said.append(
            f"{found.judged.capitalize()} the winner is {100 * gain:.1f} points of {OBJECTIVE_NAME} above the "
            f"published configuration: as the best of {found.done} trials, which flatters it."
        )
    if seeds := found.seeds:
        said.append(
            f"Trained anew with {len(seeds[OBJECTIVE])} other seeds, the winner reached {percent(seeds['mean'])} on "
            f"average, with a standard deviation of {100 * seeds['sd']:.1f} points"
            + ("." if found.baseline is None else f": {_seeds_against_the_published(found, seeds)}.")
        )
    return said


def _seeds_against_the_published(found: SearchResults, seeds: Mapping[str, Any]) -> str:
    assert found.baseline is not None and found.winner is not None
    gain = f"{100 * (seeds['mean'] - best_figures(found.baseline)[OBJECTIVE]):+.1f} points against"
    if found.winner.number == BASELINE:
        return f"{gain} its own training in the search"
    return f"{gain} the published configuration's one training, without the luck of being chosen"


def _edges(found: SearchResults, winner: FrozenTrial) -> str:
    at = [
        f"{name.replace('_', ' ')} {value:.3g} ({where} of {in_range(distribution)})"
        for name, distribution in found.space.distributions.items()
        for value in [getattr(hyperparameters_of(winner), name)]
        if (where := edge(value, distribution))
    ]
    if not at:
        return "The winner lies inside the space, at none of its edges."
    return f"The winner lies at an edge of the space: {'; '.join(at)}. What lies beyond has not been tried."


def edge(value: float, distribution: BaseDistribution) -> str:
    """ "the lower end", "the upper end", "outside", or "" for a value that lies well inside."""
    logarithmic = False
    match distribution:
        case CategoricalDistribution(choices=choices):
            numbers = [float(str(choice)) for choice in choices]
            low, high = min(numbers), max(numbers)
        case (
            IntDistribution(low=low, high=high, log=logarithmic)
            | FloatDistribution(low=low, high=high, log=logarithmic)
        ):
            pass
    if not low <= value <= high:
        return "outside"
    if logarithmic:
        low, value, high = math.log(low), math.log(value), math.log(high)
    place = (value - low) / ((high - low) or 1.0)
    return "" if low == high or EDGE < place < 1 - EDGE else "the lower end" if place <= EDGE else "the upper end"


def _improving(found: SearchResults, winner: FrozenTrial) -> str:
    epochs, best = found.settings["epochs"], int(best_figures(winner)["epoch"])
    late = sum(how_ended(trial) == COMPLETED and _is_late(trial, epochs) for trial in found.trials)
    if _is_late(winner, epochs):
        about = f"The winner was still improving when it ended (best at epoch {best} of {epochs})"
    else:
        about = f"The winner was best at epoch {best} of {epochs}, and not improving any more when it ended"
    return f"{about}; {late} of {found.completed} trials that ran to their end were best in their last tenth."


def _is_late(trial: FrozenTrial, epochs: int) -> bool:
    return bool(best_figures(trial)["epoch"] > epochs * (1 - LATE))


def importance(found: SearchResults) -> dict[str, float]:
    """Optuna's importance of each parameter, the greatest first; empty where there are too few trials to tell."""
    completed = [
        trial
        for trial in found.trials
        if how_ended(trial) == COMPLETED and not _is_outside(trial)  # as a fixed one may be
    ]
    if len(completed) < FEWEST or len({trial.value for trial in completed}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    study.add_trials(completed)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _is_outside(trial: FrozenTrial) -> bool:
    return any(
        edge(trial.params[name], distribution) == "outside" for name, distribution in trial.distributions.items()
    )


TRIAL_COLUMNS = (
    *("trial", "ended", "epochs", OBJECTIVE_NAME, "accuracy", "log loss"),
    *(name.replace("_", " ") for name in PUBLISHED.as_dict()),
)


def trial_rows(found: SearchResults) -> list[list[str | int]]:
    """Every trial that began, as text under `TRIAL_COLUMNS`."""
    rows: list[list[str | int]] = []
    for trial in found.trials:
        best = best_figures(trial)
        figures = [f"{best[key]:.3f}" if best else "" for key in (OBJECTIVE, "accuracy", "log_loss")]
        values = [f"{value:.3g}" for value in hyperparameters_of(trial).as_dict().values()]
        rows.append([trial.number, how_ended(trial), len(trial.user_attrs.get("history", [])), *figures, *values])
    return rows


def failures(found: SearchResults) -> list[tuple[int, str]]:
    """The trials that diverged or failed, and why."""
    return [
        (trial.number, trial.user_attrs.get("ended", FAILED))
        for trial in found.trials
        if how_ended(trial) in (DIVERGED, FAILED)
    ]


def _search_charts(found: SearchResults) -> dict[str, Any] | None:
    trials = found.trials
    if not any(best_figures(trial) for trial in trials):
        return None
    winner = found.winner.number if found.winner else None
    shares, varied = importance(found), found.space.distributions
    return {
        "history": charts.history(trials, winner, found.judged),
        "curves": charts.curves(trials, winner, found.judged),
        "importances": charts.importances(shares) if shares else "",
        "parallel": charts.parallel(trials, varied, winner),
        "slices": [
            charts.slice_of(trials, name, distribution, winner, epochs=found.settings["epochs"])
            for name, distribution in varied.items()
        ],
        "timeline": charts.timeline(trials, winner),
    }
