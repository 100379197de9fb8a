"""The report's charts of a search: static pictures with the page's colours, in light and dark mode and in print.

Optuna's own plots show the same data. But they need 5 MB of JavaScript or have a grey background, and are hard to read
on a phone or in print. Values that Optuna computes are taken from Optuna.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import BaseDistribution

from lungct_tune.experiment.trial import BASELINE, UNSUCCESSFUL, EpochFigures, Outcome, TrialRecord
from lungct_tune.reporting.format import parameter_name, percent
from lungct_tune.reporting.svg import (
    BAD,
    INK,
    OTHER,
    PUBLISHED,
    SOFT,
    WIDE,
    WINNER,
    Chart,
    in_integers,
    in_percent,
    styled,
    time_unit,
)
from lungct_tune.training.objective import OBJECTIVE_NAME

_MARKS = {
    Outcome.COMPLETED: "o",
    Outcome.STOPPED: "v",
    Outcome.DIVERGED: "X",
    Outcome.OUT_OF_MEMORY: "X",
    Outcome.FAILED: "X",
    Outcome.RUNNING: "o",
}
_DASHES = {WINNER: "-", PUBLISHED: "--", OTHER: "-"}
"""Beside the colours, for those who cannot tell these apart."""


@styled
def history(trials: Sequence[TrialRecord], winner: int | None, judged: str) -> Markup:
    """Each trial's last epoch, and the best completed trial so far.

    Args:
        judged: how trials are evaluated, as text ("on validation").
    """
    chart = Chart(4.9, 3.0)
    axes = chart.axes
    seen = _with_scores(trials)
    for trial, score in seen:
        colour, mark = _colour(trial.number, winner), _MARKS[trial.outcome]
        (point,) = axes.plot([trial.number], [score], mark, color=colour, markersize=6 if colour == OTHER else 9)
        chart.tip(point, _tip(trial))
    for outcome, mark in _MARKS.items():
        if any(trial.outcome is outcome for trial, _ in seen):
            axes.plot([], [], mark, color=OTHER, label=outcome.value)
    if done := [(trial.number, score) for trial, score in seen if trial.outcome is Outcome.COMPLETED]:
        numbers, scores = zip(*done, strict=True)
        best = list(itertools.accumulate(scores, max))
        reached, label = [*best, best[-1]], "best completed so far"
        axes.step([*numbers, trials[-1].number], reached, where="post", color=WINNER, linewidth=1.2, label=label)
    axes.set(xlabel="trial", ylabel=f"{OBJECTIVE_NAME}\n{judged}")
    in_integers(axes.xaxis)
    in_percent(axes.yaxis)
    axes.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1), handletextpad=0.1, columnspacing=1)
    return chart.svg(f"The {OBJECTIVE_NAME} of each of {len(seen)} trials {judged}, by their start")


@styled
def curves(trials: Sequence[TrialRecord], winner: int | None, judged: str) -> Markup:
    """Every trial's objective by epoch. A curve that ends early is of a trial that was stopped."""
    chart = Chart(4.9, 3.0)
    axes = chart.axes
    for trial in sorted(trials, key=lambda trial: _colour(trial.number, winner) != OTHER):
        if not trial.history:
            continue
        x, y = [epoch.epoch for epoch in trial.history], [epoch.balanced_accuracy for epoch in trial.history]
        colour = _colour(trial.number, winner)
        plain = colour == OTHER
        (line,) = axes.plot(
            x, y, _DASHES[colour], color=colour, linewidth=0.8 if plain else 2, alpha=0.6 if plain else 1
        )
        chart.tip(line, _tip(trial))
        if trial.outcome is not Outcome.COMPLETED:
            axes.plot(x[-1:], y[-1:], _MARKS[trial.outcome], color=colour, markersize=4)
    _name_colours(axes, winner)
    axes.set(xlabel="epoch", ylabel=f"{OBJECTIVE_NAME}\n{judged}")
    in_integers(axes.xaxis)
    in_percent(axes.yaxis)
    return chart.svg(f"Learning curves of {len(trials)} trials; those that were stopped early end in a triangle")


@styled
def importances(importance: Mapping[str, float]) -> Markup:
    """The share of the differences between trials that each parameter explains, the greatest on top."""
    chart = Chart(4.9, 0.6 + 0.3 * len(importance))
    axes = chart.axes
    names = [parameter_name(name) for name in importance]
    bars = axes.barh(names, list(importance.values()), color=WINNER, height=0.6)
    for bar, name, share in zip(bars, names, importance.values(), strict=True):
        chart.tip(bar, f"{name}: {percent(share)}")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", labelcolor=INK)
    in_percent(axes.xaxis)
    values = ", ".join(f"{name} {share:.2f}" for name, share in zip(names, importance.values(), strict=True))
    return chart.svg(f"Importance of the parameters: {values}")


