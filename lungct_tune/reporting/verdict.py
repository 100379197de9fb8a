"""The verdict of a search: the question, the result and the conclusion."""

from __future__ import annotations

from lungct_tune.auditing.shortcuts import RULES
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.experiment.metrics import TestMetrics
from lungct_tune.experiment.results import SearchResults
from lungct_tune.reporting.format import SAME_GROUP, endings, figure, interval, is_above, percent
from lungct_tune.training.objective import OBJECTIVE_NAME


def verdict(found: SearchResults) -> tuple[str, str, str]:
    """The question, the result and the conclusion of a search, as text."""
    return _asked(found), _found_out(found), _worth(found)


def _asked(found: SearchResults) -> str:
    *others, last = found.classes
    split = {
        "grouped": "split so that copies and slices of one series stay together",
        "official": "with the published split",
    }[found.settings["split"]]
    if found.settings.get("split_file"):
        split = "with a split of your own"
    return (
        f"Where should a ResNet50 be truncated, and how should it be trained, to tell {', '.join(others)} and {last} "
        f"apart in {len(found.split)} images ({found.data}), {split}?"
    )


def _found_out(found: SearchResults) -> str:
    if found.winner is None or found.winner.last is None:
        if found.has_failed:
            return f"None: of {found.done} trials ({endings(found)}) none ran to its end."
        return f"None yet: {found.done} of {found.settings['trials']} trials have ended ({endings(found)})."
    what = f"trial {found.winner.number} ({found.winner.hyperparameters})"
    if found.test is None:
        return (
            f"After {found.done} of {found.settings['trials']} trials, the best of those that ran to their end is "
            f"{what}, with a {OBJECTIVE_NAME} of {percent(found.winner.last.balanced_accuracy)} on the "
            f"{sum(found.searched_on.values())} images that trials are evaluated on."
        )
    majority = found.test.references["majority class"]
    return (
        f"The winner, {what}, retrained on train and validation, is right on {percent(found.test.accuracy.value)} of "
        f"{found.test.n} test images (95 % interval {interval(found.test.accuracy)}). Always predicting "
        f"{majority.name} is right on {percent(majority.accuracy.value)}."
    )


def _worth(found: SearchResults) -> str:
    """The strongest objection to the result. With group overlap it uses the figures without the overlap."""
    if found.phantoms:
        return PHANTOMS
    if found.winner is None:
        return "None: there is no model."
    if found.test is None:
        return (
            f"None yet: the trial was chosen by its figures {found.judged}, so these are too high. The test split "
            "has not been used."
        )
    return _worth_of_test(found, found.test)


def _worth_of_test(found: SearchResults, test: TestMetrics) -> str:
    overlap = f"For {found.seen} of the {test.n} test images {SAME_GROUP} is in train or validation"
    new = test.without_overlap or test
    if not new.n:
        return f"None: there is no test image without group overlap. {overlap}."
    where = " without overlap" if found.seen else ""
    overlap = f" {overlap}; on the {new.n} others the accuracy is {figure(new.accuracy)}." if found.seen else ""
    majority, shortcut = new.references["majority class"], new.references.get("shortcut")
    if not is_above(new.accuracy, majority.accuracy):
        return f"The model is not shown to be better than always predicting {majority.name}{where}.{overlap}"
    if shortcut and not is_above(new.accuracy, shortcut.accuracy):
        return (
            f"The accuracy does not show that the model recognises disease: a rule that sees only "
            f"{RULES[shortcut.name].title} is right on {percent(shortcut.accuracy.value)} of the same images.{overlap}"
        )
    shortcuts = (found.audit or {}).get("shortcuts", {})
    given = sorted({easy["class"] for easy in shortcuts.get("given_away", [])})
    if given == found.classes:
        return (
            "The accuracy does not show that the model recognises disease: simple rules recognise "
            f"{' and '.join(given)} in these data (see below).{overlap}"
        )
    if found.seen:
        return f"The accuracy is too high.{overlap}"
    if given:
        return (
            f"For {' and '.join(given)} the accuracy means less, because a simple rule recognises this in these data "
            "(see below). For the other classes it holds for images from the same source. It is no diagnosis."
        )
    return (
        "The accuracy holds for images from the same source. It says nothing about other scanners, hospitals or "
        "patients. It is no diagnosis."
    )


def standing(found: SearchResults) -> str:
    """Why a search has no test results; "" if it has."""
    if found.test is not None:
        return ""
    if found.has_failed:
        return "The search failed: no trial ran to its end. The errors are listed below."
    if found.done >= found.settings["trials"]:
        return "All trials have ended, but the winner has not been retrained and evaluated: there are no test results."
    return (
        f"The search has not ended: {found.done} of {found.settings['trials']} trials so far. No figure here was "
        "measured on the test split."
    )
