"""Draws the conclusions of an audit: whether an accuracy on held-out images can be trusted, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lungct_tune.auditing.findings import Findings, Inventory, Level, Similarity, Verdict
from lungct_tune.auditing.shortcuts import RULES
from lungct_tune.data.split import SPLITS, UNSPLIT


def conclude(found: Findings) -> Verdict:
    """The verdict: whether an accuracy on the held-out images of this split can be trusted, why, and what to do."""
    judged = found.split.parts[-1]
    accuracy = "test accuracy" if judged == "test" else "validation accuracy"
    leaking, alike = _leaking(found), [health.part for health in _too_alike(found)]
    leaks, gaps, lost = list(_leaks(found)), list(_gaps(found)), list(_lost(found))
    likenesses, shortcuts = list(_likenesses(found)), list(_shortcuts_taken(found))
    level: Level = "leaks" if leaking else "caution" if likenesses + shortcuts + gaps + lost else "clean"
    if judged == UNSPLIT:
        headline = "These images cannot be split, because a class has too few groups. So there is no held-out accuracy."
    elif judged in leaking:
        headline = (
            f"This split leaks: {accuracy} on it does not show how a model does on new patients. It also measures how "
            "well the model remembers the images that it was trained on."
        )
    elif leaking:
        headline = (
            f"Valid leaks; no leak was found in {judged}. Validation accuracy also measures how well a model remembers "
            f"the images that it was trained on, so it may choose the wrong model. Read {accuracy} with what follows."
        )
    elif alike:
        headline = (
            f"No copy and no series was found across this split. But {' and '.join(alike)} may show further slices of "
            "patients that a model was trained on, so accuracy there may be too high."
        )
    elif shortcuts:
        headline = f"No leak was found in this split, but {accuracy} on it does not depend on the lungs alone."
    elif gaps:
        headline = "No leak was found in this split, but a part of it has no images of a class."
    elif lost:
        headline = "No leak was found in this split, but some files cannot be used, or show nothing."
    else:
        headline = f"No reason was found to doubt {accuracy} on this split."
    reasons = leaks + likenesses + shortcuts + gaps + lost
    return Verdict(level, headline, reasons, list(_advice(found, leaking)))


def _leaking(found: Findings) -> set[str]:
    """The parts whose images have copies, or images of the same group, in the parts before them."""
    proofs = {run.part for run in found.permuted or [] if run.proves_a_leak}
    return proofs | {health.part for health in found.split_health if health.seen}


def _leaks(found: Findings) -> Iterator[str]:
    for health in found.split_health:
        if not (n := health.seen):
            continue
        part, before, copied = health.part, health.before, health.copies
        alike = [name for name, of in health.by_class.items() if of.seen >= of.images / 2]
        reason = (
            f"{n} of {health.images} {part} images are copies of images in {' or '.join(before)}, or of the same "
            "series or patient."
        )
        if copies := copied.with_copy:
            same = copied.byte_identical
            how = (
                "byte for byte" if same == copies else f"{same} of them byte for byte" if same else "none byte for byte"
            )
            are = "is a copy" if copies == 1 else "are copies"
            reason += f" {copies} {are}, {how} ({counted(copied.by_class)})."
        if n >= health.images / 2:
            reason += f" As a whole, {part} is a near copy of {' and '.join(before)}."
        elif alike:
            reason += f" For {' and '.join(alike)}, {part} is a near copy of {' and '.join(before)}."
        yield (
            f"{reason} The most similar image in {' or '.join(before)} has the right class for "
            f"{health.nearest_neighbour_accuracy:.0%} of them."
        )
    for run in found.permuted or []:
        if run.proves_a_leak:
            yield (
                f"Proof: trained on permuted labels, {run.title} still reaches a balanced accuracy of "
                f"{run.balanced_accuracy:.2f} on {run.part} (chance: {run.chance:.2f})."
            )


def counted(counts: Mapping[str, int]) -> str:
    """Counts and their names, as text."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def about_files(inventory: Inventory) -> list[str]:
    """What the files are, and each that is not as it should be, a line each."""
    width, height = inventory.sizes["width"], inventory.sizes["height"]
    return [
        f"formats: {counted(inventory.formats)}; modes: {counted(inventory.modes)}",
        f"widths {width.min} to {width.max}, heights {height.min} to {height.max}, {inventory.distinct_sizes} distinct "
        "sizes",
        *(f"{file.path} holds {file.format}" for file in inventory.not_what_the_suffix_says),
        *(f"{file.path} cannot be read: {file.reason}" for file in inventory.unreadable),
        *(f"{path} has no content" for path in inventory.without_content),
        *map(str, inventory.left_aside),
    ]