@styled
def slice_of(
    trials: Sequence[TrialRecord], name: str, distribution: BaseDistribution, winner: int | None, *, epochs: int
) -> Markup:
    """The objective against one parameter. Paler points are trials with fewer epochs."""
    chart = Chart(2.3, 1.9)
    axes = chart.axes
    for trial, score in sorted(_with_scores(trials), key=lambda pair: _colour(pair[0].number, winner) != OTHER):
        (point,) = axes.plot(
            [getattr(trial.hyperparameters, name)],
            [score],
            "o",
            color=_colour(trial.number, winner),
            markersize=5,
            alpha=0.25 + 0.75 * min(1, len(trial.history) / epochs),
            markeredgewidth=0,
        )
        chart.tip(point, _tip(trial))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    if getattr(distribution, "log", False):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=4))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(parameter_name(name), color=INK, loc="left")
    in_percent(axes.yaxis)
    return chart.svg(f"{OBJECTIVE_NAME} against {parameter_name(name)}, a point for each trial")


@styled
def parallel(
    trials: Sequence[TrialRecord], distributions: Mapping[str, BaseDistribution], winner: int | None
) -> Markup:
    """A line for each trial, through its parameters to its objective. Better trials are darker."""
    chart = Chart(WIDE, 3.9)
    axes = chart.axes
    seen = sorted(_with_scores(trials), key=lambda pair: pair[1])
    names = list(distributions)
    values = {name: [getattr(trial.hyperparameters, name) for trial, _ in seen] for name in names}
    scales = [_scaled(values[name], log=getattr(distributions[name], "log", False)) for name in names]
    scales.append(_scaled([100 * score for _, score in seen], log=False))
    for rank, (trial, _) in enumerate(seen):
        colour, share = _colour(trial.number, winner), (rank + 1) / len(seen)
        special = colour != OTHER
        (line,) = axes.plot(
            range(len(names) + 1),
            [heights_T[rank] for heights_T, _, _ in scales],
            _DASHES[colour],
            color=colour if special else INK,
            linewidth=2.2 if special else 0.9,
            alpha=1 if special else 0.1 + 0.5 * share**2,
            zorder=3 if special else 2,
        )
        chart.tip(line, _tip(trial))
    for x, (_, bottom, top) in enumerate(scales):
        axes.plot([x, x], [0, 1], color=SOFT, linewidth=0.8, zorder=1)
        axes.text(x, 1.03, top, ha="center", va="bottom", fontsize=8, color=SOFT)
        axes.text(x, -0.03, bottom, ha="center", va="top", fontsize=8, color=SOFT)
    labels = [parameter_name(name).replace(" ", "\n", 1) for name in names]
    axes.set(ylim=(-0.12, 1.12), xlim=(-0.4, len(names) + 0.4), yticks=[], xticks=range(len(names) + 1))
    axes.set_xticklabels([*labels, OBJECTIVE_NAME.replace(" ", "\n") + ", %"], color=INK, fontsize=8.5)
    axes.grid(visible=False)
    _name_colours(axes, winner)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return chart.svg(f"Parallel coordinates of {len(seen)} trials over {', '.join(map(parameter_name, names))}")


def _scaled(values_T: Sequence[float], *, log: bool) -> tuple[np.ndarray, str, str]:
    """An axis of the parallel coordinates: the values as 0 to 1, and as text the least and the greatest."""
    heights_T = np.log(values_T) if log else np.array(values_T, dtype=float)
    heights_T -= heights_T.min()
    style = ".2g" if log else ".3g"
    return heights_T / (heights_T.max() or 1.0), format(min(values_T), style), format(max(values_T), style)


@styled
def timeline(trials: Sequence[TrialRecord], winner: int | None) -> Markup | None:
    """When each slot was inside an epoch of which trial; None if the study has no such data."""
    ran = [(trial, epoch) for trial in trials for epoch in trial.history if epoch.at and epoch.slot is not None]
    if not ran:
        return None
    began = min(_began(epoch) for _, epoch in ran)
    slots = sorted({epoch.slot for _, epoch in ran if epoch.slot is not None})
    last = max(epoch.at or 0 for _, epoch in ran) - began
    unit, name = time_unit(last)
    chart = Chart(WIDE, 1.0 + 0.3 * len(slots))
    axes = chart.axes
    for trial, epochs in itertools.groupby(ran, key=lambda pair: pair[0]):
        for slot, of_slot in itertools.groupby((epoch for _, epoch in epochs), key=lambda epoch: epoch.slot or 0):
            spans = [((_began(epoch) - began) / unit, epoch.seconds / unit) for epoch in of_slot]
            colour = _colour(trial.number, winner)
            dim = 0.75 if trial.outcome is Outcome.COMPLETED else 0.4
            bars = axes.broken_barh(
                spans,
                (slots.index(slot) - 0.36, 0.72),
                color=BAD if trial.outcome in UNSUCCESSFUL else colour,
                alpha=dim if colour == OTHER else 1,
                linewidth=0,
            )
            chart.tip(bars, _tip(trial))
            left, right = spans[0][0], spans[-1][0] + spans[-1][1]
            if right - left > 0.02 * last / unit:
                x, y = (left + right) / 2, slots.index(slot)
                axes.text(x, y, str(trial.number), ha="center", va="center", fontsize=7.5, color=INK)
    axes.set(yticks=range(len(slots)), ylim=(len(slots) - 0.5, -0.5), xlim=(0, last / unit), xlabel=name)
    axes.set_yticklabels([f"slot {slot}" for slot in slots], color=INK)
    axes.grid(axis="y", visible=False)
    _name_colours(axes, winner)
    return chart.svg(f"Time line of {len(slots)} slots: when each was in an epoch of which trial")


