"""The report's section on the search: answers to a sceptical reader's questions, charts, and every trial."""

from __future__ import annotations

import math
from typing import Any

from optuna.distributions import BaseDistribution

from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.config.search_space import bounds, in_range
from lungct_tune.experiment.forecast import as_range, as_time
from lungct_tune.experiment.metrics import SeedComparison
from lungct_tune.experiment.results import SearchResults
from lungct_tune.experiment.study import parameter_importance
from lungct_tune.experiment.trial import BASELINE, UNSUCCESSFUL, Outcome, TrialRecord
from lungct_tune.reporting import search_charts as charts
from lungct_tune.reporting.format import SAME_GROUP, endings, percent, points
from lungct_tune.training.objective import OBJECTIVE_NAME

IMPORTANCE_FROM, PARAMETERS_FROM = 20, 15
"""The fewest completed trials for the parameters' importance, and for parallel coordinates and slices.

Fewer trials show chance: with 8 trials and 4 parameters, some parameter always seems to matter."""

EDGE = 0.02
"""A value counts as at the edge of the space if its distance from an end is at most this share of the range."""


def about_the_search(found: SearchResults) -> list[str]:
    """Answers to a sceptical reader's questions about a search, a few sentences each."""
    images = {name: n for name, n in found.searched_on.items() if n}
    smallest, n = min(images.items(), key=lambda pair: pair[1])
    without = [name for name in found.classes if name not in images]
    seen = f", but of {found.seen} test images {SAME_GROUP}" if found.seen else ""
    sentences = [
        "The rule that chose the winner was fixed before the search began. The winner is the trial with the highest "
        f"{OBJECTIVE_NAME} {found.judged} after its last epoch, among those that ran to their end without diverging. "
        "Of equals it is the one with the lower negative log-likelihood. No trial was shown a test image"
        f"{seen}.",
        f"{found.done} of {found.settings['trials']} trials have ended: {endings(found)}." + _time(found),
        f"Trials were evaluated {found.judged}, on {sum(images.values())} images. The smallest class, {smallest}, has "
        f"{n} of them: one image of it changes the {OBJECTIVE_NAME} by {100 / (len(images) * n):.1f} points. Smaller "
        "differences between trials mean nothing."
        + (f" There was no image of {' and '.join(without)}." if without else ""),
    ]
    if found.winner is None or (last := found.winner.last) is None:
        return sentences
    if spread := last.balanced_accuracy_sd:
        sentences.append(
            f"Over the folds, the winner's {OBJECTIVE_NAME} has a standard deviation of {percent(spread)}."
        )
    sentences.append(_edges(found, found.winner))
    if found.winner.number == BASELINE:
        sentences.append(
            "The winner is the published configuration: "
            + ("no other was tried." if found.done == 1 else "no other trial was better.")
        )
    elif found.baseline is not None and found.baseline.outcome is Outcome.COMPLETED:
        gain = last.balanced_accuracy - found.baseline_score
        sentences.append(
            f"{found.judged.capitalize()} the winner is {100 * gain:.1f} points of {OBJECTIVE_NAME} above the "
            f"published configuration. This gain is too high, because the winner is the best of {found.done} trials."
        )
    if found.seeds:
        sentences.append(over_seeds(found.seeds))
    return sentences


def _time(found: SearchResults) -> str:
    """The time that was planned beside the time that it took."""
    cost = found.bundle.metrics.search if found.bundle else None
    if cost is None or cost.planned_s is None or cost.took_s is None:
        return ""
    until = "the evaluation of the final model" if found.test else "the best model so far"
    return f" Planned time: {as_range(*cost.planned_s)}. It took {as_time(cost.took_s)} to {until}."


def over_seeds(seeds: SeedComparison) -> str:
    """The winner's figures with other seeds, compared with the published configuration, as text."""
    said = (
        f"Trained again with {len(seeds.balanced_accuracy)} other seeds, the winner reached {percent(seeds.mean)} on "
        f"average, with a standard deviation of {100 * seeds.sd:.1f} points."
    )
    if not (published := seeds.published) or not seeds.difference:
        return said
    return (
        f"{said} With the same seeds the published configuration reached {percent(published.mean)} on average "
        f"(standard deviation {100 * published.sd:.1f} points). The winner's gain, paired by seed: "
        f"{points(seeds.difference, OBJECTIVE_NAME)}. It is not too high from the choice of a winner, but it is of the "
        "same images on which the winner was chosen."
    )


