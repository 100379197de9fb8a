"""Prints to the terminal: the data and their split, the plan, the outcome of a search, a bundle, an audit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from lungct_tune.auditing.conclusions import about_files, counted
from lungct_tune.auditing.findings import Audit, CopiesAcross
from lungct_tune.cli import command_words
from lungct_tune.config.search_space import SearchSpace, in_range
from lungct_tune.config.settings import Settings, flags
from lungct_tune.data import SPLITS, ImageSet
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.display import print_prose
from lungct_tune.errors import number_of
from lungct_tune.experiment.bundle import CHECKSUMS, CONFIG, FOLDER, METRICS
from lungct_tune.experiment.disk_use import as_size, expected_bytes, free_there, not_needed
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.forecast import as_range, as_time
from lungct_tune.experiment.metrics import (
    MAJORITY,
    PUBLISHED,
    BundleMetrics,
    EvaluationMetrics,
    TestMetrics,
    read_metrics,
)
from lungct_tune.experiment.model_config import read_config
from lungct_tune.experiment.plan import Plan
from lungct_tune.experiment.study import planned_and_taken
from lungct_tune.experiment.trial import TrialRecord
from lungct_tune.reporting.format import TRAINED_ON_PHANTOMS, in_words, looks_in_words, missing_in_words
from lungct_tune.training.objective import OBJECTIVE, judged

if TYPE_CHECKING:
    import optuna


def print_data(images: ImageSet, split: np.ndarray, console: Console) -> None:
    """Prints the split by class, and the files that were left out and why."""
    table = _table(f"{len(split)} images in {images.table['group'].nunique()} groups", "class", *SPLITS)
    for label, name in enumerate(images.classes):
        of_class = images.table["label"].to_numpy() == label
        table.add_row(name, *(str(int((of_class & (split == part)).sum())) for part in SPLITS))
    console.print(table)
    _print_left_out(images, console)


def _print_left_out(images: ImageSet, console: Console) -> None:
    if images.unreadable:
        console.print(f"left out, unreadable: {number_of(len(images.unreadable), 'file')}", style="yellow")
        for path, reason in images.unreadable:
            print_prose(console, f"  {path}: {reason}", hang=4)
    if images.conflicts:
        console.print("left out, the same image under several classes:", style="yellow")
        for paths in images.conflicts:
            console.print(f"  {', '.join(paths)}")
    for aside in images.left_aside:
        print_prose(console, str(aside), hang=2)


def print_verdict(audit: Audit, settings: Settings, console: Console) -> None:
    """Prints the audit's verdict and the command that shows all of it; nothing if the images are clean."""
    verdict = audit.verdict
    if verdict.level == "clean":
        return
    print_prose(console, verdict.headline, "bold yellow")
    for reason in verdict.reasons:
        print_prose(console, f"  - {reason}", hang=4)
    how = [] if settings.split_file else ["--split", audit.split.how]
    names = ("split_seed", "split_file", "image_size", "class_map", "table", "window", "skip_unreadable")
    same = flags(settings.model_dump(), names)
    words = [*command_words("audit"), "--data", audit.data, *how, *same]
    console.print(f"  all of it: {shlex.join(words)}")


def print_plan(plan: Plan, slots: int, outlook: Mapping[str, str], dashboard: str, console: Console) -> None:
    """Prints what the search will do and take, and where to watch it.

    Args:
        outlook: the lines on the cluster, the time and the price, by their names.
    """
    settings = plan.settings
    while_it_runs, at_end = expected_bytes(settings, plan.space, slots)
    free = free_there(plan.experiment, while_it_runs)
    work = f"{number_of(settings.trials or 0, 'trial')} of at most {number_of(settings.epochs or 0, 'epoch')}"
    console.print(f"\n{plan.experiment.name}: {work}", style="bold")
    lines = {
        **outlook,
        "dashboard": f"{dashboard} (if it asks for a token: ray get-auth-token)" if dashboard else "none yet",
        "experiment": plan.experiment.uri,
        "study": plan.study_url,
        "disk": f"at most {as_size(while_it_runs)} while it runs, {as_size(at_end)} at its end{free}",
    }
    if settings.track:
        lines["tracking"] = settings.track
    for name, value in lines.items():
        print_prose(console, f"  {name:<11}{value}", hang=13)
    if not settings.plan:  # printed now, since nothing can print it if the machine fails
        console.print(f"  if stopped {plan.resume_command}")


