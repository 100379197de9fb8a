"""The report's section on the winner: comparison with the published configuration, network, learning curves."""

from __future__ import annotations

from typing import Any

from lungct_tune.config.hyperparameters import PUBLISHED, Hyperparameters
from lungct_tune.experiment.results import SearchResults
from lungct_tune.models.complexity import model_profile
from lungct_tune.models.truncated_resnet import ACTIVATIONS, activation_nodes
from lungct_tune.reporting import search_charts as charts
from lungct_tune.reporting.format import percent
from lungct_tune.training.objective import OBJECTIVE


def compared(configuration: Hyperparameters) -> list[tuple[str, str, str]]:
    """The parameters of the published configuration and of another, as text: name, published value, other value."""
    ours, theirs = configuration.resolved.as_dict(), PUBLISHED.resolved.as_dict()
    ours["frozen_depth"], theirs["frozen_depth"] = configuration.frozen_depth, PUBLISHED.frozen_depth
    return [(name.replace("_", " "), f"{theirs[name]:.3g}", f"{ours[name]:.3g}") for name in ours]


def winner_section(found: SearchResults) -> dict[str, Any] | None:
    """The values for the winner's section of report.html; None before a trial has completed."""
    if found.winner is None or (last := found.winner.last) is None:
        return None
    ours = found.winner.hyperparameters
    size, classes = found.settings["image_size"], len(found.classes)
    network, whole, published = (
        model_profile(depth, classes, size)
        for depth in (ours.truncation_depth, ACTIVATIONS, PUBLISHED.truncation_depth)
    )
    baseline = found.baseline.last if found.baseline else None
    is_published = found.baseline is None or found.baseline.number == found.winner.number
    published_history = () if is_published or found.baseline is None else found.baseline.history
    ensemble = []
    if (members := found.members) > 1:
        ensemble = [(f"the ensemble of {members}", *(members * total for total in network.totals))]
    bars, labels = _activations(ours.truncation_depth, ours.frozen_depth)
    return {
        "compared": compared(ours),
        "reached": [
            (
                f"{name.replace('_', ' ')} {found.judged}",
                percent(getattr(baseline, name)) if baseline else "",
                percent(getattr(last, name)),
            )
            for name in (OBJECTIVE, "accuracy")
        ],
        "depth": ours.truncation_depth,
        "frozen": ours.frozen_depth,
        "bars": bars,
        "stage_labels": labels,
        "stages": [
            *((stage, network.parameters[stage], network.flops[stage]) for stage in network.parameters),
            ("this network", *network.totals),
            *ensemble,
            ("published, 20 activations", *published.totals),
            ("all 49 activations", *whole.totals),
        ],
        "validation": charts.validation(found.winner.history, published_history, found.judged),
        "losses": charts.losses(found.winner.history, found.judged),
    }


def _activations(depth: int, frozen: int) -> tuple[list[dict[str, Any]], list[tuple[str, float]]]:
    """The bars of the network's drawing, and the names of its stages with their positions."""
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
