"""Prints a comparison of searches, or of models on the same test images, and makes its page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from lungct_tune.errors import number_of
from lungct_tune.evaluation.comparison import Comparison, Judged
from lungct_tune.evaluation.search_curves import SearchCurve, time_steps, trial_steps
from lungct_tune.experiment.metrics import Figure
from lungct_tune.experiment.results import SearchResults
from lungct_tune.reporting.format import endings, figure, percent
from lungct_tune.reporting.html import render
from lungct_tune.reporting.svg import Chart, in_integers, in_percent, line_style, plain, styled, time_unit
from lungct_tune.reporting.test_charts import worth
from lungct_tune.training.objective import OBJECTIVE_NAME

LIMITS = (
    "McNemar's test assumes independent images. If groups have several images, use the intervals. With several "
    "models, some interval leaves out 0 by chance: each is for one comparison alone."
)


def print_comparison(judged: Sequence[Judged], compared: Sequence[Comparison], console: Console) -> None:
    """Prints each model's accuracy, and its differences to the first."""
    first = judged[0]
    console.print(f"{first.metrics.n} test images in {first.metrics.groups} groups")
    console.print(f"\n{first.name}: accuracy {figure(first.metrics.accuracy)}", style="bold")
    for model, other in zip(judged[1:], compared, strict=True):
        console.print(f"\n{model.name}: accuracy {figure(model.metrics.accuracy)}", style="bold")
        table = Table("in percentage points", "difference to the first", "95 % interval")
        for name, difference in other.differences.items():
            table.add_row(name, *points(difference))
        console.print(table)
        console.print(sentence(first, other))
    for text in overlaps(judged):
        console.print(text, style="bold yellow")
    console.print(f"\n{LIMITS}", style="dim")


def print_searches(curves: Sequence[SearchCurve], console: Console) -> None:
    """Prints the best validation figure so far of each search, by trials and by time."""
    table = Table(f"best {OBJECTIVE_NAME} so far", *(curve.name for curve in curves))
    for title, row in search_rows(curves):
        table.add_row(title, *row)
    console.print(table)
    for text in about_searches(curves):
        console.print(text)
    console.print()


def comparison_page(
    curves: Sequence[SearchCurve], judged: Sequence[Judged], compared: Sequence[Comparison], command: str
) -> bytes:
    """Makes the page of a comparison.

    Args:
        curves: of the searches; empty if only models are compared.
        judged: the models; fewer than two if only searches are compared.
        compared: each model but the first, compared with the first.
        command: the command line.
    """
    names = [one.name for one in curves or judged]
    test = judged[0].metrics if compared else None
    title = f"{len(names)} searches on the same validation images" if curves else f"{len(names)} models"
    sections = [("searches", "searches")] * bool(curves)
    sections += [("verdict", "final models" if curves else "verdict"), ("differences", "differences")] * bool(compared)
    shown = {
        "title": f"Comparison of {title}" + (f" on the same {test.n} test images" if test and not curves else ""),
        "warnings": [],
        "sections": [*sections, ("again", "do it again")],
        "shows_images": False,
        "searches": _searches(curves) if curves else None,
        "models": _models(judged, compared) if compared else None,
        "test": test,
        "command": command,
        "facts": [
            ("searches" if curves else "models", ", ".join(names)),
            *((curve.name, _about(curve.results)) for curve in curves),
        ],
        "versions": "",
    }
    return render("comparison.html", shown)


def search_rows(curves: Sequence[SearchCurve]) -> list[tuple[str, list[str]]]:
    """The table of the best figures so far: after how many trials, or after what time, and a cell for each search.

    A cell is empty if the search has not come so far, or if no trial had run to its end.
    """

    def cells(scores: Sequence[float | None]) -> list[str]:
        return ["" if score is None else percent(score) for score in scores]

    steps = trial_steps(curves)
    rows = [(f"after {number_of(n, 'trial')}", [curve.after_trials(n) for curve in curves]) for n in steps]
    rows += [(f"after {_time(s)}", [curve.after_seconds(s) for curve in curves]) for s in time_steps(curves)]
    took = [f", {_time(curve.seconds[-1])}" if curve.seconds else "" for curve in curves]
    ends = [f"{percent(c.best[-1])}\n{number_of(c.trials, 'trial')}{s}" for c, s in zip(curves, took, strict=True)]
    return [*[(title, cells(scores)) for title, scores in rows], ("at the end, or now", ends)]


