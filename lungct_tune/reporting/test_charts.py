"""Charts of test results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from sklearn.metrics import precision_recall_curve, roc_curve

from lungct_tune.evaluation.decision_curve import net_benefit
from lungct_tune.experiment.metrics import CancerMetrics, ClassMetrics, Figure, RatesAt, ReliabilityBins
from lungct_tune.reporting.format import interval, percent
from lungct_tune.reporting.svg import BAD, GRID, INK, SOFT, WINNER, Chart, in_percent, line_style, plain, styled

MOST_LETTERS = 45
"""Of a name in a chart of half the page's width."""


@styled
def worth(rows: Sequence[tuple[str, float, Sequence[float] | None, bool]], of: str = "accuracy") -> Markup:
    """Draws shares from 0 to 1, one line each.

    Args:
        rows: name, share, interval, whether it is the model's.
        of: the name of the shares.
    """
    chart = Chart(4.4, 0.4 + 0.5 * len(rows))
    axes = chart.axes
    for row, (name, value, ends, ours) in enumerate(rows):
        colour = WINNER if ours else SOFT
        if ends:
            axes.plot(ends, [row, row], color=colour, linewidth=4, alpha=0.35, solid_capstyle="round")
        axes.plot([value], [row], "o" if ours else "D", color=colour, markersize=8 if ours else 6)
        axes.text(
            0, row - 0.3, f"{_shortened(name)}: {100 * value:.1f} %", color=INK, weight="bold" if ours else "normal"
        )
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.6, -0.8), yticks=[])
    axes.spines["left"].set_visible(False)
    in_percent(axes.xaxis)
    values = "; ".join(f"{name} {value:.3f}" for name, value, _, _ in rows)
    return chart.svg(f"{of.capitalize()} on the same test images, with 95 % intervals: {values}")


def _shortened(name: str) -> str:
    """The end of a long name, such as a path: else no room for the chart would be left."""
    return plain(name if len(name) <= MOST_LETTERS else f"…{name[1 - MOST_LETTERS :]}")


@styled
def roc(labels_N: np.ndarray, probabilities_NC: np.ndarray, per_class: Mapping[str, ClassMetrics]) -> Markup:
    """Each class against the rest: sensitivity against 1 - specificity."""
    chart, axes = _of_shares(diagonal=True)
    for c, name in _defined(labels_N, per_class):
        false_alarms, sensitivity, _ = roc_curve(labels_N == c, probabilities_NC[:, c])
        (line,) = axes.plot(false_alarms, sensitivity, label=plain(name), **line_style(c))
        chart.tip(line, f"{name}, {per_class[name].n} images: AUROC {_with_interval(per_class[name].auroc)}")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC, one class against the rest")
    chart.legend("lower right")
    return chart.svg("ROC curves of each class against the rest; the table below has the areas under them")


@styled
def precision_recall(
    labels_N: np.ndarray, probabilities_NC: np.ndarray, per_class: Mapping[str, ClassMetrics]
) -> Markup:
    """Each class against the rest: precision against recall."""
    chart, axes = _of_shares(diagonal=False)
    for c, name in _defined(labels_N, per_class):
        value, sensitivity, _ = precision_recall_curve(labels_N == c, probabilities_NC[:, c])
        (line,) = axes.plot(sensitivity, value, label=plain(name), **line_style(c))
        area = _with_interval(per_class[name].average_precision)
        chart.tip(line, f"{name}, {per_class[name].n} images: average precision {area}")
    axes.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)", title="precision and recall", ylim=(0, 1.03))
    chart.legend("best")
    return chart.svg("Precision-recall curves of each class against the rest")


def _of_shares(*, diagonal: bool) -> tuple[Chart, Axes]:
    """A chart with a share on either axis."""
    chart = Chart(4.4, 3.6)
    if diagonal:
        chart.axes.plot([0, 1], [0, 1], color=GRID, linewidth=1)
    in_percent(chart.axes.xaxis)
    in_percent(chart.axes.yaxis)
    return chart, chart.axes


def _with_interval(f: Figure) -> str:
    return percent(f.value) + (f" (95 % interval {interval(f)})" if f.ci95 else "")