def print_start(plan: Plan, slots: int, ended: int, console: Console) -> None:
    """Prints that trials run now, and before a judgement how to do without them, or that more than asked for ended."""
    trials = plan.settings.trials or 0
    if ended > trials:
        print_prose(console, f"{ended} trials had ended before, more than --trials {trials}: the best of all counts")
    if ended >= trials:
        return
    console.print(f"\nsearching, {number_of(slots, 'trial')} at a time", style="bold")
    if plan.judges:
        now = f"; to judge the best of those now, stop, and add --trials {ended}" if ended else ""
        print_prose(
            console, f"{ended} of {trials} trials have ended; the others run before the best is judged{now}", "yellow"
        )


def print_disk_use(experiment: Experiment, console: Console) -> None:
    """Prints the size of a finished search, and the command that removes what it does not need any more."""
    size, removable = sum(experiment.files().values()), sum(not_needed(experiment, ended=True).values())
    where = experiment.name if experiment.uri == Experiment.at("./results", experiment.name).uri else experiment.uri
    print_prose(console, f"on disk: {as_size(size)}, of which {as_size(removable)} are not needed any more; to remove:")
    console.print(f"  {shlex.join([*command_words('clean'), where])}")


def print_space(space: SearchSpace, console: Console) -> None:
    """Prints the fixed trials, and the parameters that Optuna varies."""
    console.print("\nfixed trials, which run first:")
    for configuration in space.fixed_trials:
        print_prose(console, f"  {configuration}", hang=4)
    console.print("Optuna varies:")
    for name, distribution in space.distributions.items():
        console.print(f"  {name}: {in_range(distribution)}")
    for name, value in space.constants.items():
        console.print(f"  {name}: {value} in all other trials")


def print_outcome(plan: Plan, metrics: BundleMetrics, study: optuna.Study, console: Console) -> None:
    """Prints the published configuration beside the best found, the test accuracy, and where the bundle is.

    Args:
        study: knows the planned time and when that was.
    """
    columns = {
        "trial": ("trial", "d"),
        "depth": ("truncation_depth", "d"),
        "frozen": ("frozen_depth", "d"),
        "dropout": ("dropout", ".2f"),
        "augment": ("augmentation", ".2f"),
        "epochs": ("epochs", "d"),
        "balanced accuracy": (OBJECTIVE, ".3f"),
    }
    table = Table("", *columns, title=f"figures {judged(plan.settings.folds)}", title_justify="left")
    for title, trial in (("published", metrics.baseline_trial), ("best found", metrics.best_trial)):
        if trial is not None:
            table.add_row(title, *(format(trial[key], style) for key, style in columns.values()))
    console.print(table)
    cost = metrics.search
    ended = ", ".join(f"{count} {how}" for how, count in cost.ended.items())
    ratio = f", overhead ratio {cost.overhead_ratio:.2f}" if cost.overhead_ratio else ""
    trials, epochs = number_of(cost.trials, "trial"), number_of(cost.epochs, "epoch")
    print_prose(console, f"search: {trials} ({ended}), {epochs}, {cost.wall_s:.0f} s{ratio}")
    if (seeds := metrics.seeds) is not None:
        scores = ", ".join(f"{score:.3f}" for score in seeds.balanced_accuracy)
        print_prose(
            console,
            f"the best found with other seeds: {scores}; mean {seeds.mean:.3f}, standard deviation {seeds.sd:.3f}",
        )
        if (published := seeds.published) and seeds.difference:
            print_prose(
                console,
                f"the published configuration with the same seeds: mean {published.mean:.3f}, standard deviation "
                f"{published.sd:.3f}; gain of the best found, paired by seed {in_words(seeds.difference, '+.3f')}",
            )
    if planned := planned_and_taken(study):
        (low, high), took = planned
        console.print(f"time: {as_time(took)}, planned {as_range(low, high)}")
    _print_worth(metrics, console)
    if said := looks_in_words(metrics.looks):
        print_prose(console, said, "bold yellow")
    console.print(f"bundle: {plan.experiment.uri}/{FOLDER} (start with its report.html)")


