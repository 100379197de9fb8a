"""The page on external images that a bundle's model was evaluated on."""

from __future__ import annotations

from pathlib import PurePath

from lungct_tune.data import ImageSet
from lungct_tune.experiment.metrics import EvaluationMetrics
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.reporting.format import figure, is_above, percent
from lungct_tune.reporting.html import render
from lungct_tune.reporting.test_charts import worth
from lungct_tune.reporting.test_section import Network, Pictures, compared_accuracies, references, test_section


def evaluation_page(
    searched: str,
    metrics: EvaluationMetrics,
    predictions: Predictions,
    images: ImageSet,
    network: Network,
    command: str,
) -> bytes:
    """Makes the report.html of `lungct_tune.evaluate`.

    Args:
        searched: the search that made the model.
        command: the command line.
    """
    test = metrics.test
    shown = {
        "name": f"{PurePath(metrics.data).name}, evaluated with the model of {searched}",
        "kind": "evaluation",
        "verdict": external_verdict(metrics, searched),
        "warnings": left_out(metrics),
        "sections": [*((section, section) for section in ("verdict", "test", "mistakes")), ("again", "do it again")],
        "shows_images": True,
        "worth_chart": worth(compared_accuracies(test)),
        "command": command,
        "facts": [("images", metrics.data), ("bundle", metrics.bundle)],
        "versions": "",
    }
    on = f"{test.n} images in {test.groups} groups, evaluated without training."
    shown |= test_section(test, predictions, Pictures(images), network, 0, on)
    return render("evaluation.html", shown)


def external_verdict(metrics: EvaluationMetrics, searched: str) -> list[tuple[str, str]]:
    """The question, the result and the conclusion of an evaluation, each with its title.

    Args:
        searched: the search that made the model.
    """
    test, (*classes, last) = metrics.test, metrics.test.per_class
    ((_, majority),) = references(test)
    asked = (
        f"How well does the model of {searched} tell {', '.join(classes)} and {last} apart in these external images?"
    )
    found = (
        f"Accuracy {figure(test.accuracy)} on {test.n} images in {test.groups} groups; balanced accuracy "
        f"{figure(test.balanced_accuracy)}. Always predicting the largest class has an accuracy of "
        f"{percent(majority.accuracy.value)}."
    )
    return [("Question", asked), ("Result", found), ("Conclusion", _worth(metrics))]


def left_out(metrics: EvaluationMetrics) -> list[str]:
    """Which images could not be evaluated, a sentence for each reason."""
    reasons = {
        "are mapped to other, which is not a class of the model": metrics.left_out.other,
        "could not be read": metrics.left_out.unreadable,
        "are in the folders of several classes": metrics.left_out.under_several_classes,
    }
    return [f"{n} images were left out: they {reason}." for reason, n in reasons.items() if n]


def _worth(metrics: EvaluationMetrics) -> str:
    test, learned = metrics.test, metrics.learned_from.total
    new = test.without_overlap or test
    if not new.n:
        return "None: the model was trained on all of these images, or on images that look like them."
    overlap = (
        f"The model was trained on {learned} of the {test.n} images, or on images that look like them. On the "
        f"{new.n} others its accuracy is {figure(new.accuracy)}. "
        if learned
        else ""
    )
    if not is_above(new.accuracy, new.references["majority class"].accuracy):
        return f"{overlap}The model is not shown to be better than always predicting the largest class."
    return f"{overlap}This accuracy holds for images and patients like these. It says nothing about others."
