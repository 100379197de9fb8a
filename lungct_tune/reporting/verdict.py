"""The verdict of a search: the question, the result and the conclusion."""

from __future__ import annotations

from collections.abc import Iterator

from lungct_tune.auditing.shortcuts import RULES
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.experiment.metrics import MAJORITY, PUBLISHED, Figure, ReferenceAccuracy, TestMetrics, WithoutOverlap
from lungct_tune.experiment.results import SearchResults
from lungct_tune.experiment.trial import BASELINE
from lungct_tune.reporting.format import (
    SAME_GROUP,
    endings,
    figure,
    interval,
    looks_in_words,
    missing_in_words,
    percent,
    points,
)
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
    majority = found.test.references[MAJORITY]
    how = "retrained on train and validation"
    if found.members > 1:
        how = f"as an ensemble of the models of its {found.members} folds"
    return (
        f"The winner, {what}, {how}, is right on {percent(found.test.accuracy.value)} of "
        f"{found.test.n} test images (95 % interval {interval(found.test.accuracy)}). Its balanced accuracy, the mean "
        f"over the classes of the share that is right, is {figure(found.test.balanced_accuracy)}. Always predicting "
        f"{majority.name} is right on {percent(majority.accuracy.value)}.{missing_in_words(found.test.missing)}"
    )


def _worth(found: SearchResults) -> str:
    """How far the result holds: the hardest comparison first. With group overlap, on the images without it."""
    if found.winner is None:
        worth = "None: there is no model."
    elif found.test is None:
        worth = (
            f"None yet: the trial was chosen by its figures {found.judged}, so these are too high. The test split "
            "has not been used."
        )
    else:
        worth = " ".join(filter(None, _worth_of_test(found, found.test)))
    return f"{PHANTOMS} {worth}" if found.phantoms else worth


def _worth_of_test(found: SearchResults, test: TestMetrics) -> Iterator[str]:
    overlap = f"For {found.seen} of the {test.n} test images {SAME_GROUP} is in train or validation"
    new = test.without_overlap or test
    if not new.n:
        yield f"None: there is no test image without group overlap. {overlap}."
        return
    is_shown = is_above_zero(hardest(new, but=PUBLISHED))
    yield against_the_simple(new, disease=not found.phantoms)
    yield against_the_published(found, new)
    if found.seen:
        too_high = "The figures on all test images are too high. " if is_shown else ""
        accuracy, balanced = figure(new.accuracy), figure(new.balanced_accuracy)
        yield (
            f"{too_high}{overlap}. On the {new.n} others the accuracy is {accuracy} and the balanced accuracy "
            f"{balanced}; the comparisons are made on these.{missing_in_words(new.missing)}"
        )
    if is_shown and not found.phantoms:
        yield _scope(found)
    yield looks_in_words(found.bundle.metrics.looks if found.bundle else None)


def _scope(found: SearchResults) -> str:
    """What a result does not show even where the model is better than every simple rule."""
    given = sorted({away.class_name for away in found.audit.shortcuts.given_away}) if found.audit else []
    if given == found.classes:
        return (
            "It does not show that the model recognises disease: simple rules recognise "
            f"{' and '.join(given)} in these data (see below)."
        )
    if given:
        return (
            f"For {' and '.join(given)} the figures mean less, because a simple rule recognises this in these data "
            "(see below). For the other classes they hold for images from the same source. It is no diagnosis."
        )
    return (
        "The figures hold for images from the same source. They say nothing about other scanners, hospitals or "
        "patients. It is no diagnosis."
    )


def hardest(test: TestMetrics | WithoutOverlap, but: str = "") -> tuple[str, ReferenceAccuracy] | None:
    """The comparison that is hardest for the model: the one whose paired difference has the lowest lower end.

    The model is better than all of them only if it is better than this one, so no correction for their number is due
    (an intersection-union test, Berger, Technometrics 1982).

    Args:
        but: a kind that is left out.

    Returns:
        Its kind and the other predictions; None if no paired differences are known (bundles of version 0.1).
    """
    compared = [(kind, other) for kind, other in test.references.items() if kind != but and other.balanced_difference]
    return min(compared, key=lambda pair: _lower_end(pair[1].balanced_difference), default=None)


def is_above_zero(comparison: tuple[str, ReferenceAccuracy] | None) -> bool:
    """Whether the lower end of the paired difference is above 0."""
    return comparison is not None and _lower_end(comparison[1].balanced_difference) > 0


def _lower_end(difference: Figure | None) -> float:
    """Of a figure without an interval the lowest possible difference, because nothing is shown then."""
    return difference.ci95[0] if difference is not None and difference.ci95 else -1.0


def against_the_simple(test: TestMetrics | WithoutOverlap, *, disease: bool) -> str:
    """Whether the model is better than always predicting one class and than every shortcut, as text.

    Args:
        disease: whether the classes are diseases, and not drawn shapes.
    """
    if (comparison := hardest(test, but=PUBLISHED)) is None:
        return "It is not compared: an earlier version of lungct_tune made this bundle, without paired differences."
    kind, other = comparison
    difference = points(other.balanced_difference, OBJECTIVE_NAME)
    rule = f"a rule that sees only {RULES[other.name].title}" if other.name in RULES else "the simple rule"
    name = f"always predicting {other.name}" if kind == MAJORITY else rule
    if is_above_zero(comparison):
        if set(test.references) <= {MAJORITY, PUBLISHED}:  # no shortcut was tried
            return f"The model is better than {name}: {difference}."
        return f"The model is better than every simple rule on the same images. The hardest is {name}: {difference}."
    unless = "" if kind == MAJORITY or not disease else "The figures do not show that the model recognises disease. "
    return f"{unless}The model is not shown to be better than {name}: {difference}."


def against_the_published(found: SearchResults, test: TestMetrics | WithoutOverlap) -> str:
    """Whether the search found something better than the published configuration, as text."""
    if found.winner is not None and found.winner.number == BASELINE:
        return "" if found.done == 1 else "The search found nothing better than the published configuration."
    published = test.references.get(PUBLISHED)
    if published is None:
        return "The published configuration was not retrained, so the gain over it is not measured on test."
    if published.balanced_difference is None:
        return ""
    difference = points(published.balanced_difference, OBJECTIVE_NAME)
    if is_above_zero((PUBLISHED, published)):
        return f"It is better than the published configuration, trained in the same way: {difference}."
    return (
        "The search found nothing that is shown to be better than the published configuration, trained in the same "
        f"way: {difference}."
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
