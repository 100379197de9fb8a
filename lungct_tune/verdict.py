"""What the report says of a search, in sentences and rows: the verdict first, then what speaks for and against it."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lungct_tune.auditing.shortcuts import RULES
from lungct_tune.config.hyperparameters import PUBLISHED, Configuration
from lungct_tune.config.search_space import in_range
from lungct_tune.config.settings import Settings, flags
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.experiment.study import (
    BASELINE,
    COMPLETED,
    DIVERGED,
    FAILED,
    best_figures,
    configuration_of,
    how_ended,
)
from lungct_tune.training.objective import OBJECTIVE, OBJECTIVE_NAME, OBJECTIVE_SD

if TYPE_CHECKING:
    from collections.abc import Mapping

    from optuna.trial import FrozenTrial

    from lungct_tune.experiment.results import Findings

EDGE = 0.02
"""A value within this share of a range from its end counts as lying at the edge of the space."""

LATE = 0.1
"""A best epoch within this share of the epochs from the last counts as still improving."""

FEWEST = 4
"""Completed trials that it takes to ask which parameter matters."""

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


def verdict(found: Findings) -> tuple[str, str, str]:
    """What was asked, what was found, what it is worth: a sentence each."""
    return _asked(found), _found_out(found), _worth(found)


def _asked(found: Findings) -> str:
    *others, last = found.classes
    split = {
        "grouped": "split so that copies and slices of one series stay together",
        "official": "split as they were published",
    }[found.settings["split"]]
    return (
        f"How deep should a ResNet50 be cut, and how be trained, to tell {', '.join(others)} and {last} apart in "
        f"{len(found.split)} images ({found.data}), {split}?"
    )


def _found_out(found: Findings) -> str:
    if found.winner is None:
        if found.has_failed:
            return f"Nothing: of {found.done} trials ({endings(found)}) none ran to its end."
        return f"Nothing yet: {found.done} of {found.settings['trials']} trials have ended ({endings(found)})."
    what = f"trial {found.winner.number} ({configuration_of(found.winner)})"
    if found.test is None:
        return (
            f"After {found.done} of {found.settings['trials']} trials, the best of those that ran to their end is "
            f"{what}, with a {OBJECTIVE_NAME} of {percent(best_figures(found.winner)[OBJECTIVE])} on the "
            f"{sum(found.searched_on.values())} images that trials are judged on."
        )
    majority = found.test["references"]["majority class"]
    return (
        f"The winner, {what}, retrained on train and validation, names the right class for "
        f"{percent(found.test['accuracy']['value'])} of {found.test['n']} test images (95 % interval "
        f"{interval(found.test['accuracy'])}), where always saying {majority['name']} is right for "
        f"{percent(majority['accuracy']['value'])}."
    )


def _worth(found: Findings) -> str:
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


def endings(found: Findings) -> str:
    """How many trials ended how, in words."""
    return ", ".join(f"{n} {how}" for how, n in found.ended.items()) or "none has ended"


def standing(found: Findings) -> str:
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


def compared_accuracies(test: Mapping[str, Any]) -> list[tuple[str, float, list[float] | None, bool]]:
    """Accuracies on the same images: the model's, then what there is to compare with."""
    rows = [("this model", test["accuracy"], True)]
    if apart := test["leak_free"]:
        rows.append((f"this model, {apart['n']} images new to it", apart["accuracy"], True))
    rows += [(name, row["accuracy"], False) for name, row in references(test)]
    return [(name, f["value"], f["ci95"], ours) for name, f, ours in rows if f["value"] is not None]


