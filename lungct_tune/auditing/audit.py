"""What must be known of a data set and its split before a figure measured on them is believed.

The audit is a plain dictionary of names, numbers and texts, for audit.json and for the pages made from it:

    verdict       level ("leaks", "caution" or "clean"), headline, reasons and advice, in plain words
    inventory     images by class and split, formats, modes, sizes, what was left out
    copies        by kind and by class; across parts and inside them; the pairs, worst first
    conflicts     copies under several classes
    groups        how many, at the threshold in force and at others; how many the split cuts
    shortcuts     what each rule scores beside chance; which classes are given away by which
    split_health  how alike each part is to those before it, which a model judged on it has learned from
    permuted      only where asked for: what is learnt from labels that mean nothing
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest, ttest_1samp
from sklearn.base import clone
from sklearn.metrics import recall_score
from sklearn.neighbors import NearestNeighbors

from lungct_tune.auditing.conclusions import conclude
from lungct_tune.auditing.shortcuts import GIVEN_AWAY, RULES, Shortcut, measure_shortcuts, unit_pixels
from lungct_tune.data.copies import COPY_CORRELATION
from lungct_tune.data.dataset import CopyOf, ImageSet
from lungct_tune.data.folders import DataError
from lungct_tune.data.groups import SERIES_CORRELATION, merge
from lungct_tune.data.split import POOLED, SPLITS, UNSPLIT

KINDS = ("byte-identical", "pixel-identical", "near-identical")
PERMUTATIONS = 10
PROOF = 0.001
"""Chance of a false alarm for the whole of the permuted runs (Bonferroni over rules and parts)."""

TOO_ALIKE = 0.01
"""Chance of a false alarm when a part is called more alike to what was learned from than unseen groups are."""

_SUFFIXES = {"JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"}, "TIFF": {".tif", ".tiff"}, "PPM": {".ppm", ".pgm", ".pnm"}}


def audit_images(images: ImageSet, split: np.ndarray, how: str, *, permuted: bool = False) -> dict[str, Any]:
    """The audit of a data set under a split.

    Args:
        images: as they were read.
        split: (N,) str, the part of each image: "train", "valid" or "test", of which any may be missing; `POOLED`
            instead of the first two where folds cure what train and valid have in common; or all `UNSPLIT`.
        how: what the split is called: "grouped", "official" or "no".
        permuted: also train the rules on permuted labels (a minute for 1,000 images).
    """
    parts = [part for part in (UNSPLIT, POOLED, *SPLITS) if (split == part).any()]
    shortcuts = measure_shortcuts(images, np.arange(len(split)))
    unseen = shortcuts["pixels"].sensitivity if shortcuts else {}
    audit: dict[str, Any] = {
        "data": str(images.root),
        "fingerprint": images.fingerprint,
        "images": len(split),
        "classes": list(images.classes),
        "split": {"how": how, "parts": parts},
        "inventory": _inventory(images, split, parts),
        "copies": _copies(images, split, parts),
        "conflicts": _conflicts(images),
        "groups": _groups(images, split),
        "shortcuts": _shortcuts(images, shortcuts),
        "split_health": [_likeness(images, split, parts[: i + 1], unseen) for i in range(1, len(parts))],
        "permuted": _permuted(images, split, parts) if permuted else None,
    }
    return {"verdict": conclude(audit)} | audit


def refuse_leaks(audit: dict[str, Any]) -> None:
    """For a search that is told to be strict.

    Raises:
        DataError: the split cuts through groups.
    """
    if audit["verdict"]["level"] == "leaks":
        raise DataError(
            f"{audit['verdict']['headline']} {audit['verdict']['reasons'][0]} This is an error because of --strict; "
            "choose --split grouped, or leave out --strict"
        )


def _inventory(images: ImageSet, split: np.ndarray, parts: list[str]) -> dict[str, Any]:
    table = images.table
    counts_CS = pd.crosstab(table["label"], split).reindex(columns=parts, fill_value=0)
    formats = zip(table["path"], table["format"], strict=True)
    return {
        "by_class": {name: counts_CS.loc[label].to_dict() for label, name in enumerate(images.classes)},
        "formats": table["format"].value_counts().to_dict(),
        "modes": table["mode"].value_counts().to_dict(),
        "sizes": {
            side: {"min": int(table[side].min()), "median": float(table[side].median()), "max": int(table[side].max())}
            for side in ("width", "height")
        },
        "distinct_sizes": len(table[["width", "height"]].drop_duplicates()),
        "not_what_the_suffix_says": [
            {"path": path, "format": found}
            for path, found in formats
            if PurePosixPath(path).suffix.lower() not in _SUFFIXES.get(found, {f".{found.lower()}"})
        ],
        "unreadable": [{"path": path, "reason": reason} for path, reason in images.unreadable],
    }


def _copies(images: ImageSet, split: np.ndarray, parts: list[str]) -> dict[str, Any]:
    part_of = dict(zip(images.table["path"], split, strict=True))
    files = images.table.set_index("path")
    pairs = [
        {
            "first": {"path": pair.path, "class": pair.class_name, "split": part_of.get(pair.path, "left out")},
            "second": {"path": pair.other, "class": pair.other_class, "split": part_of.get(pair.other, "left out")},
            "kind": pair.kind,
            "similarity": pair.similarity,
            "change": _change(files, pair),
        }
        for pair in images.copies
    ]
    return {
        "threshold": COPY_CORRELATION,
        "pairs_by_kind": {kind: sum(pair.kind == kind for pair in images.copies) for kind in KINDS},
        "images_by_class": _copied_by_class(images.copies),
        "across": [
            {"part": part, "other": other} | _with_copy(images, split == part, split == other)
            for part in parts
            for other in parts
            if part != other
        ],
        "inside": [{"part": part} | _with_copy(images, split == part, split == part) for part in parts],
        "pairs": sorted(pairs, key=_badness),
    }


def _copied_by_class(copies: list[CopyOf]) -> dict[str, int]:
    with_copy = {(c.path, c.class_name) for c in copies} | {(c.other, c.other_class) for c in copies}
    return _by_class(name for _, name in with_copy)


def _with_copy(images: ImageSet, is_part_N: np.ndarray, is_other_N: np.ndarray) -> dict[str, Any]:
    """How many images of a part have a copy in another part, or in the same: none is a copy of itself."""

    def found(keys_N: np.ndarray) -> np.ndarray:
        there_N = pd.Series(keys_N).map(pd.Series(keys_N[is_other_N]).value_counts()).fillna(0).to_numpy()
        return np.asarray(is_part_N & (there_N > (is_part_N & is_other_N)))

    with_copy_N = found(copy_numbers(images))
    return {
        "images": int(is_part_N.sum()),
        "with_copy": int(with_copy_N.sum()),
        "byte_identical": int(found(images.table["digest"].to_numpy()).sum()),
        "by_class": _by_class(images.classes[label] for label in images.table["label"][with_copy_N]),
    }


def _by_class(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def copy_numbers(images: ImageSet) -> np.ndarray:
    """(N,) int: images of one number are copies of one another."""
    row_of = {path: row for row, path in enumerate(images.table["path"])}
    pairs = [(row_of[c.path], row_of[c.other]) for c in images.copies if c.path in row_of and c.other in row_of]
    return merge(np.arange(len(row_of)), *np.array(pairs, dtype=np.intp).reshape(-1, 2).T)


def _change(files: pd.DataFrame, pair: CopyOf) -> str:
    """What was done to make one of a near-identical pair from the other, as far as it can be told."""
    changes = [f"flipped {pair.flip}" if pair.flip in ("left-right", "top-bottom") else pair.flip]
    changes.append(f"shifted by {pair.shift:.1%}" if pair.shift else "")
    if pair.path in files.index and pair.other in files.index:
        first, second = files.loc[pair.path], files.loc[pair.other]
        if (first["width"], first["height"]) != (second["width"], second["height"]):
            changes.append(f"{first['width']}x{first['height']} and {second['width']}x{second['height']} pixels")
        if first["format"] != second["format"]:
            changes.append(f"{first['format']} and {second['format']}")
    return ", ".join(filter(None, changes))


def _badness(pair: dict[str, Any]) -> tuple[bool, bool, int, float]:
    """Smaller is worse: under two classes, across splits, then by kind and likeness."""
    first, second = pair["first"], pair["second"]
    return (
        first["class"] == second["class"],
        first["split"] == second["split"],
        KINDS.index(pair["kind"]),
        -pair["similarity"],
    )


def _conflicts(images: ImageSet) -> list[dict[str, Any]]:
    class_of = {c.path: c.class_name for c in images.copies} | {c.other: c.other_class for c in images.copies}
    return [{"paths": list(paths), "classes": sorted({class_of[path] for path in paths})} for paths in images.conflicts]


def _groups(images: ImageSet, split: np.ndarray) -> dict[str, Any]:
    groups, of_class = images.table["group"], images.table.groupby("label")["group"].nunique()
    return {
        "threshold": SERIES_CORRELATION,
        "groups": int(groups.nunique()),
        "largest": int(groups.value_counts().max()),
        "by_class": {name: int(of_class[label]) for label, name in enumerate(images.classes)},
        "images_in_groups_csv": int(images.table["is_listed"].sum()),
        "of_several_classes": int((images.table.groupby("group")["label"].nunique() > 1).sum()),
        "cut_by_the_split": int((pd.Series(split).groupby(groups.to_numpy()).nunique() > 1).sum()),
        "by_threshold": [{"threshold": threshold, "groups": count} for threshold, count in images.group_counts],
    }


def _shortcuts(images: ImageSet, measured: Mapping[str, Shortcut]) -> dict[str, Any]:
    rules: list[dict[str, Any]] = [
        {
            "rule": name,
            "title": RULES[name].title,
            "balanced_accuracy": shortcut.balanced_accuracy,
            "auroc": {images.classes[label]: value for label, value in shortcut.per_class.items()},
        }
        for name, shortcut in measured.items()
    ]
    return {
        "chance": {"balanced_accuracy": 1 / len(images.classes), "auroc": 0.5},
        "rules": rules,
        "given_away": [
            {"class": name, "by": rule["title"], "auroc": value}
            for rule in rules
            for name, value in rule["auroc"].items()
            if value >= GIVEN_AWAY
        ],
    }


def _likeness(images: ImageSet, split: np.ndarray, parts: list[str], unseen: Mapping[int, float]) -> dict[str, Any]:
    """How alike a part is to those before it, by its images' nearest neighbours there at 32 x 32 pixels.

    Args:
        images: all of them.
        split: the part of each.
        parts: the part asked last, before it those that a model which is judged on it has learned from.
        unseen: by label, how often the nearest neighbour names it rightly in groups that it has not seen.
    """
    *before, part = parts
    is_known_N, is_asked_N = np.isin(split, before), split == part
    labels_N, groups_N = (images.table[name].to_numpy() for name in ("label", "group"))
    asked, known = np.flatnonzero(is_asked_N), np.flatnonzero(is_known_N)
    similarity_N, nearest_N = _nearest(images, asked, known)
    is_seen_N, is_right_N = np.isin(groups_N[asked], groups_N[known]), labels_N[nearest_N] == labels_N[asked]
    others_N = np.flatnonzero(~is_seen_N)
    expected = float(np.mean([unseen[label] for label in labels_N[asked[others_N]]])) if unseen and len(others_N) else 1
    right = int(is_right_N[others_N].sum())
    return {
        "part": part,
        "before": before,
        "images": len(asked),
        "seen": int(is_seen_N.sum()),
        "copies": _with_copy(images, is_asked_N, is_known_N),
        "nearest_neighbour_accuracy": float(is_right_N.mean()),
        "others": {
            "images": len(others_N),
            "nearest_neighbour_right": right,
            "expected_of_unseen_groups": expected,
            "too_alike": too_alike(is_right_N[others_N], groups_N[asked[others_N]], expected),
        },
        "by_class": {
            name: {
                "images": int(is_class_N.sum()),
                "seen": int(is_seen_N[is_class_N].sum()),
                "median_similarity": float(np.median(similarity_N[is_class_N])),
            }
            for label, name in enumerate(images.classes)
            if (is_class_N := labels_N[asked] == label).any()
        },
    }


def too_alike(right_N: np.ndarray, groups_N: np.ndarray, expected: float) -> bool:
    """Whether more are right than is to be expected of groups that were not seen, by more than chance (`TOO_ALIKE`).

    The images of a group are right or wrong together, so a group counts once, with the share of it that is right.
    """
    right_G = pd.Series(right_N).groupby(groups_N).mean()
    if not len(right_G):
        return False
    return bool(binomtest(round(right_G.sum()), len(right_G), expected, alternative="greater").pvalue < TOO_ALIKE)


def _nearest(images: ImageSet, asked: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row asked, the correlation with its most similar row among those known, and that row."""
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(unit_pixels(images, known))
    distance_N1, position_N1 = search.kneighbors(unit_pixels(images, asked))
    return 1 - distance_N1[:, 0] ** 2 / 2, known[position_N1[:, 0]]


def _permuted(images: ImageSet, split: np.ndarray, parts: list[str]) -> list[dict[str, Any]]:
    """What the rules score on parts held out when they learn from labels that mean nothing.

    Every group is given the label of another one, drawn anew `PERMUTATIONS` times, and all its images get it. The
    labels then say nothing about an image but which group it belongs to, so a rule can be above chance on held-out
    images only by recognising that a group of theirs was in train: a figure above chance proves that the split leaks,
    and is about what the leak alone is worth. (Permuting image by image would prove nothing: copies would get different
    labels, and who remembers them would gain nothing by it. Yagis et al., Sci Rep 2021, permuted by patient for the
    same reason, and scored 96 %.) A figure at chance is no proof of the opposite: groups that the audit has not
    recognised are given labels of their own.

    Recall is averaged over all classes, those without an image counting 0, so that chance is at most 1 in C.
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
        {
            "part": part,
            "rule": name,
            "title": RULES[name].title,
            "balanced_accuracy": float(np.mean(scores)),
            "chance": 1 / len(classes),
            "proves_a_leak": bool(ttest_1samp(scores, 1 / len(classes), alternative="greater").pvalue < level),
        }
        for (part, name), scores in figures.items()
    ]
