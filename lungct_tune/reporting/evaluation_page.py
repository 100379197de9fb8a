"""The page on external images that a bundle's model was evaluated on."""

from __future__ import annotations

from lungct_tune.data import ImageSet
from lungct_tune.experiment.metrics import EvaluationMetrics, TestMetrics, WithoutOverlap
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.reporting.format import TRAINED_ON_PHANTOMS, figure, missing_in_words, place_name
from lungct_tune.reporting.html import render
from lungct_tune.reporting.test_charts import worth
from lungct_tune.reporting.test_section import Network, Pictures, compared_accuracies, test_section
from lungct_tune.reporting.verdict import against_the_simple, hardest, is_above_zero
from lungct_tune.training.objective import OBJECTIVE_NAME


def evaluation_page(
    searched: str,
    metrics: EvaluationMetrics,
    predictions: Predictions,
    images: ImageSet,
    network: Network,
    command: str,
    *,
    phantoms: bool,
) -> bytes:
    """Makes the report.html of `lungct_tune.evaluate`.

    Args:
        searched: the search that made the model.
        command: the command line.
        phantoms: whether the model was trained on phantoms.
    """
    test = metrics.test
    shown = {
        "title": f"Evaluation of the model of {searched} on {place_name(metrics.data)}",
        "verdict": external_verdict(metrics, searched),
        "warnings": [*([TRAINED_ON_PHANTOMS] if phantoms else []), *left_out(metrics)],
        "sections": [*((section, section) for section in ("verdict", "test", "mistakes")), ("again", "do it again")],
        "shows_images": True,
        "worth_chart": worth(compared_accuracies(test), OBJECTIVE_NAME),
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
    new = test.without_overlap or test
    asked = (
        f"How well does the model of {searched} tell {', '.join(classes)} and {last} apart in these external images?"
    )
    figures = f"accuracy {figure(new.accuracy)}, balanced accuracy {figure(new.balanced_accuracy)}"
    if test.without_overlap is None:
        found = f"On {test.n} images in {test.groups} groups: {figures}.{missing_in_words(new.missing)}"
    elif not new.n:
        found = f"The model was trained on images of all {test.groups} groups, or on images that look like them."
    else:
        found = (
            f"On the {new.n} images of groups that the model was not trained on: {figures}."
            f"{missing_in_words(new.missing)} It was trained on images of the groups of the {test.n - new.n} others, "
            f"or on images that look like them. On all {test.n} images the accuracy is too high: "
            f"{figure(test.accuracy)}."
        )
    return [("Question", asked), ("Result", found), ("Conclusion", _worth(new))]


def left_out(metrics: EvaluationMetrics) -> list[str]:
    """Which images could not be evaluated, a sentence for each reason."""
    reasons = {
        "are mapped to other, which is not a class of the model": metrics.left_out.other,
        "could not be read": metrics.left_out.unreadable,
        "are in the folders of several classes": metrics.left_out.under_several_classes,
    }
    return [f"{n} images were left out: they {reason}." for reason, n in reasons.items() if n]


def _worth(new: TestMetrics | WithoutOverlap) -> str:
    """What the figures on groups that the model was not trained on are worth."""
    if not new.n:
        return "None: no group is new to the model."
    if not new.references:
        return (
            "The images are of one class. They show how many of them the model recognises, and not whether it tells "
            "classes apart: a rule that always names this class is right on all of them."
        )
    compared = against_the_simple(new, disease=True)
    if not is_above_zero(hardest(new)):
        return compared
    return f"{compared} The figures hold for images and patients like these. They say nothing about others."