def print_held(plan: Plan, winner: TrialRecord, console: Console) -> None:
    """Prints the outcome of a search that has not looked at its test split."""
    assert winner.last is not None  # it ran to its end
    score, where = winner.last.balanced_accuracy, judged(plan.settings.folds)
    lines = {
        "best so far": f"trial {winner.number} ({winner.hyperparameters}), balanced accuracy {score:.3f} {where}",
        "more trials": f"{plan.resume_command} --trials N",
        "its test": f"{plan.command('--judge')} (once: no trials can be added afterwards)",
    }
    console.print("\nthe test split has not been looked at (--hold-test)", style="bold")
    for name, value in lines.items():
        console.print(f"  {name:<13}{value}")


def print_bundle(folder: Path, console: Console) -> None:
    """Prints the content of a bundle, its accuracy, and how to use it."""
    config, metrics = read_config((folder / CONFIG).read_bytes()), read_metrics((folder / METRICS).read_bytes())
    best = metrics.best_trial
    score = best.get(OBJECTIVE, best.get(f"best_{OBJECTIVE}"))  # the second in bundles of version 0.1
    configuration = config.training.hyperparameters
    members = config.model.members
    ensemble = f"an ensemble of {members} models of " if members > 1 else ""
    print_prose(console, f"{ensemble}trial {best['trial']}: {configuration}")
    if metrics.test is None:
        held = config.settings.hold_test
        console.print(
            f"[bold yellow]The search has not {'been judged' if held else 'ended'}[/]: this is the best of the first "
            f"{metrics.search.trials} of {config.settings.trials} trials, chosen by its balanced accuracy of "
            f"{score:.3f} {judged(config.settings.folds)}. It has not been evaluated on the test split. "
            + ("--judge does that. Pull again afterwards." if held else "Pull again when the search has ended."),
            soft_wrap=not console.is_terminal,
            markup=True,
        )
    _print_worth(metrics, console)
    check = f"(cd {shlex.quote(str(folder))} && sha256sum -c {CHECKSUMS})"
    console.print(f"check it: {check}")
    words = shlex.join([*command_words("predict"), str(folder), "IMAGE"])
    console.print(f"use it:   {words}")


def print_figures(test: TestMetrics, console: Console, title: str = "test accuracy") -> None:
    """Prints a model's figures on images that it was not trained on, and the references on the same images."""
    console.print(
        f"[bold]{title} {in_words(test.accuracy)}[/], {test.n} images in {test.groups} groups; "
        f"balanced accuracy {in_words(test.balanced_accuracy)}",
        soft_wrap=not console.is_terminal,
        markup=True,
    )
    if any(other.balanced_difference for other in test.references.values()):
        table = _table("", "on the same images", "balanced accuracy", "model minus this (95 %)")
        for kind, other in test.references.items():
            what = {MAJORITY: f"always {other.name}", PUBLISHED: "published configuration"}.get(kind, kind)
            gain = in_words(other.balanced_difference, "+.3f") if other.balanced_difference else ""
            table.add_row(what, f"{other.balanced_accuracy.value:.3f}", gain)
        console.print(table)
    if (two := test.cancer_vs_normal) is not None:
        rates = f"sensitivity {in_words(two.sensitivity)}, specificity {in_words(two.specificity)}"
        rule = f"cancer if its probability is above {two.threshold:.3f}"  # the accuracy of two classes has 0.5
        print_prose(console, f"cancer against normal ({rule}): {rates}", hang=2)
    if (clean := test.without_overlap) is not None and not clean.n:
        seen = "these figures are too high: the model was trained on the groups of all these images"
        print_prose(console, seen, "bold yellow")
    elif clean is not None:
        print_prose(
            console,
            f"these figures are too high, since the model was trained on some of the groups; on the {clean.n} images "
            f"without group overlap: accuracy {in_words(clean.accuracy)}, balanced accuracy "
            f"{in_words(clean.balanced_accuracy)}.{missing_in_words(clean.missing)}",
            "bold yellow",
        )
    if (halves := test.by_likeness) is not None:
        least, most = (in_words(half.balanced_accuracy) for half in (halves.least, halves.most))
        print_prose(
            console,
            f"balanced accuracy on the {halves.least.n} images that look least like the training images: {least}; on "
            f"the others {most}",
        )