def _defined(labels_N: np.ndarray, classes: Iterable[str]) -> list[tuple[int, str]]:
    """Index and name of each class that has a curve: some images are of the class, and some are not."""
    return [(c, name) for c, name in enumerate(classes) if 0 < (labels_N == c).sum() < len(labels_N)]


@styled
def cancer_roc(is_N: np.ndarray, score_N: np.ndarray, cancer: CancerMetrics) -> Markup:
    """Sensitivity for cancer against 1 - specificity, with the thresholds that were chosen on other images."""
    chart, axes = _of_shares(diagonal=True)
    false_alarms, sensitivity, _ = roc_curve(is_N, score_N)
    (line,) = axes.plot(false_alarms, sensitivity, color=WINNER, label="cancer")
    images = f"{cancer.n_cancer} images of cancer, {cancer.n_normal} normal images"
    chart.tip(line, f"{images}: AUROC {_with_interval(cancer.auroc)}")
    at = cancer.at_95_specificity
    points: list[tuple[str, str, CancerMetrics | RatesAt]] = [("o", "operating point", cancer)]
    if at is not None:
        points.append(("D", "threshold for 95 % specificity", at))
    for mark, name, rates in points:
        if rates.sensitivity.value is not None and rates.specificity.value is not None:
            label = f"{name}: {100 * rates.threshold:.1f} %"
            x, y = 1 - rates.specificity.value, rates.sensitivity.value
            (point,) = axes.plot([x], [y], mark, color=BAD, markersize=8, label=label, clip_on=False)
            hit, spared = _with_interval(rates.sensitivity), _with_interval(rates.specificity)
            chart.tip(point, f"{label}; sensitivity {hit}, specificity {spared}")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC, cancer against normal")
    chart.legend("lower right")
    return chart.svg("ROC curve for cancer against normal, with the operating point marked")


@styled
def decision(is_N: np.ndarray, score_N: np.ndarray) -> Markup:
    """The decision curve: the net benefit of the model, of treating all as cancer, and of treating none."""
    chart = Chart(4.4, 3.6)
    axes = chart.axes
    thresholds_T = np.linspace(0.01, 0.99, 99)
    prevalence, all_N = float(is_N.mean()), np.ones(len(is_N))
    axes.plot(thresholds_T, net_benefit(is_N, score_N, thresholds_T), "-", color=WINNER, label="this model")
    axes.plot(thresholds_T, net_benefit(is_N, all_N, thresholds_T), "--", color=SOFT, label="all count as cancer")
    axes.axhline(0, color=SOFT, linestyle=":", label="none counts as cancer")
    axes.set(xlabel="probability of cancer from which one acts", ylabel="net benefit", title="decision curve")
    axes.set(xlim=(0, 1), ylim=(-0.3 * prevalence, 1.1 * prevalence))
    in_percent(axes.xaxis)
    axes.legend(loc="lower left")
    return chart.svg("Decision curve: net benefit by threshold, of the model, of acting on all images and on none")


@styled
def reliability(curves: Mapping[str, ReliabilityBins]) -> Markup:
    """The reliability diagram: accuracy by confidence, before and after temperature scaling.

    Args:
        curves: by name; for each bin that has images: mean confidence, accuracy, number of images.
    """
    chart, axes = _of_shares(diagonal=True)
    for (name, bins), colour, dashes in zip(curves.items(), (SOFT, WINNER), ("--", "-"), strict=False):
        confidence, accuracy, n = np.array(bins).T
        axes.plot(confidence, accuracy, dashes, color=colour, linewidth=1.2, label=name)
        for x, y, images in bins:
            point = axes.scatter([x], [y], s=12 + 160 * images / n.sum(), color=colour, alpha=0.7, linewidths=0)
            chart.tip(point, f"{name}: {images} images, confidence {percent(x)}, accuracy {percent(y)}")
    axes.set(xlabel="confidence", ylabel="accuracy", title="reliability diagram", xlim=(0, 1.03))
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="upper left")
    return chart.svg("Reliability diagram: accuracy by confidence")