@styled
def validation(epochs: Sequence[EpochFigures], baseline: Sequence[EpochFigures], judged: str) -> Markup:
    """The winner's accuracies by epoch, beside the published configuration's."""
    chart = Chart(4.9, 3.0)
    axes = chart.axes
    x = [epoch.epoch for epoch in epochs]
    axes.plot(x, [epoch.balanced_accuracy for epoch in epochs], color=WINNER, linewidth=2, label="winner, balanced")
    axes.plot(x, [epoch.accuracy for epoch in epochs], color=WINNER, linestyle=":", label="winner, plain")
    if baseline:
        xs, ys = [epoch.epoch for epoch in baseline], [epoch.balanced_accuracy for epoch in baseline]
        axes.plot(xs, ys, "--", color=PUBLISHED, linewidth=1.4, label="published, balanced")
    for epoch in epochs:
        (point,) = axes.plot([epoch.epoch], [epoch.balanced_accuracy], ".", color=WINNER)
        figures = f"{OBJECTIVE_NAME} {percent(epoch.balanced_accuracy)}, accuracy {percent(epoch.accuracy)}"
        chart.tip(point, f"epoch {epoch.epoch}: {figures}")
    axes.set(xlabel="epoch", ylabel=f"accuracy {judged}")
    in_percent(axes.yaxis)
    in_integers(axes.xaxis)
    axes.legend()
    return chart.svg(f"The winner's accuracy and balanced accuracy {judged} by epoch")


@styled
def losses(epochs: Sequence[EpochFigures], judged: str) -> Markup:
    """The winner's losses by epoch."""
    chart = Chart(4.9, 3.0)
    axes = chart.axes
    x = [epoch.epoch for epoch in epochs]
    learning = [epoch.train_loss for epoch in epochs]
    axes.plot(x, [epoch.log_loss for epoch in epochs], color=WINNER, linewidth=2, label=judged)
    axes.plot(x, learning, color=WINNER, linestyle=":", label="in training (smoothed labels)")
    for epoch in epochs:
        (point,) = axes.plot([epoch.epoch], [epoch.log_loss], ".", color=WINNER)
        figures = f"{epoch.log_loss:.3f} {judged}, {epoch.train_loss:.3f} in training"
        chart.tip(point, f"epoch {epoch.epoch}: {figures}")
    axes.set(xlabel="epoch", ylabel="negative log-likelihood")
    in_integers(axes.xaxis)
    axes.legend()
    return chart.svg(f"The winner's negative log-likelihood in training and {judged} by epoch")


def _with_scores(trials: Sequence[TrialRecord]) -> list[tuple[TrialRecord, float]]:
    """The trials with at least one finished epoch, each with its last balanced accuracy."""
    return [(trial, trial.last.balanced_accuracy) for trial in trials if trial.last]


def _tip(trial: TrialRecord) -> str:
    figure = f"{percent(trial.last.balanced_accuracy)} at epoch {trial.last.epoch}; " if trial.last else ""
    return f"trial {trial.number}: {figure}{trial.ended}; {trial.hyperparameters}"


def _began(epoch: EpochFigures) -> float:
    return (epoch.at or 0) - epoch.seconds


def _colour(number: int, winner: int | None) -> str:
    return WINNER if number == winner else PUBLISHED if number == BASELINE else OTHER


def _name_colours(axes: Axes, winner: int | None) -> None:
    names = {WINNER: f"winner, trial {winner}", PUBLISHED: "published configuration", OTHER: "others"}
    if winner is None:
        del names[WINNER]
    elif winner == BASELINE:
        names = {WINNER: "winner: the published configuration", OTHER: "others"}
    for colour, name in names.items():
        axes.plot([], [], _DASHES[colour], color=colour, label=name)
    axes.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1), handlelength=1.8, columnspacing=1)