def _too_alike(found: Findings) -> list[Similarity]:
    return [health for health in found.split_health if health.others.too_alike]


def _likenesses(found: Findings) -> Iterator[str]:
    for health in _too_alike(found):
        others, before = health.others, " or ".join(health.before)
        right = others.nearest_neighbour_right / others.images
        yield (
            f"Of the {others.images} {'other ' if health.seen else ''}{health.part} images, the most similar "
            f"image in {before} has the right class for {right:.0%}; for images of groups not seen it is "
            f"{others.expected_of_unseen_groups:.0%}. So {health.part} probably shows further slices of patients "
            f"in {before}."
        )


def _shortcuts_taken(found: Findings) -> Iterator[str]:
    """Classes that the same rules give away share a sentence; with two classes, this is always so."""
    given, classes_by_ways = found.shortcuts.given_away, dict[tuple[str, str], list[str]]()
    for name in _given_away(found):
        by = {away.by: away.auroc for away in given if away.class_name == name}
        ways = " and by ".join(f"{what} (AUROC {auroc:.2f})" for what, auroc in by.items())
        without = "more than similar pictures" if set(by) == {RULES["pixels"].title} else "a look at the lungs"
        classes_by_ways.setdefault((ways, without), []).append(name)
    for (ways, without), names in classes_by_ways.items():
        are, they = ("is", "it") if len(names) == 1 else ("are", "they")
        yield f"{' and '.join(names)} {are} recognised by {ways}: {they} can be told from the rest without {without}."


def _given_away(found: Findings) -> list[str]:
    return list(dict.fromkeys(away.class_name for away in found.shortcuts.given_away))


def _gaps(found: Findings) -> Iterator[str]:
    first, groups = found.split.parts[0], found.groups.by_class
    what_follows = {
        "valid": "trials are compared without it",
        "test": "how well it is recognised is not measured",
        first: "no model can learn it",
    }
    for name, counts in found.inventory.by_class.items():
        for part, images in counts.items():
            if part == UNSPLIT and groups[name] < len(SPLITS):
                yield f"Images of {name}: {images}, in groups: {groups[name]}. Each part of a split needs one at least."
            elif not images:
                yield f"No image of {name} is in {part}: {what_follows[part]}."


def _lost(found: Findings) -> Iterator[str]:
    for conflict in found.conflicts:
        where, classes = " and ".join(conflict.paths), " and ".join(conflict.classes)
        yield f"The same image is filed under {classes}: {where}. They are left out."
    if unreadable := len(found.inventory.unreadable):
        yield f"{unreadable} files cannot be read and are left out."
    if plain := found.inventory.without_content:
        are = "1 image has" if len(plain) == 1 else f"{len(plain)} images have"
        yield f"{are} no content, one grey value nearly everywhere, such as {plain[0]}. Repair or remove them."


def _advice(found: Findings, leaking: set[str]) -> Iterator[str]:
    if leaking:
        folds = "; --folds does so within train and valid" if "valid" in leaking else ""
        yield f"Use --split grouped, which keeps copies and series on one side{folds}."
    if "test" in leaking:
        yield "To compare with published figures, evaluate the test images of unseen groups separately."
    if easy := _given_away(found):
        names = " and ".join(easy)
        if len(easy) < len(found.classes) - 1:
            yield f"Evaluate the other classes separately: recognising {names} proves nothing here."
        else:
            yield f"Get images of all classes from one source: recognising {names} proves nothing here."
    if found.conflicts:
        yield "Find out which class the images under several classes belong to, and remove the wrong copies."
    if not found.groups.patients_known:
        yield (
            "Slices of one patient that look different are not recognised. If you know the patients, list them in "
            "groups.csv."
        )