def references(test: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What else was judged on the same test images, by what the report calls it."""
    titles = {"published": "published configuration", "shortcut": "shortcut: {}", "majority class": "always {}"}
    there = test["references"]
    return [(title.format(there[key]["name"]), there[key]) for key, title in titles.items() if key in there]


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


def about_the_search(found: Findings) -> list[str]:
    """What a sceptical reader asks of a search, a sentence or two each."""
    judged_on = {name: n for name, n in found.searched_on.items() if n}
    smallest, n = min(judged_on.items(), key=lambda pair: pair[1])
    without = [name for name in found.classes if name not in judged_on]
    seen = f", but of {found.seen} test images {SAME_GROUP}" if found.seen else ""
    said = [
        "The rule that chose the winner was fixed before the search began: of the trials that ran to their end "
        f"without diverging, the one with the highest {OBJECTIVE_NAME} {found.judged} at its best epoch; of equals, "
        f"the one with the lower log loss. No trial was shown a test image{seen}.",
        f"{found.done} of {found.settings['trials']} trials have ended: {endings(found)}.",
        f"Trials were judged {found.judged}: on {sum(judged_on.values())} images, the fewest, {n}, of {smallest}. One "
        f"of these changes the {OBJECTIVE_NAME} by {100 / (len(judged_on) * n):.1f} points; smaller differences "
        "between trials say nothing." + (f" There was none of {' and '.join(without)}." if without else ""),
    ]
    if found.winner is None:
        return said
    if spread := best_figures(found.winner).get(OBJECTIVE_SD):
        said.append(f"Over the folds, the winner's {OBJECTIVE_NAME} has a standard deviation of {percent(spread)}.")
    said += [_edges(found, found.winner), _improving(found, found.winner)]
    if found.winner.number == BASELINE:
        said.append(
            "The winner is the published configuration: "
            + ("nothing else was tried." if found.done == 1 else "nothing else that was tried did better.")
        )
    elif found.baseline is not None:
        gain = best_figures(found.winner)[OBJECTIVE] - best_figures(found.baseline)[OBJECTIVE]
        said.append(
            f"{found.judged.capitalize()} the winner is {100 * gain:.1f} points of {OBJECTIVE_NAME} above the "
            f"published configuration: as the best of {found.done} trials, which flatters it."
        )
    if seeds := found.metrics.get("seeds"):
        said.append(
            f"Trained anew with {len(seeds[OBJECTIVE])} other seeds, the winner reached {percent(seeds['mean'])} on "
            f"average, with a standard deviation of {100 * seeds['sd']:.1f} points"
            + ("." if found.baseline is None else f": {_seeds_against_the_published(found, seeds)}.")
        )
    return said


def _seeds_against_the_published(found: Findings, seeds: Mapping[str, Any]) -> str:
    assert found.baseline is not None and found.winner is not None
    gain = f"{100 * (seeds['mean'] - best_figures(found.baseline)[OBJECTIVE]):+.1f} points against"
    if found.winner.number == BASELINE:
        return f"{gain} its own training in the search"
    return f"{gain} the published configuration's one training, without the luck of being chosen"


def _edges(found: Findings, winner: FrozenTrial) -> str:
    at = [
        f"{name.replace('_', ' ')} {value:.3g} ({where} of {in_range(distribution)})"
        for name, distribution in found.space.distributions.items()
        for value in [getattr(configuration_of(winner), name)]
        if (where := edge(value, distribution))
    ]
    if not at:
        return "The winner lies inside the space, at none of its edges."
    return f"The winner lies at an edge of the space: {'; '.join(at)}. What lies beyond has not been tried."


def edge(value: float, distribution: BaseDistribution) -> str:
    """ "the lower end", "the upper end", "outside", or "" for a value that lies well inside."""
    logarithmic = False
    match distribution:
        case CategoricalDistribution(choices=choices):
            numbers = [float(str(choice)) for choice in choices]
            low, high = min(numbers), max(numbers)
        case (
            IntDistribution(low=low, high=high, log=logarithmic)
            | FloatDistribution(low=low, high=high, log=logarithmic)
        ):
            pass
    if not low <= value <= high:
        return "outside"
    if logarithmic:
        low, value, high = math.log(low), math.log(value), math.log(high)
    place = (value - low) / ((high - low) or 1.0)
    return "" if low == high or EDGE < place < 1 - EDGE else "the lower end" if place <= EDGE else "the upper end"


def _improving(found: Findings, winner: FrozenTrial) -> str:
    epochs, best = found.settings["epochs"], int(best_figures(winner)["epoch"])
    late = sum(how_ended(trial) == COMPLETED and _is_late(trial, epochs) for trial in found.trials)
    if _is_late(winner, epochs):
        about = f"The winner was still improving when it ended (best at epoch {best} of {epochs})"
    else:
        about = f"The winner was best at epoch {best} of {epochs}, and not improving any more when it ended"
    return f"{about}; {late} of {found.completed} trials that ran to their end were best in their last tenth."


def _is_late(trial: FrozenTrial, epochs: int) -> bool:
    return bool(best_figures(trial)["epoch"] > epochs * (1 - LATE))


def compared(configuration: Configuration) -> list[tuple[str, str, str]]:
    """The published configuration and another, parameter by parameter, as text."""
    ours, theirs = configuration.as_dict(), PUBLISHED.as_dict()
    ours["frozen_depth"], theirs["frozen_depth"] = configuration.frozen_depth, PUBLISHED.frozen_depth
    return [(name.replace("_", " "), f"{theirs[name]:.3g}", f"{ours[name]:.3g}") for name in ours]


def importance(found: Findings) -> dict[str, float]:
    """Optuna's importance of each parameter, the greatest first; empty where there are too few trials to tell."""
    completed = [
        trial
        for trial in found.trials
        if how_ended(trial) == COMPLETED and not _is_outside(trial)  # as a fixed one may be
    ]
    if len(completed) < FEWEST or len({trial.value for trial in completed}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    study.add_trials(completed)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _is_outside(trial: FrozenTrial) -> bool:
    return any(
        edge(trial.params[name], distribution) == "outside" for name, distribution in trial.distributions.items()
    )


TRIAL_COLUMNS = (
    *("trial", "ended", "epochs", OBJECTIVE_NAME, "accuracy", "log loss"),
    *(name.replace("_", " ") for name in PUBLISHED.as_dict()),
)


def trial_rows(found: Findings) -> list[list[str | int]]:
    """Every trial that began, as text under `TRIAL_COLUMNS`."""
    rows: list[list[str | int]] = []
    for trial in found.trials:
        best = best_figures(trial)
        figures = [f"{best[key]:.3f}" if best else "" for key in (OBJECTIVE, "accuracy", "log_loss")]
        values = [f"{value:.3g}" for value in configuration_of(trial).as_dict().values()]
        rows.append([trial.number, how_ended(trial), len(trial.user_attrs.get("history", [])), *figures, *values])
    return rows


def failures(found: Findings) -> list[tuple[int, str]]:
    """The trials that diverged or failed, and why."""
    return [
        (trial.number, trial.user_attrs.get("ended", FAILED))
        for trial in found.trials
        if how_ended(trial) in (DIVERGED, FAILED)
    ]


def about_calibration(calibration: Mapping[str, Any]) -> str:
    """How far the probabilities are off, in figures."""

    def said(f: Mapping[str, Any]) -> str:
        return f"expected calibration error {f['ece']['value']:.3f}, Brier score {f['brier']['value']:.3f}"

    before, after = calibration["before"], calibration["after"]
    if after is None:
        return f"Probabilities as the network gives them: {said(before)}."
    fitted = calibration["fitted_on"]
    return (
        f"As the network gives them: {said(before)}; after temperature scaling: {said(after)}. The temperature, "
        f"{calibration['temperature']:.2f}, was fitted on {fitted['images']} images ({fitted['what']})."
    )


def difference(test: Mapping[str, Any]) -> str:
    """The paired difference to the published configuration, where it was retrained; "" where it was not."""
    published = test["references"].get("published")
    if published is None:
        return ""
    f = published["difference"]
    between = f" (95 % interval {100 * f['ci95'][0]:+.1f} to {100 * f['ci95'][1]:+.1f})" if f["ci95"] else ""
    return (
        f"The published configuration was retrained in the same way. This model's accuracy less its, image by image: "
        f"{100 * f['value']:+.1f} points{between}; McNemar's test, which takes images as independent: "
        f"p = {published['mcnemar_p']:.2g}."
    )


def command(settings: Mapping[str, Any]) -> str:
    """What to type to run the same search again."""
    names = [name for name in Settings.model_fields if name not in ("name", "storage", "study")]
    return shlex.join(["python", "-m", "lungct_tune.search", *flags(settings, names)])


def facts(found: Findings) -> list[tuple[str, str]]:
    """What the figures rest on: data, seed, machines, time."""
    history = [epoch for trial in found.trials for epoch in trial.user_attrs.get("history", [])]
    training_s = sum(epoch["train_s"] + epoch["valid_s"] for epoch in history)
    size = found.settings["image_size"]
    return [
        ("data", "drawn by lungct_tune.data.phantoms" if found.phantoms else str(found.settings["data"])),
        ("fingerprint of the data", found.settings["fingerprint"]),
        ("images", f"{size} x {size} pixels, 8-bit grey"),
        ("weights to begin with", str(found.settings["weights"])),
        ("seed", str(found.settings["seed"])),
        ("hardware", found.study.get("cluster", "not noted")),
        ("trials", f"{found.done}, of {len(history)} epochs in all"),
        ("time of the search", f"{_duration(found.study.get('wall_s', 0))}; in epochs {_duration(training_s)}"),
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
