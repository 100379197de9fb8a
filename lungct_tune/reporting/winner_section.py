"""The winner, as the report shows it: against the published configuration, its network, its learning curves."""

from __future__ import annotations

from typing import Any

from lungct_tune.config.hyperparameters import PUBLISHED, Hyperparameters
from lungct_tune.experiment.results import SearchResults
from lungct_tune.experiment.study import (
    best_figures,
    hyperparameters_of,
)
from lungct_tune.models.complexity import _sums, model_profile
from lungct_tune.models.truncated_resnet import ACTIVATIONS, activation_nodes
from lungct_tune.reporting import search_charts as charts
from lungct_tune.reporting.format import percent
from lungct_tune.training.objective import OBJECTIVE


def compared(configuration: Hyperparameters) -> list[tuple[str, str, str]]:
    """The published configuration and another, parameter by parameter, as text."""
    ours, theirs = configuration.as_dict(), PUBLISHED.as_dict()
    ours["frozen_depth"], theirs["frozen_depth"] = configuration.frozen_depth, PUBLISHED.frozen_depth
    return [(name.replace("_", " "), f"{theirs[name]:.3g}", f"{ours[name]:.3g}") for name in ours]


def _winner(found: SearchResults) -> dict[str, Any] | None:
    if found.winner is None:
        return None
    configuration, best = hyperparameters_of(found.winner), best_figures(found.winner)
    size, classes = found.settings["image_size"], len(found.classes)
    ours, whole = (model_profile(depth, classes, size) for depth in (configuration.truncation_depth, ACTIVATIONS))
    published = model_profile(PUBLISHED.truncation_depth, classes, size)
    baseline = best_figures(found.baseline) if found.baseline else None
    history, published_history = found.winner.user_attrs["history"], []
    if found.baseline and found.baseline.number != found.winner.number:
        published_history = found.baseline.user_attrs["history"]
    bars, labels = _activations(configuration.truncation_depth, configuration.frozen_depth)
    return {
        "compared": compared(configuration),
        "reached": [
            (f"{what} {found.judged}", percent(baseline[key]) if baseline else "", percent(best[key]))
            for key, what in ((OBJECTIVE, "balanced accuracy"), ("accuracy", "accuracy"))
        ],
        "depth": configuration.truncation_depth,
        "frozen": configuration.frozen_depth,
        "bars": bars,
        "stage_labels": labels,
        "stages": [
            *((stage, ours.parameters[stage], ours.flops[stage]) for stage in ours.parameters),
            ("this network", *_sums(ours)),
            ("published, 20 activations", *_sums(published)),
            ("all 49 activations", *_sums(whole)),
        ],
        "best_epoch": int(best["epoch"]),
        "validation": charts.validation(history, published_history, found.judged),
        "losses": charts.losses(history, found.judged),
    }


def _activations(depth: int, frozen: int) -> tuple[list[dict[str, Any]], list[tuple[str, float]]]:
    """The bars of the network's drawing, and its stages' names with their places."""
    heights = {"relu": 76, "layer1": 66, "layer2": 54, "layer3": 40, "layer4": 28}
    bars: list[dict[str, Any]] = []
    x = 4.0
    for k, node in enumerate(activation_nodes(), start=1):
        stage = node.partition(".")[0]
        x += 8 if bars and bars[-1]["stage"] != stage else 0
        state = "frozen" if k <= frozen else "learned" if k <= depth else "gone"
        bars.append({"k": k, "stage": stage, "x": x, "height": heights[stage], "state": state})
        x += 12
    labels = [("stem", 20.0)]
    for stage in list(heights)[1:]:
        of_stage = [bar["x"] for bar in bars if bar["stage"] == stage]
        labels.append((stage, (of_stage[0] + of_stage[-1]) / 2 + 8))
    return bars, [*labels, ("head", 669.0)]
