"""What the report says of a search, in sentences and rows: the verdict first, then what speaks for and against it."""

from __future__ import annotations

from lungct_tune.auditing.shortcuts import RULES
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.experiment.results import SearchResults
from lungct_tune.reporting.format import SAME_GROUP, endings, figure, interval, percent
from lungct_tune.training.objective import OBJECTIVE_NAME


def verdict(found: SearchResults) -> tuple[str, str, str]:
    """What was asked, what was found, what it is worth: a sentence each."""
    return _asked(found), _found_out(found), _worth(found)


def _asked(found: SearchResults) -> str:
    *others, last = found.classes
    split = {
        "grouped": "split so that copies and slices of one series stay together",
        "official": "split as they were published",
    }[found.settings["split"]]
    return (
        f"How deep should a ResNet50 be cut, and how be trained, to tell {', '.join(others)} and {last} apart in "
        f"{len(found.split)} images ({found.data}), {split}?"
    )


def _found_out(found: SearchResults) -> str:
    if found.winner is None or found.winner.best is None:
        if found.has_failed:
            return f"Nothing: of {found.done} trials ({endings(found)}) none ran to its end."
        return f"Nothing yet: {found.done} of {found.settings['trials']} trials have ended ({endings(found)})."
    what = f"trial {found.winner.number} ({found.winner.hyperparameters})"
    if found.test is None:
        return (
            f"After {found.done} of {found.settings['trials']} trials, the best of those that ran to their end is "
            f"{what}, with a {OBJECTIVE_NAME} of {percent(found.winner.best.balanced_accuracy)} on the "
            f"{sum(found.searched_on.values())} images that trials are judged on."
        )
    majority = found.test["references"]["majority class"]
    return (
        f"The winner, {what}, retrained on train and validation, names the right class for "
        f"{percent(found.test['accuracy']['value'])} of {found.test['n']} test images (95 % interval "
        f"{interval(found.test['accuracy'])}), where always saying {majority['name']} is right for "
        f"{percent(majority['accuracy']['value'])}."
    )


def _worth(found: SearchResults) -> str:
    """The gravest thing that there is to say against what was found; of what leaks, by the figures without it."""
    test = found.test
    if found.phantoms:
        return PHANTOMS
    if found.winner is None:
        return "Nothing: there is no model."
    if test is None:
        return (
            f"Nothing that may be quoted: figures {found.judged} have chosen the trial, so they flatter it, and the "
            "test split has not been looked at."
        )
    new = test["leak_free"] or test
    low = (new["accuracy"]["ci95"] or [0])[0]
    majority, shortcut = new["references"]["majority class"], new["references"].get("shortcut")
    given = sorted({easy["class"] for easy in (found.audit or {}).get("shortcuts", {}).get("given_away", [])})
    seen = f"for {found.seen} of the {test['n']} test images {SAME_GROUP} is in train or validation"
    if not new["n"]:
        return f"Nothing: {seen}."
    seen += f"; on the {new['n']} others the accuracy is {figure(new['accuracy'])}"
    also, its = (f"; {seen}", "without what has been seen, its") if found.seen else ("", "its")
    if low <= majority["accuracy"]["value"]:
        return f"Nothing: {its} interval reaches down to what always saying {majority['name']} scores{also}."
    if shortcut and low <= shortcut["accuracy"]["value"]:
        return (
            f"Little: a rule that knows only {RULES[shortcut['name']].title} scores "
            f"{percent(shortcut['accuracy']['value'])} on the same images, so the figure does not show that the model "
            f"sees disease{also}."
        )
    if given == found.classes:
        return f"Little: trivial rules recognise {' and '.join(given)} in these data (see below){also}."
    if found.seen:
        return f"Less than it looks: {seen}."
    if given:
        return (
            f"Less for {' and '.join(given)}, which a trivial rule recognises in these data (see below); for the rest "
            "it holds for images from the same source, and is no diagnosis."
        )
    return (
        "It holds for images from the same source as these; it says nothing of other scanners, hospitals or patients, "
        "and is no diagnosis."
    )


def standing(found: SearchResults) -> str:
    """What a search lacks that has no test results; "" for one that has."""
    if found.test is not None:
        return ""
    if found.has_failed:
        return "The search failed: no trial ran to its end. What went wrong is listed below."
    if found.done >= found.settings["trials"]:
        return "All trials have ended, but the winner has not been retrained and judged: there are no test results."
    return (
        f"The search has not ended: {found.done} of {found.settings['trials']} trials so far. Nothing here has been "
        "judged on the test split."
    )