def print_judged(images: ImageSet, metrics: EvaluationMetrics, console: Console, *, phantoms: bool) -> None:
    """Prints the result of `evaluate`: the images that were evaluated or left out, and the figures.

    Args:
        phantoms: whether the model was trained on phantoms.
    """
    counts = ", ".join(f"{name} {figures.n}" for name, figures in metrics.test.per_class.items())
    print_prose(console, f"evaluated: {counts}")
    if others := metrics.left_out.other:
        console.print(f"left out, mapped to other: {number_of(others, 'image')}", style="yellow")
    _print_left_out(images, console)
    if metrics.learned_from.total:
        same, alike = metrics.learned_from.same_file, metrics.learned_from.looks_alike
        seen = f"{same} of these files"
        if alike:
            like = f"images that look like {alike} of"
            seen = f"{seen}, and on {like} the others" if same else f"{like} these files"
        print_prose(console, f"the model was trained on {seen}: the accuracy is too high", "bold yellow")
    print_figures(metrics.test, console, title="accuracy")
    if missing := missing_in_words(metrics.test.missing):
        print_prose(console, missing.strip())
    if phantoms:
        print_prose(console, TRAINED_ON_PHANTOMS, "bold yellow")


def _print_worth(metrics: BundleMetrics, console: Console) -> None:
    if metrics.test is not None:
        print_figures(metrics.test, console)
    if metrics.data == PHANTOMS:
        print_prose(console, PHANTOMS, "bold yellow")


STYLES = {"leaks": "bold red", "caution": "bold yellow", "clean": "bold green"}


def print_audit(audit: Audit, console: Console) -> None:
    """Prints an audit: its verdict, then the figures that the verdict is based on."""
    verdict, copies, groups, shortcuts = audit.verdict, audit.copies, audit.groups, audit.shortcuts

    def say(text: str, style: str | None = None) -> None:
        print_prose(console, text, style, hang=4 if text.startswith("  ") else 0)

    say(verdict.headline, STYLES[verdict.level])
    for reason in verdict.reasons:
        say(f"  - {reason}")
    say("what to do")
    for advice in verdict.advice:
        say(f"  - {advice}")

    parts = audit.split.parts
    table = _table(f"\n{audit.images} images, {audit.split.how} split", "class", *parts, "with a copy")
    for name, counts in audit.inventory.by_class.items():
        with_copy = copies.images_by_class.get(name, 0)
        table.add_row(name, *(str(counts[part]) for part in parts), str(with_copy))
    console.print(table)
    for line in about_files(audit.inventory):
        say(f"  {line}")

    say(f"\npairs of copies: {counted(copies.pairs_by_kind)}", "bold")
    for row in (*copies.across, *copies.inside):
        if row.with_copy:
            where = row.other if isinstance(row, CopiesAcross) else "the same part"
            say(
                f"  for {row.with_copy} of {row.images} {row.part} images there is a copy in {where} "
                f"({row.byte_identical} byte-identical): {counted(row.by_class)}"
            )
    by_threshold = ", ".join(f"{row.groups} at {row.threshold:g}" for row in groups.by_threshold)
    say(
        f"groups: {groups.groups} at a likeness of {groups.threshold:g}, the largest of "
        f"{groups.largest} images, {groups.cut_by_the_split} cut by the split, {groups.of_several_classes} of "
        f"several classes; by threshold {by_threshold}"
    )
    if known := groups.images_with_patient_id:
        say(f"{groups.groups_from_patient_ids} groups come from the PatientIDs of {known} DICOM images")

    if shortcuts.rules:
        chance = shortcuts.chance
        title = "\nshortcuts: rules that see only this property, in grouped cross-validation"
        table = _table(title, "", *(rule.rule for rule in shortcuts.rules), "chance")
        figures = [rule.balanced_accuracy for rule in shortcuts.rules]
        table.add_row("balanced accuracy", *(f"{x:.2f}" for x in (*figures, chance.balanced_accuracy)))
        for name in audit.classes:
            figures = [rule.auroc[name] for rule in shortcuts.rules]
            table.add_row(f"AUROC of {name}", *(f"{x:.2f}" for x in (*figures, chance.auroc)))
        console.print(table)
    for run in audit.permuted or []:
        proof = "proves that the split leaks" if run.proves_a_leak else "no proof of a leak"
        say(
            f"permuted labels, {run.part}, {run.title}: balanced accuracy {run.balanced_accuracy:.2f}, "
            f"chance {run.chance:.2f}: {proof}"
        )


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
