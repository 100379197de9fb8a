"""Prints a comparison of models on the same test images, and makes its page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lungct_tune.evaluation.comparison import Comparison, Judged
from lungct_tune.experiment.metrics import Figure
from lungct_tune.reporting.format import figure
from lungct_tune.reporting.html import render
from lungct_tune.reporting.test_charts import worth

LIMITS = (
    "McNemar's test assumes independent images. If groups have several images, use the intervals. With several "
    "models, some interval leaves out 0 by chance: each is for one comparison alone."
)


def print_comparison(judged: Sequence[Judged], compared: Sequence[Comparison], console: Console) -> None:
    """Prints each model's accuracy, and its differences to the first."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, soft_wrap=True, markup=False)

    first = judged[0]
    say(f"{first.metrics.n} test images in {first.metrics.groups} groups")
    say(f"\n{first.name}: accuracy {figure(first.metrics.accuracy)}", "bold")
    for model, other in zip(judged[1:], compared, strict=True):
        say(f"\n{model.name}: accuracy {figure(model.metrics.accuracy)}", "bold")
        table = Table("in percentage points", "difference to the first", "95 % interval")
        for name, difference in other.differences.items():
            table.add_row(name, *points(difference))
        console.print(table)
        say(sentence(first, other))
    say(f"\n{LIMITS}", "dim")


def comparison_page(judged: Sequence[Judged], compared: Sequence[Comparison], command: str) -> bytes:
    """Makes the page of a comparison.

    Args:
        command: the command line.
    """
    first = judged[0]
    rows = [(one.name, one.metrics.accuracy.value or 0.0, one.metrics.accuracy.ci95, one is first) for one in judged]
    shown = {
        "title": f"Comparison of {len(judged)} models on the same {first.metrics.n} test images",
        "warnings": [],
        "sections": [("verdict", "verdict"), ("differences", "differences"), ("again", "do it again")],
        "shows_images": False,
        "first": first.name,
        "compared": [(other, sentence(first, other)) for other in compared],
        "columns": list(compared[0].differences),
        "points": points,
        "limits": LIMITS,
        "test": first.metrics,
        "worth_chart": worth(rows),
        "command": command,
        "facts": [("models", ", ".join(one.name for one in judged))],
        "versions": "",
    }
    return render("comparison.html", shown)


def sentence(first: Judged, other: Comparison) -> str:
    """Whether a model is shown to be better than the first, and McNemar's test."""
    low, high = other.differences["accuracy"].ci95 or (0.0, 0.0)
    shown = "more accurate" if low > 0 else "less accurate" if high < 0 else "neither more nor less accurate"
    return (
        f"{other.name} is shown to be {shown} than {first.name}. {other.gained} images are right with it only, "
        f"{other.lost} with {first.name} only: McNemar's exact p = {other.mcnemar_p:.2g}."
    )


def points(f: Figure) -> tuple[str, str]:
    """A difference and its interval in percentage points."""
    if f.value is None:
        return "not defined", ""
    return f"{100 * f.value:+.1f}", f"{100 * f.ci95[0]:+.1f} to {100 * f.ci95[1]:+.1f}" if f.ci95 else "unknown"