def about_searches(curves: Sequence[SearchCurve]) -> list[str]:
    """What the table says at equal trials and at equal times, and how far it holds."""
    n = min(curve.trials for curve in curves)
    each = _each(curves, [curve.after_trials(n) for curve in curves])
    said = [f"After {number_of(n, 'trial')}, which all have: {each}."]
    if all(curve.seconds for curve in curves):
        s = min(curve.seconds[-1] for curve in curves if curve.seconds)
        said.append(f"After {_time(s)}, which all took: {_each(curves, [c.after_seconds(s) for c in curves])}.")
    else:
        said.append("A search of version 0.1 has no times, so times are not compared.")
    results = curves[0].results
    images = [n for n in results.searched_on.values() if n]
    smallest = 100 / (len(images) * min(images))
    return [
        *said,
        f"Trials were evaluated {results.judged}, on {sum(images)} images. Only trials that ran to their end count. "
        f"One image of the smallest class changes the {OBJECTIVE_NAME} by {smallest:.1f} points. Smaller differences "
        "mean nothing. A search with another --seed has another curve, so one search of each kind shows no general "
        "advantage. Times depend on the machines.",
    ]


def _each(curves: Sequence[SearchCurve], scores: Sequence[float | None]) -> str:
    said = ["none had run to its end" if score is None else percent(score) for score in scores]
    return ", ".join(f"{curve.name} {text}" for curve, text in zip(curves, said, strict=True))


def _searches(curves: Sequence[SearchCurve]) -> dict[str, Any]:
    """What the page shows of searches."""
    kinds = [False, True] if any(curve.seconds for curve in curves) else [False]
    return {
        "names": [curve.name for curve in curves],
        "rows": search_rows(curves),
        "about": about_searches(curves),
        "objective": OBJECTIVE_NAME,
        "charts": [_chart(curves, by_time=by_time) for by_time in kinds],
    }


@styled
def _chart(curves: Sequence[SearchCurve], by_time: bool) -> Markup:
    """The best figure so far of each search, by trials that ended or by time."""
    chart = Chart(4.9, 3.0)
    axes = chart.axes
    longest = max(curve.seconds[-1] for curve in curves if curve.seconds) if by_time else 0.0
    unit, name = time_unit(longest)
    for i, curve in enumerate(curves):
        x = [s / unit for s in curve.seconds or ()] if by_time else list(range(1, curve.trials + 1))
        steps = [(at, score) for at, score in zip(x, curve.best, strict=False) if score is not None]
        if steps:
            mark = "o" if len(steps) == 1 else None
            axes.step(*zip(*steps, strict=True), where="post", label=plain(curve.name), marker=mark, **line_style(i))
    axes.set(xlabel=name if by_time else "trials that have ended", ylabel=f"best {OBJECTIVE_NAME}\nso far")
    if not by_time:
        in_integers(axes.xaxis)
    in_percent(axes.yaxis)
    chart.legend("lower right")
    of = ", ".join(curve.name for curve in curves)
    return chart.svg(f"The best {OBJECTIVE_NAME} so far of {of}, by {'time' if by_time else 'trials'}")


def _models(judged: Sequence[Judged], compared: Sequence[Comparison]) -> dict[str, Any]:
    """What the page shows of models on test images."""
    first = judged[0]
    rows = [(one.name, one.metrics.accuracy.value or 0.0, one.metrics.accuracy.ci95, one is first) for one in judged]
    return {
        "first": first.name,
        "compared": [(other, sentence(first, other)) for other in compared],
        "overlaps": overlaps(judged),
        "columns": list(compared[0].differences),
        "points": points,
        "limits": LIMITS,
        "worth_chart": worth(rows),
    }


def _about(found: SearchResults) -> str:
    hardware = found.study["cluster"] or "hardware not noted"
    return f"{found.done} of {found.settings['trials']} trials: {endings(found)}; {hardware}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


def sentence(first: Judged, other: Comparison) -> str:
    """Whether a model is shown to be better than the first, and McNemar's test."""
    low, high = other.differences["accuracy"].ci95 or (0.0, 0.0)
    shown = "shown to be more" if low > 0 else "shown to be less" if high < 0 else "not shown to be more or less"
    return (
        f"{other.name} is {shown} accurate than {first.name}. {other.gained} images are right with it only, "
        f"{other.lost} with {first.name} only: McNemar's exact p = {other.mcnemar_p:.2g}."
    )


def overlaps(judged: Sequence[Judged]) -> list[str]:
    """Which models were trained on groups of the test images, a sentence for each."""
    seen = [(one.name, one.metrics.n, one.metrics.without_overlap) for one in judged]
    return [
        f"{name} was trained on images of the groups of {n - new.n} of the {n} test images: its figures are too high."
        for name, n, new in seen
        if new
    ]


def points(f: Figure) -> tuple[str, str]:
    """A difference and its interval in percentage points."""
    if f.value is None:
        return "not defined", ""
    return f"{100 * f.value:+.1f}", f"{100 * f.ci95[0]:+.1f} to {100 * f.ci95[1]:+.1f}" if f.ci95 else "unknown"
