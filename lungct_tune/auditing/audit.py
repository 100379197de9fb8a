"""Audits a data set and its split, to show whether a figure measured on them can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import binomtest, ttest_1samp
from sklearn.base import clone
from sklearn.metrics import recall_score

from lungct_tune.auditing.conclusions import conclude
from lungct_tune.auditing.findings import (
    Audit,
    Chance,
    ClassSimilarity,
    Conflict,
    Copies,
    CopiesAcross,
    CopiesInside,
    CopyCounts,
    CopySide,
    Counts,
    Findings,
    GivenAway,
    GroupCount,
    Groups,
    Inventory,
    Pair,
    PermutedScores,
    RuleScores,
    Shortcuts,
    SideLengths,
    Similarity,
    Split,
    Unreadable,
    UnseenImages,
    WrongSuffix,
)
from lungct_tune.auditing.shortcuts import GIVEN_AWAY, RULES, Shortcut, measure_shortcuts, most_similar, sample
from lungct_tune.data.copies import COPY_CORRELATION
from lungct_tune.data.dataset import CopyOf, ImageSet
from lungct_tune.data.folders import DataError
from lungct_tune.data.groups import SERIES_CORRELATION
from lungct_tune.data.split import POOLED, SPLITS, UNSPLIT

SIDES: tuple[Literal["width", "height"], ...] = ("width", "height")
KINDS = ("byte-identical", "pixel-identical", "near-identical")
PERMUTATIONS = 10
PROOF = 0.001
"""Probability of a false alarm over all permuted runs together (Bonferroni over rules and parts)."""

TOO_ALIKE = 0.01
"""Probability of a false alarm when a part is called more similar to the training images than unseen groups are."""

_SUFFIXES = {"JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"}, "TIFF": {".tif", ".tiff"}}


def audit_images(images: ImageSet, split: np.ndarray, how: str, *, permuted: bool = False) -> Audit:
    """Audits a data set and a split of it.

    Args:
        images: the data set.
        split: (N,) str, the part of each image: "train", "valid" or "test". Parts may be missing. With folds, `POOLED`
            replaces "train" and "valid". Without a split, all are `UNSPLIT`.
        how: the name of the split: "grouped", "official", "file" or "no".
        permuted: also train the rules on permuted labels (a minute for 1,000 images).
    """
    parts = [part for part in (UNSPLIT, POOLED, *SPLITS) if (split == part).any()]
    shortcuts = measure_shortcuts(images, np.arange(len(split)))
    unseen = shortcuts.get("pixels")
    found = Findings(
        data=str(images.root),
        fingerprint=images.fingerprint,
        images=len(split),
        classes=list(images.classes),
        split=Split(how, parts),
        inventory=_inventory(images, split, parts),
        copies=_copies(images, split, parts),
        conflicts=_conflicts(images),
        groups=_groups(images, split),
        shortcuts=_shortcuts(images, shortcuts),
        split_health=[_similarity(images, split, parts[: i + 1], unseen) for i in range(1, len(parts))],
        permuted=_permuted(images, split, parts) if permuted else None,
    )
    return Audit(**vars(found), verdict=conclude(found))


def refuse_leaks(audit: Audit) -> None:
    """Stops a search with --strict if its split leaks.

    Raises:
        DataError: the verdict's level is "leaks".
    """
    if audit.verdict.level == "leaks":
        raise DataError(
            f"{audit.verdict.headline} {audit.verdict.reasons[0]} This is an error because of --strict; "
            "choose --split grouped, or leave out --strict"
        )


def _inventory(images: ImageSet, split: np.ndarray, parts: list[str]) -> Inventory:
    table = images.table
    counts_CS = pd.crosstab(table["label"], split).reindex(columns=parts, fill_value=0)
    formats = zip(table["path"], table["format"], strict=True)
    return Inventory(
        by_class={name: _counts(counts_CS.T[label]) for label, name in enumerate(images.classes)},
        formats=_counts(table["format"].value_counts()),
        modes=_counts(table["mode"].value_counts()),
        sizes={
            side: SideLengths(int(table[side].min()), float(table[side].median()), int(table[side].max()))
            for side in SIDES
        },
        distinct_sizes=len(table[[*SIDES]].drop_duplicates()),
        not_what_the_suffix_says=[
            WrongSuffix(path, found)
            for path, found in formats
            if found != "DICOM"  # which often has no suffix, or a number
            and PurePosixPath(path).suffix.lower() not in _SUFFIXES.get(found, {f".{found.lower()}"})
        ],
        unreadable=[Unreadable(path, reason) for path, reason in images.unreadable],
        without_content=list(images.without_content),
        left_aside=list(images.left_aside),
    )


def _counts(of: pd.Series) -> Counts:
    return {str(name): int(n) for name, n in of.items()}


def _copies(images: ImageSet, split: np.ndarray, parts: list[str]) -> Copies:
    part_of = dict(zip(images.table["path"], split, strict=True))
    files = images.table.set_index("path")
    pairs = [
        Pair(
            CopySide(pair.path, pair.class_name, part_of.get(pair.path, "left out")),
            CopySide(pair.other, pair.other_class, part_of.get(pair.other, "left out")),
            pair.kind,
            pair.similarity,
            _change(files, pair),
        )
        for pair in images.copies
    ]
    with_copy = {(side.path, side.class_name) for pair in pairs for side in (pair.first, pair.second)}
    return Copies(
        threshold=COPY_CORRELATION,
        pairs_by_kind={kind: sum(pair.kind == kind for pair in images.copies) for kind in KINDS},
        images_by_class=_by_class(name for _, name in with_copy),
        across=[
            CopiesAcross(**vars(_with_copy(images, split == part, split == other)), part=part, other=other)
            for part in parts
            for other in parts
            if part != other
        ],
        inside=[CopiesInside(**vars(_with_copy(images, split == part, split == part)), part=part) for part in parts],
        pairs=sorted(pairs, key=_badness),
    )


def _with_copy(images: ImageSet, is_part_N: np.ndarray, is_other_N: np.ndarray) -> CopyCounts:
    """How many images of a part have a copy in another part, or in the same part. No image is a copy of itself."""

    def found(keys_N: np.ndarray) -> np.ndarray:
        in_other_N = pd.Series(keys_N).map(pd.Series(keys_N[is_other_N]).value_counts()).fillna(0).to_numpy()
        return np.asarray(is_part_N & (in_other_N > (is_part_N & is_other_N)))

    with_copy_N = found(images.copy_numbers())
    return CopyCounts(
        images=int(is_part_N.sum()),
        with_copy=int(with_copy_N.sum()),
        byte_identical=int(found(images.table["digest"].to_numpy()).sum()),
        by_class=_by_class(images.classes[label] for label in images.table["label"][with_copy_N]),
    )


def _by_class(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _change(files: pd.DataFrame, pair: CopyOf) -> str:
    """How the images of a near-identical pair differ, as text: turn or flip, negative, shift, size, format."""
    changes = [pair.way, "inverted" if pair.is_inverted else "", f"shifted by {pair.shift:.1%}" if pair.shift else ""]
    if pair.path in files.index and pair.other in files.index:
        first, second = files.loc[pair.path], files.loc[pair.other]
        if (first["width"], first["height"]) != (second["width"], second["height"]):
            changes.append(f"{first['width']}x{first['height']} and {second['width']}x{second['height']} pixels")
        if first["format"] != second["format"]:
            changes.append(f"{first['format']} and {second['format']}")
    return ", ".join(filter(None, changes))


def _badness(pair: Pair) -> tuple[bool, bool, int, float]:
    """Sort key, worst pairs first: under two classes, across splits, then by kind and similarity."""
    first, second = pair.first, pair.second
    return (
        first.class_name == second.class_name,
        first.split == second.split,
        KINDS.index(pair.kind),
        -pair.similarity,
    )


def _conflicts(images: ImageSet) -> list[Conflict]:
    class_of = {c.path: c.class_name for c in images.copies} | {c.other: c.other_class for c in images.copies}
    return [Conflict(list(paths), sorted({class_of[path] for path in paths})) for paths in images.conflicts]


def _groups(images: ImageSet, split: np.ndarray) -> Groups:
    groups, of_class = images.table["group"], images.table.groupby("label")["group"].nunique()
    return Groups(
        threshold=SERIES_CORRELATION,
        groups=int(groups.nunique()),
        largest=int(groups.value_counts().max()),
        by_class={name: int(of_class[label]) for label, name in enumerate(images.classes)},
        images_in_groups_csv=int(images.table["is_listed"].sum()),
        images_with_patient_id=int(images.table["has_patient"].sum()),
        patients_known=images.patients_known,
        groups_from_patient_ids=int(groups[images.table["has_patient"]].nunique()),
        of_several_classes=int((images.table.groupby("group")["label"].nunique() > 1).sum()),
        cut_by_the_split=int((pd.Series(split).groupby(groups.to_numpy()).nunique() > 1).sum()),
        by_threshold=[GroupCount(threshold, count) for threshold, count in images.group_counts],
    )


def _shortcuts(images: ImageSet, measured: Mapping[str, Shortcut]) -> Shortcuts:
    rules = [
        RuleScores(
            rule=name,
            title=RULES[name].title,
            balanced_accuracy=shortcut.balanced_accuracy,
            auroc={images.classes[label]: value for label, value in shortcut.per_class.items()},
        )
        for name, shortcut in measured.items()
    ]
    return Shortcuts(
        chance=Chance(balanced_accuracy=1 / len(images.classes), auroc=0.5),
        rules=rules,
        given_away=[
            GivenAway(name, rule.title, value)
            for rule in rules
            for name, value in rule.auroc.items()
            if value >= GIVEN_AWAY
        ],
    )


def _similarity(images: ImageSet, split: np.ndarray, parts: list[str], unseen: Shortcut | None) -> Similarity:
    """How similar a part is to the parts before it, by its images' nearest neighbours there at 32 x 32 pixels.

    Args:
        images: all images.
        split: the part of each image.
        parts: the part to examine comes last; a model that is evaluated on it was trained on the parts before it.
        unseen: how often the nearest neighbour in other groups has the right label.
    """
    *before, part = parts
    is_known_N, is_part_N = np.isin(split, before), split == part
    labels_N, groups_N = (images.table[name].to_numpy() for name in ("label", "group"))
    rows, known = np.flatnonzero(is_part_N), np.flatnonzero(is_known_N)
    similarity_N, nearest_N = most_similar(images, rows, known)
    is_seen_N, is_right_N = np.isin(groups_N[rows], groups_N[known]), labels_N[nearest_N] == labels_N[rows]
    others, expected, is_right_M = rows[~is_seen_N], 1.0, is_right_N[~is_seen_N]
    if unseen and len(others):
        expected = float(np.mean([unseen.sensitivity[label] for label in labels_N[others]]))
        # among more images than were learned from for `unseen`, a nearer neighbour is found, and is right more often
        nearest_M = most_similar(images, others, sample(images, known, unseen.learned_from))[1]
        is_right_M = labels_N[nearest_M] == labels_N[others]
    return Similarity(
        part=part,
        before=before,
        images=len(rows),
        seen=int(is_seen_N.sum()),
        copies=_with_copy(images, is_part_N, is_known_N),
        nearest_neighbour_accuracy=float(is_right_N.mean()),
        others=UnseenImages(
            images=len(others),
            nearest_neighbour_right=int(is_right_M.sum()),
            expected_of_unseen_groups=expected,
            too_alike=too_alike(is_right_M, groups_N[others], expected),
        ),
        by_class={
            name: ClassSimilarity(
                images=int(is_class_N.sum()),
                seen=int(is_seen_N[is_class_N].sum()),
                median_similarity=float(np.median(similarity_N[is_class_N])),
            )
            for label, name in enumerate(images.classes)
            if (is_class_N := labels_N[rows] == label).any()
        },
    )


def too_alike(right_N: np.ndarray, groups_N: np.ndarray, expected: float) -> bool:
    """Whether significantly more images are right than is expected for unseen groups (binomial test, `TOO_ALIKE`).

    The images of a group are right or wrong together, so each group counts once, with its share of right images.
    """
    right_G = pd.Series(right_N).groupby(groups_N).mean()
    if not len(right_G):
        return False
    return bool(binomtest(round(right_G.sum()), len(right_G), expected, alternative="greater").pvalue < TOO_ALIKE)


def _permuted(images: ImageSet, split: np.ndarray, parts: list[str]) -> list[PermutedScores]:
    """Scores on the held-out parts of the rules trained on permuted labels.

    Every group gets the label of another group, for all its images; this is repeated `PERMUTATIONS` times. The label
    then depends only on the group. A rule can be above chance on held-out images only if it recognises a group from
    training. So a score above chance proves that the split leaks, and shows about how much the leak alone adds to an
    accuracy. (Permuting image by image would prove nothing: copies would get different labels, so remembering them
    would not help. Yagis et al., Sci Rep 2021, permuted by patient for the same reason, and scored 96 %.) A score at
    chance does not prove that there is no leak: groups that the audit does not recognise get separate labels.

    Recall is averaged over all classes. A class without images counts as 0, so chance is at most 1 in C.
    """
    if parts[0] not in (POOLED, "train"):
        return []
    labels_N, groups_N = images.table["label"].to_numpy(), pd.factorize(images.table["group"])[0]
    label_of_group = pd.Series(labels_N).groupby(groups_N).agg(lambda labels: labels.mode().iloc[0]).to_numpy()
    classes, rng = range(len(images.classes)), np.random.default_rng(0)
    known, held = np.flatnonzero(split == parts[0]), {part: np.flatnonzero(split == part) for part in parts[1:]}
    figures: dict[tuple[str, str], list[float]] = {}
    features = {name: rule.features(images, np.arange(len(split))) for name, rule in RULES.items()}
    for _ in range(PERMUTATIONS):
        permuted_N = rng.permutation(label_of_group)[groups_N]
        for name, rule in RULES.items():
            model: Any = clone(rule.classifier).fit(features[name][known], permuted_N[known])
            for part, rows in held.items():
                recall = recall_score(
                    permuted_N[rows],
                    model.predict(features[name][rows]),
                    labels=classes,
                    average="macro",
                    zero_division=0,
                )
                figures.setdefault((part, name), []).append(float(recall))
    level = PROOF / max(len(figures), 1)
    return [
        PermutedScores(
            part=part,
            rule=name,
            title=RULES[name].title,
            balanced_accuracy=float(np.mean(scores)),
            chance=1 / len(classes),
            proves_a_leak=bool(ttest_1samp(scores, 1 / len(classes), alternative="greater").pvalue < level),
        )
        for (part, name), scores in figures.items()
    ]
