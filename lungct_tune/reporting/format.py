"""Formats figures, intervals and names as text."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import abspath, basename
from pathlib import Path

from lungct_tune.experiment.metrics import Figure
from lungct_tune.experiment.results import SearchResults

SAME_GROUP = "an image of the same group (a copy, or of the same series or patient)"
"""The image in train or validation that makes a group overlap."""

TRAINED_ON_PHANTOMS = (
    "The model was trained on PHANTOMS, drawn by a program, not on patients: no figure here says anything about CT."
)


def percent(share: float | None) -> str:
    """A share in percent, with a no-break space."""
    return "not defined" if share is None else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def interval(f: Figure) -> str:
    """The 95 % interval of a figure in percent."""
    return f"{100 * f.ci95[0]:.1f} to {percent(f.ci95[1])}" if f.ci95 else "unknown"


def figure(f: Figure) -> str:
    """A figure in percent with its 95 % interval, if it has one."""
    return percent(f.value) + (f" ({interval(f)})" if f.ci95 else "")


def in_words(f: Figure, style: str = ".3f") -> str:
    """A figure with its 95 % interval, if it has one, as numbers."""
    if f.value is None:
        return "not defined"
    value = format(f.value, style)
    return f"{value} ({' to '.join(format(end, style) for end in f.ci95)})" if f.ci95 else value


def points(difference: Figure | None, of: str) -> str:
    """A difference of two shares in percentage points, with its 95 % interval.

    Args:
        of: the name of the shares.
    """
    if difference is None or difference.value is None:
        return f"the difference in {of} is not defined"
    value = f"{100 * difference.value:+.1f} points of {of}"
    if difference.ci95 is None:
        return f"{value}, without an interval"
    low, high = (f"{100 * end:+.1f}" for end in difference.ci95)
    return f"{value} (95 % interval {low} to {high})"


def place_name(place: Path | str) -> str:
    """The name of a folder or a URI, also of "." and ".."."""
    return basename(abspath(place))


def looks_in_words(looks: int | None) -> str:
    """What it means that several searches were evaluated on one test split; "" if only one was."""
    if looks is None or looks < 2:
        return ""
    return (
        f"{looks} finished searches on this storage have been evaluated on this test split. The figures of the best of "
        "several are too high: quote those of the first, or evaluate on images that none of them has seen."
    )


def missing_in_words(classes: Sequence[str]) -> str:
    """That classes have none of the images that were spoken of, as a further sentence; "" if there are none."""
    if not classes:
        return ""
    these = "this class" if len(classes) == 1 else "these classes"
    return f" None of these images is of {' or '.join(classes)}: the figures say nothing about {these}."


def endings(found: SearchResults) -> str:
    """The number of trials by outcome, as text."""
    return ", ".join(f"{n} {how}" for how, n in found.ended.items()) or "none has ended"


def how_split(found: SearchResults) -> str:
    """How the images were split, as text."""
    if found.settings.get("split_file"):
        return "by a given file"
    return "as published" if found.settings["split"] == "official" else "at random by groups"


_NAMES = {
    "truncation_depth": "truncation depth",
    "frozen_share": "share frozen",
    "backbone_lr": "rate, backbone",
    "head_lr": "rate, head",
    "weight_decay": "weight decay",
}


def parameter_name(name: str) -> str:
    """A parameter's name for charts."""
    return _NAMES.get(name, name.replace("_", " "))
