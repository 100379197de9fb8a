"""The page on images from elsewhere that a bundle's model was evaluated on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from lungct_tune.data import ImageSet
from lungct_tune.experiment.results import Predictions
from lungct_tune.reporting.format import figure, percent
from lungct_tune.reporting.html import render
from lungct_tune.reporting.test_charts import worth
from lungct_tune.reporting.test_section import Network, Pictures, _judged, compared_accuracies, references


def of_others(metrics: Mapping[str, Any], searched: str) -> list[tuple[str, str]]:
    """What was asked of a bundle's model on images from elsewhere, what was found, and what it is worth.

    Args:
        metrics: metrics.json of `evaluate`.
        searched: the search that made the model.
    """
    test, (*classes, last) = metrics["test"], metrics["test"]["per_class"]
    ((_, largest),) = references(test)
    new = test["leak_free"] or test
    asked = (
        f"How does the model of {searched} tell {', '.join(classes)} and {last} apart in images that its search "
        "did not have?"
    )
    found = (
        f"An accuracy of {figure(test['accuracy'])} on {test['n']} images in {test['groups']} groups, where always "
        f"naming the largest class scores {percent(largest['accuracy']['value'])}; balanced accuracy "
        f"{figure(test['balanced_accuracy'])}."
    )
    if seen := sum(metrics["learned_from"].values()):
        learned = f"The model has learned from {seen} of the {test['n']} images, or from images that look like them"
        worth = f"{learned}; on the {new['n']} others its accuracy is {figure(new['accuracy'])}. "
    else:
        worth = ""
    if not new["n"]:
        worth = "Nothing: the model has learned from all of these images, or from images that look like them."
    elif (new["accuracy"]["ci95"] or [0])[0] <= new["references"]["majority class"]["accuracy"]["value"]:
        worth += "Too few images, or too many mistakes: always naming the largest class may do as well."
    else:
        worth += "It holds for images like these, of patients like these; of others it says nothing."
    return [("Asked", asked), ("Found", found), ("Worth", worth)]


def left_out_of_others(metrics: Mapping[str, Any]) -> list[str]:
    """Which images `evaluate` could not judge, a sentence for each reason."""
    reasons = {
        "other": "are mapped to other: of no class that the model can name",
        "unreadable": "could not be read",
        "under_several_classes": "stand under several classes",
    }
    return [
        f"{metrics['left_out'][key]} images were left out: they {why}."
        for key, why in reasons.items()
        if metrics["left_out"][key]
    ]


def evaluation_page(
    searched: str, metrics: dict[str, Any], said: Predictions, images: ImageSet, network: Network, command: str
) -> bytes:
    """report.html of images from elsewhere that a bundle's model was asked about.

    Args:
        searched: the search that made the model.
        metrics: metrics.json of `lungct_tune.evaluate`.
        command: what was typed.
    """
    test = metrics["test"]
    on = f"{test['n']} images in {test['groups']} groups, judged without training."
    shown = {
        "name": f"{PurePath(metrics['data']).name}, judged by {searched}",
        "kind": "evaluation",
        "verdict": of_others(metrics, searched),
        "warnings": left_out_of_others(metrics),
        "sections": [*((section, section) for section in ("verdict", "test", "mistakes")), ("again", "do it again")],
        "shows_images": True,
        "worth_chart": worth(compared_accuracies(test)),
        "command": command,
        "facts": [(what, str(metrics[key])) for key, what in (("data", "images"), ("bundle", "bundle"))],
        "versions": "",
    }
    shown |= _judged(test, said, Pictures(images), network, 0, on)
    return render("evaluation.html", shown)