def _edges(found: SearchResults, winner: TrialRecord) -> str:
    at = [
        f"{name.replace('_', ' ')} {value:.3g} ({where} of {in_range(distribution)})"
        for name, distribution in found.space.distributions.items()
        for value in [getattr(winner.hyperparameters, name)]
        if (where := edge(value, distribution))
    ]
    if not at:
        return "The winner is inside the search space, at none of its edges."
    return f"The winner is at an edge of the search space: {'; '.join(at)}. Values beyond it have not been tried."


def _few(completed: int) -> str:
    """Which charts of the parameters are missing, as text; "" if none is."""
    drawn_from = {"parallel coordinates and slices": PARAMETERS_FROM, "the parameters' importance": IMPORTANCE_FROM}
    missing = [f"{what} from {least} on" for what, least in drawn_from.items() if completed < least]
    return f"{completed} trials ran to their end. A page has {' and '.join(missing)}." if missing else ""


def edge(value: float, distribution: BaseDistribution) -> str:
    """Where a value is in a range: "the lower end", "the upper end", "outside", or "" if it is well inside."""
    low, high, logarithmic = bounds(distribution)
    if not low <= value <= high:
        return "outside"
    if logarithmic:
        low, value, high = math.log(low), math.log(value), math.log(high)
    place = (value - low) / ((high - low) or 1.0)
    return "" if low == high or EDGE < place < 1 - EDGE else "the lower end" if place <= EDGE else "the upper end"


TRIAL_COLUMNS = (
    *("trial", "ended", "epochs", OBJECTIVE_NAME, "accuracy", "negative log-likelihood"),
    *(name.replace("_", " ") for name in PUBLISHED.resolved.as_dict()),
)


def trial_rows(found: SearchResults) -> list[list[str | int]]:
    """A row for every trial that has started, with the columns `TRIAL_COLUMNS`."""
    rows: list[list[str | int]] = []
    for trial in found.trials:
        last = trial.last
        shares = (last.balanced_accuracy, last.accuracy) if last else ()
        figures = [*map(percent, shares), f"{last.log_loss:.3f}"] if last else ["", "", ""]
        values = [f"{value:.3g}" for value in trial.hyperparameters.resolved.as_dict().values()]
        rows.append([trial.number, trial.outcome.value, len(trial.history), *figures, *values])
    return rows


def failures(found: SearchResults) -> list[tuple[int, str]]:
    """The trials that diverged, ran out of memory or failed, and why."""
    return [(trial.number, trial.ended) for trial in found.trials if trial.outcome in UNSUCCESSFUL]


def search_charts(found: SearchResults) -> dict[str, Any] | None:
    """The charts of a search; None before the first epoch has ended."""
    trials, varied = found.trials, found.space.distributions
    if not any(trial.last for trial in trials):
        return None
    winner = found.winner.number if found.winner else None
    importance = parameter_importance(trials, varied) if found.completed >= IMPORTANCE_FROM else {}
    are_many = found.completed >= PARAMETERS_FROM
    return {
        "history": charts.history(trials, winner, found.judged),
        "curves": charts.curves(trials, winner, found.judged),
        "importances": charts.importances(importance) if importance else "",
        "parallel": charts.parallel(trials, varied, winner) if are_many else "",
        "slices": [
            charts.slice_of(trials, name, distribution, winner, epochs=found.settings["epochs"])
            for name, distribution in varied.items()
            if are_many
        ],
        "few": _few(found.completed),
        "timeline": charts.timeline(trials, winner),
    }


def facts(found: SearchResults) -> list[tuple[str, str]]:
    """The facts that the figures depend on: data, seed, machines, time."""
    epochs = sum(len(trial.history) for trial in found.trials)
    training_s = sum(trial.seconds for trial in found.trials)
    size = found.settings["image_size"]
    return [
        ("data", "drawn by lungct_tune.data.phantoms" if found.phantoms else str(found.settings["data"])),
        ("fingerprint of the data", found.settings["fingerprint"]),
        ("images", f"{size} x {size} pixels, 8-bit grey"),
        ("pretrained weights", str(found.settings["weights"])),
        ("seed", str(found.settings["seed"])),
        ("hardware", found.study["cluster"] or "not noted"),
        ("trials", f"{found.done}, of {epochs} epochs in all"),
        ("time of the search", f"{as_time(found.study['wall_s'])}; in epochs {as_time(training_s)}"),
    ]
