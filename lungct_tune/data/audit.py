"""What must be known of a data set and its split before a figure measured on them is believed.

The audit is a plain dictionary of names, numbers and texts, for audit.json and for the pages made from it:

    verdict       level ("leaks", "caution" or "clean"), headline, reasons and advice, in plain words
    inventory     images by class and split, formats, modes, sizes, what was left out
    copies        by kind and by class; across splits; the pairs, worst first
    conflicts     copies under several classes
    groups        how many, at the threshold in force and at others; how many the split cuts
    shortcuts     what each rule scores beside chance; which classes are given away by which
    split_health  how alike each part is to train
    permuted      only where asked for: what is learnt from labels that mean nothing
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest, ttest_1samp
from sklearn.base import clone
from sklearn.metrics import recall_score
from sklearn.neighbors import NearestNeighbors

from lungct_tune.data.copies import COPY_CORRELATION
from lungct_tune.data.find import DataError
from lungct_tune.data.groups import SERIES_CORRELATION, merge
from lungct_tune.data.images import CopyOf, ImageSet
from lungct_tune.data.shortcuts import GIVEN_AWAY, RULES, Shortcut, measure_shortcuts, unit_pixels
from lungct_tune.data.split import SPLITS

KINDS = ("byte-identical", "pixel-identical", "near-identical")
PERMUTATIONS = 10
PROOF = 0.001
"""Chance of a false alarm for the whole of the permuted runs (Bonferroni over rules and parts)."""

TOO_ALIKE = 0.01
"""Chance of a false alarm when a part is called more alike to train than unseen groups are."""

_SUFFIXES = {"JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"}, "TIFF": {".tif", ".tiff"}, "PPM": {".ppm", ".pgm", ".pnm"}}


def audit_images(images: ImageSet, split: np.ndarray, how: str, *, permuted: bool = False) -> dict[str, Any]:
    """The audit of a data set under a split.

    Args:
        images: as they were read.
        split: (N,) str, "train", "valid" or "test" for each image; valid or test may be missing.
        how: what the split is called: "grouped" or "official".
        permuted: also train the rules on permuted labels (a minute for 1,000 images).
    """
    parts = [part for part in SPLITS if (split == part).any()]
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
        "split_health": [_likeness(images, split, part, unseen) for part in parts[1:] if parts[0] == "train"],
        "permuted": _permuted(images, split, parts) if permuted else None,
    }
    return {"verdict": _verdict(audit)} | audit


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
        "left_out": len(images.unreadable) + sum(map(len, images.conflicts)),
    }


def _copies(images: ImageSet, split: np.ndarray, parts: list[str]) -> dict[str, Any]:
    part_of = dict(zip(images.table["path"], split, strict=True))
    files, numbers_N = images.table.set_index("path"), copy_numbers(images)
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
        "images_by_class": _with_copy_by_class(images.copies),
        "across": [
            _across(images, numbers_N, split, part, other) for part in parts for other in parts if part != other
        ],
        "pairs": sorted(pairs, key=_badness),
    }


def _with_copy_by_class(copies: list[CopyOf]) -> dict[str, int]:
    with_copy = {(c.path, c.class_name) for c in copies} | {(c.other, c.other_class) for c in copies}
    return dict(sorted(Counter(name for _, name in with_copy).items()))


def _across(images: ImageSet, numbers_N: np.ndarray, split: np.ndarray, part: str, other: str) -> dict[str, Any]:
    """How many images of one part have a copy in another."""
    is_part, is_other = split == part, split == other
    found: dict[str, np.ndarray] = {
        "with_copy": is_part & np.isin(numbers_N, numbers_N[is_other]),
        "byte_identical": is_part & np.isin(images.table["digest"], images.table["digest"][is_other]),
    }
    counts = Counter(images.classes[label] for label in images.table["label"][found["with_copy"]])
    return {"part": part, "other": other, "images": int(is_part.sum())} | {
        **{name: int(is_found.sum()) for name, is_found in found.items()},
        "by_class": dict(sorted(counts.items())),
    }


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
    groups = images.table["group"]
    return {
        "threshold": SERIES_CORRELATION,
        "groups": int(groups.nunique()),
        "largest": int(groups.value_counts().max()),
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


def _likeness(images: ImageSet, split: np.ndarray, part: str, unseen: Mapping[int, float]) -> dict[str, Any]:
    """How alike a part is to train, by its images' nearest neighbours there at 32 x 32 pixels.

    Args:
        images: all of them.
        split: the split of each.
        part: the part asked.
        unseen: by label, how often the nearest neighbour names it rightly in groups that it has not seen.
    """
    labels_N, groups_N = (images.table[name].to_numpy() for name in ("label", "group"))
    asked, known = np.flatnonzero(split == part), np.flatnonzero(split == "train")
    similarity_N, nearest_N = _nearest(images, asked, known)
    is_in_train_N, is_right_N = np.isin(groups_N[asked], groups_N[known]), labels_N[nearest_N] == labels_N[asked]
    others_N = np.flatnonzero(~is_in_train_N)
    expected = float(np.mean([unseen[label] for label in labels_N[asked[others_N]]])) if unseen and len(others_N) else 1
    right = int(is_right_N[others_N].sum())
    return {
        "part": part,
        "images": len(asked),
        "in_a_group_of_train": int(is_in_train_N.sum()),
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
                "in_a_group_of_train": int(is_in_train_N[is_class_N].sum()),
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
    if parts[0] != "train":
        return []
    labels_N, groups_N = images.table["label"].to_numpy(), pd.factorize(images.table["group"])[0]
    label_of_group = pd.Series(labels_N).groupby(groups_N).agg(lambda labels: labels.mode().iloc[0]).to_numpy()
    classes, rng = range(len(images.classes)), np.random.default_rng(0)
    known, held = np.flatnonzero(split == "train"), {part: np.flatnonzero(split == part) for part in parts[1:]}
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


def _verdict(audit: dict[str, Any]) -> dict[str, Any]:
    """What may be concluded from a figure on the held-out images of this split, and what to do instead."""
    leaks, cautions = list(_leaks(audit)), list(_cautions(audit))
    judged = "test accuracy" if "test" in audit["split"]["parts"] else "validation accuracy"
    if leaks:
        level = "leaks"
        headline = (
            f"This split leaks. Don't conclude from {judged} on it how a model would do on new patients: it also "
            "says how well the model remembers images that it was trained on."
        )
    elif cautions:
        level = "caution"
        headline = f"No leak was found in this split, but {judged} on it is not all about lungs: read it with this."
    else:
        level = "clean"
        headline = f"Nothing was found that speaks against {judged} on this split."
    return {"level": level, "headline": headline, "reasons": leaks + cautions, "advice": list(_advice(audit, level))}


def _leaks(audit: dict[str, Any]) -> Iterator[str]:
    for health in audit["split_health"]:
        if not (n := health["in_a_group_of_train"]):
            continue
        part = health["part"]
        across = next(a for a in audit["copies"]["across"] if (a["part"], a["other"]) == (part, "train"))
        alike = [name for name, of in health["by_class"].items() if of["in_a_group_of_train"] >= of["images"] / 2]
        reason = f"{n} of {health['images']} {part} images are copies of images in train, or of the same series."
        if copies := across["with_copy"]:
            same = across["byte_identical"]
            how = (
                "byte for byte" if same == copies else f"{same} of them byte for byte" if same else "none byte for byte"
            )
            reason += (
                f" {copies} {'is a copy' if copies == 1 else 'are copies'}, {how} ({_counted(across['by_class'])})."
            )
        if n >= health["images"] / 2:
            reason += f" As a whole, {part} is a near copy of train."
        elif alike:
            reason += f" For {' and '.join(alike)}, {part} is a near copy of train."
        reason += f" The most similar image in train names the class of {health['nearest_neighbour_accuracy']:.0%}."
        yield reason
    for across in audit["copies"]["across"]:
        if (across["part"], across["other"]) == ("test", "valid") and across["with_copy"]:
            yield f"{across['with_copy']} of {across['images']} test images are copies of images in valid."
    if (cut := audit["groups"]["cut_by_the_split"]) and not any(
        h["in_a_group_of_train"] for h in audit["split_health"]
    ):
        yield f"The split cuts through {cut} groups of copies or series."
    for run in audit["permuted"] or []:
        if run["proves_a_leak"]:
            yield (
                f"Proof: having learnt labels that mean nothing, {run['title']} still reaches a balanced accuracy of "
                f"{run['balanced_accuracy']:.2f} on {run['part']} (chance: {run['chance']:.2f})."
            )


def _counted(by_class: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in by_class.items())


def _cautions(audit: dict[str, Any]) -> Iterator[str]:
    for health in audit["split_health"]:
        others, part = health["others"], health["part"]
        if others["too_alike"]:
            right = others["nearest_neighbour_right"] / others["images"]
            yield (
                f"Of the {others['images']} other {part} images, the most similar image in train names the class of "
                f"{right:.0%}; of images in groups not seen it names {others['expected_of_unseen_groups']:.0%}. "
                f"So {part} probably shows patients of train in further slices."
            )
    given = audit["shortcuts"]["given_away"]
    for name in dict.fromkeys(found["class"] for found in given):
        by = {found["by"]: found["auroc"] for found in given if found["class"] == name}
        ways = " and by ".join(f"{what} (AUROC {auroc:.2f})" for what, auroc in by.items())
        without = "knowing more than similar pictures" if set(by) == {RULES["pixels"].title} else "looking at a lung"
        yield f"{name} is given away by {ways}: it can be recognised without {without}."
    for conflict in audit["conflicts"]:
        where, classes = " and ".join(conflict["paths"]), " and ".join(conflict["classes"])
        yield f"The same image stands under {classes}: {where}. They are left out."
    if unreadable := len(audit["inventory"]["unreadable"]):
        yield f"{unreadable} files cannot be read and are left out."


def _advice(audit: dict[str, Any], level: str) -> Iterator[str]:
    if level == "leaks":
        yield "Use --split grouped, which keeps copies and series on one side."
        if "test" in audit["split"]["parts"]:
            yield "To compare with figures published for this split, judge test images without a twin apart."
    for name in dict.fromkeys(found["class"] for found in audit["shortcuts"]["given_away"]):
        yield f"Judge the other classes among themselves: recognising {name} is no achievement here."
    if audit["conflicts"]:
        yield "Find out which class the images under several classes belong to, and remove the wrong copies."
    yield "Slices of a patient that don't look alike go unrecognised: list patients, where known, in groups.csv."
