"""Figures, intervals and names as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lungct_tune.experiment.results import SearchResults

SAME_GROUP = "an image of the same group (a copy, or of the same series or patient)"
"""What a test image has in train or validation that has been seen."""


def percent(share: float | None) -> str:
    """With a space that no line breaks at."""
    return "not defined" if share is None else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def interval(f: Mapping[str, Any]) -> str:
    """The 95 % interval of a figure of metrics.json."""
    return f"{100 * f['ci95'][0]:.1f} to {percent(f['ci95'][1])}" if f["ci95"] else "unknown"


def figure(f: Mapping[str, Any]) -> str:
    """A figure of metrics.json with its 95 % interval, if it has one."""
    return percent(f["value"]) + (f" ({interval(f)})" if f["ci95"] else "")


def endings(found: SearchResults) -> str:
    """How many trials ended how, in words."""
    return ", ".join(f"{n} {how}" for how, n in found.ended.items()) or "none has ended"


def in_words(figure: Mapping[str, Any], style: str = ".3f") -> str:
    """A figure of `evaluate_predictions` with its interval."""
    if figure["value"] is None:
        return "not defined"
    value = format(figure["value"], style)
    return f"{value} ({' to '.join(format(end, style) for end in figure['ci95'])})" if figure["ci95"] else value


_NAMES = {
    "truncation_depth": "truncation depth",
    "frozen_share": "share frozen",
    "backbone_lr": "rate, backbone",
    "head_lr": "rate, head",
    "weight_decay": "weight decay",
}


def parameter_name(name: str) -> str:
    """A parameter as people call it."""
    return _NAMES.get(name, name.replace("_", " "))
