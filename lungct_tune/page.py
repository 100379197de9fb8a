"""Builds the report's page and the model card: findings, charts and pictures into the templates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from lungct_tune import charts, verdict
from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.evaluation.inference import build_model
from lungct_tune.experiment.bundle import CARD, MODEL, REPORT
from lungct_tune.experiment.study import best_figures, configuration_of
from lungct_tune.models.complexity import _sums, anatomy
from lungct_tune.models.gradcam import look
from lungct_tune.models.truncated_resnet import ACTIVATIONS, CutResNet, activation_nodes
from lungct_tune.rendering import data_uri, pairs_of_copies, render
from lungct_tune.training.objective import OBJECTIVE

if TYPE_CHECKING:
    from lungct_tune.data import ImageSet
    from lungct_tune.experiment.results import Findings, Predictions


MOST_SHOWN = 300
"""Wrong images shown with pictures, at most: 25 KB each."""

RIGHT_SHOWN = 2
"""Of each class, images that were recognised and are shown."""

PAIRS_SHOWN = 6
"""Of the pairs of copies that the audit found; its own page shows more."""

PIXELS = 224
"""Width of a shown image; smaller ones are shown as they are."""

MAP_RED = (226, 46, 26)


@dataclass(frozen=True)
class Pictures:
    """The images that a report can show, or why there are none."""

    images: ImageSet | None = None
    missing: str = ""


@dataclass(frozen=True)
class Network:
    """A bundle's model, for looking at what it looks at."""

    model: CutResNet
    classes: list[str]
    normalisation: str


def pages(name: str, found: Findings, pictures: Pictures) -> dict[str, bytes]:
    """The pages of a bundle, by file name."""
    return {REPORT: report_page(name, found, pictures), CARD: model_card(name, found)}


def report_page(name: str, found: Findings, pictures: Pictures) -> bytes:
    """report.html: one file without links to others.

    Args:
        name: the experiment's.
    """
    test = found.test
    sections = ["verdict", "data", "search", *(["winner"] if found.winner else [])]
    sections += ["test", "mistakes"] if test else []
    rows = verdict.compared_accuracies(test) if test else []
    shown: dict[str, Any] = {
        "name": name,
        "kind": "report",
        "found": found,
        "warnings": [*filter(None, (PHANTOMS if found.phantoms else "", verdict.standing(found)))],
        "sections": [*((section, section) for section in sections), ("again", "do it again")],
        "shows_images": pictures.images is not None,
        "verdict": verdict.verdict(found),
        "same_group": verdict.SAME_GROUP,
        "worth_chart": charts.worth(rows) if rows else "",
        "groups": found.split["group"].nunique(),
        "pairs": _pairs(found, pictures),
        "about_the_search": verdict.about_the_search(found),
        "failures": verdict.failures(found),
        "search_charts": _search_charts(found),
        "trials": verdict.trial_rows(found),
        "trial_columns": verdict.TRIAL_COLUMNS,
        "winner_number": found.winner.number if found.winner else None,
        "winner": _winner(found),
        "test": test,
        "command": verdict.command(found.settings),
        "facts": verdict.facts(found),
        "versions": ", ".join(f"{package} {v}" for package, v in found.config.get("versions", {}).items()),
    }
    if test:
        network = Network(
            build_model(found.config, found.bundle[MODEL]), found.classes, found.settings["normalisation"]
        )
        on = f"The final model, on {test['n']} images in {test['groups']} groups, once. " + (
            f"Of {found.seen} of them, trials have seen {verdict.SAME_GROUP}."
            if found.seen
            else "No trial has seen an image of these groups."
        )
        shown |= _judged(test, found.predictions, pictures, network, found.settings["seed"], on)
    return render(REPORT, shown)


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
        "verdict": verdict.of_others(metrics, searched),
        "warnings": verdict.left_out_of_others(metrics),
        "sections": [*((section, section) for section in ("verdict", "test", "mistakes")), ("again", "do it again")],
        "shows_images": True,
        "worth_chart": charts.worth(verdict.compared_accuracies(test)),
        "command": command,
        "facts": [(what, str(metrics[key])) for key, what in (("data", "images"), ("bundle", "bundle"))],
        "versions": "",
    }
    shown |= _judged(test, said, Pictures(images), network, 0, on)
    return render("evaluation.html", shown)


def model_card(name: str, found: Findings) -> bytes:
    """MODEL_CARD.md of a search that has ended.

    After Mitchell et al. (FAccT 2019) and the CLAIM checklist (Tejani et al., Radiology: Artificial Intelligence 2024).
    """
    assert found.winner is not None and found.test is not None
    configuration = configuration_of(found.winner)
    network = anatomy(configuration.truncation_depth, len(found.classes), found.settings["image_size"])
    shown = {
        "name": name,
        "found": found,
        "phantoms": PHANTOMS,
        "configuration": configuration,
        "sums": _sums(network),
        "groups": found.split["group"].nunique(),
        "verdict": verdict.verdict(found),
        "same_group": verdict.SAME_GROUP,
        "about_the_search": verdict.about_the_search(found),
        "test": found.test,
        "references": verdict.references(found.test),
        "calibration": verdict.about_calibration(found.test["calibration"]),
        "facts": verdict.facts(found),
    }
    return render(CARD, shown)


def _pairs(found: Findings, pictures: Pictures) -> list[dict[str, Any]]:
    return pairs_of_copies(found.audit, pictures.images.root, PAIRS_SHOWN) if found.audit and pictures.images else []


def _search_charts(found: Findings) -> dict[str, Any] | None:
    trials = found.trials
    if not any(best_figures(trial) for trial in trials):
        return None
    winner = found.winner.number if found.winner else None
    importance, varied = verdict.importance(found), found.space.distributions
    return {
        "history": charts.history(trials, winner, found.judged),
        "curves": charts.curves(trials, winner, found.judged),
        "importances": charts.importances(importance) if importance else "",
        "parallel": charts.parallel(trials, varied, winner),
        "slices": [
            charts.slice_of(trials, name, distribution, winner, epochs=found.settings["epochs"])
            for name, distribution in varied.items()
        ],
        "timeline": charts.timeline(trials, winner),
    }


def _winner(found: Findings) -> dict[str, Any] | None:
    if found.winner is None:
        return None
    configuration, best = configuration_of(found.winner), best_figures(found.winner)
    size, classes = found.settings["image_size"], len(found.classes)
    ours, whole = (anatomy(depth, classes, size) for depth in (configuration.truncation_depth, ACTIVATIONS))
    published = anatomy(PUBLISHED.truncation_depth, classes, size)
    baseline = best_figures(found.baseline) if found.baseline else None
    history, published_history = found.winner.user_attrs["history"], []
    if found.baseline and found.baseline.number != found.winner.number:
        published_history = found.baseline.user_attrs["history"]
    bars, labels = _activations(configuration.truncation_depth, configuration.frozen_depth)
    return {
        "compared": verdict.compared(configuration),
        "reached": [
            (f"{what} {found.judged}", verdict.percent(baseline[key]) if baseline else "", verdict.percent(best[key]))
            for key, what in ((OBJECTIVE, "balanced accuracy"), ("accuracy", "accuracy"))
        ],
        "depth": configuration.truncation_depth,
        "frozen": configuration.frozen_depth,
        "bars": bars,
        "stage_labels": labels,
        "stages": [
            *((stage, ours.parameters[stage], ours.flops[stage]) for stage in ours.parameters),
            ("this network", *_sums(ours)),
            ("published, 20 activations", *_sums(published)),
            ("all 49 activations", *_sums(whole)),
        ],
        "best_epoch": int(best["epoch"]),
        "validation": charts.validation(history, published_history, found.judged),
        "losses": charts.losses(history, found.judged),
    }


def _activations(depth: int, frozen: int) -> tuple[list[dict[str, Any]], list[tuple[str, float]]]:
    """The bars of the network's drawing, and its stages' names with their places."""
    heights = {"relu": 76, "layer1": 66, "layer2": 54, "layer3": 40, "layer4": 28}
    bars: list[dict[str, Any]] = []
    x = 4.0
    for k, node in enumerate(activation_nodes(), start=1):
        stage = node.partition(".")[0]
        x += 8 if bars and bars[-1]["stage"] != stage else 0
        state = "frozen" if k <= frozen else "learned" if k <= depth else "gone"
        bars.append({"k": k, "stage": stage, "x": x, "height": heights[stage], "state": state})
        x += 12
    labels = [("stem", 20.0)]
    for stage in list(heights)[1:]:
        of_stage = [bar["x"] for bar in bars if bar["stage"] == stage]
        labels.append((stage, (of_stage[0] + of_stage[-1]) / 2 + 8))
    return bars, [*labels, ("head", 669.0)]


def _judged(
    test: dict[str, Any], said: Predictions, pictures: Pictures, network: Network, seed: int, on: str
) -> dict[str, Any]:
    """What judged.html shows: figures, curves, and every mistake.

    Args:
        network: for the maps of what spoke for a class; of the same classes as the predictions, else there are none.
        on: the images, in a sentence.
    """
    matrix = np.array(test["confusion_matrix"])
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    calibration = test["calibration"]
    curves = {"as trained": calibration["reliability"]["before"]}
    if calibration["after"]:
        curves["after temperature scaling"] = calibration["reliability"]["after"]
    return {
        "test": test,
        "classes": said.classes,
        "judged_on": on,
        "tiles": [
            ("accuracy", test["accuracy"]),
            ("balanced accuracy", test["balanced_accuracy"]),
            ("macro F1", test["macro_f1"]),
            *([("accuracy on images new to it", test["leak_free"]["accuracy"])] if test.get("leak_free") else []),
        ],
        "confusion": [
            (
                name,
                [
                    (int(n), float(share), "winner" if row == column else "bad")
                    for column, (n, share) in enumerate(zip(matrix[row], shares[row], strict=True))
                ],
            )
            for row, name in enumerate(said.classes)
        ],
        "test_charts": {
            "roc": charts.roc(said.labels_N, said.probabilities_NC, said.classes),
            "precision_recall": charts.precision_recall(said.labels_N, said.probabilities_NC, said.classes),
            "reliability": charts.reliability(curves),
        },
        "calibration": verdict.about_calibration(calibration),
        "cancer": test["cancer_vs_normal"],
        "references": verdict.references(test),
        "difference": verdict.difference(test),
        "mistakes": _mistakes(said, pictures, network, seed),
    }


def _mistakes(said: Predictions, pictures: Pictures, network: Network, seed: int) -> dict[str, Any]:
    labels_N, said_N, sureness_N = said.labels_N, said.said_N, said.probabilities_NC.max(axis=1)
    wrong = np.flatnonzero(said_N != labels_N)
    wrong = wrong[np.argsort(-sureness_N[wrong], kind="stable")]
    random = np.random.default_rng(seed)
    recognised = [np.flatnonzero((labels_N == c) & (said_N == c)) for c in range(len(said.classes))]
    right = [row for rows in recognised for row in random.permutation(rows)[:RIGHT_SHOWN]]
    shown = np.array([*wrong[:MOST_SHOWN], *right], dtype=int)
    cases = [
        {
            "id": number,
            "path": said.paths[row],
            "truth": said.classes[labels_N[row]],
            "said": said.classes[said_N[row]],
            "probabilities": list(zip(said.classes, said.probabilities_NC[row], strict=True)),
        }
        for number, row in enumerate(shown)
    ]
    same_classes = said.classes == network.classes
    again = _add_pictures(cases, shown, said, pictures.images, network) if pictures.images and cases else ""
    few = f" The first {MOST_SHOWN} are shown." if len(wrong) > MOST_SHOWN else ""
    return {
        "summary": f"{len(wrong)} of {len(labels_N)} images are wrong. What the model was surest of comes first." + few,
        "no_pictures": f"Without pictures: {pictures.missing}" if pictures.missing else "",
        "no_maps": ""
        if same_classes
        else "Where the network looked is not shown: its own classes are finer than these.",
        "again": again,
        "wrong": cases[: len(shown) - len(right)],
        "right": cases[len(shown) - len(right) :],
    }


def _add_pictures(
    cases: list[dict[str, Any]], rows: np.ndarray, said: Predictions, images: ImageSet, network: Network
) -> str:
    """Gives each case its picture and maps; says whether the model named the same classes again here."""
    places = pd.Index(images.table["path"]).get_indexer(said.paths[rows])
    images_NHW = images.images_NHW[places]
    for case, image_HW in zip(cases, images_NHW, strict=True):
        case["picture"], case["maps"] = _picture(image_HW), []
    if said.classes != network.classes:
        return ""
    classes_N2 = np.stack([said.said_N[rows], said.labels_N[rows]], axis=1)
    maps_N2hw, again_NC = look(network.model, images_NHW, classes_N2, network.normalisation)
    for case, maps_2hw in zip(cases, maps_N2hw, strict=True):
        case["maps"] = [_map(map_hw) for map_hw in maps_2hw[: 1 + (case["said"] != case["truth"])]]
    same = int((again_NC.argmax(axis=1) == said.said_N[rows]).sum())
    return f"The bundle's model, run again for these pictures, named the same class for {same} of {len(rows)}."


def _picture(grey_HW: np.ndarray) -> str:
    image = Image.fromarray(grey_HW)
    image.thumbnail((PIXELS, PIXELS))
    return data_uri(image, quality=70)


def _map(map_hw: np.ndarray) -> str:
    """Red where the map is high, transparent where it is low; "" for a map of nothing."""
    if not map_hw.any():
        return ""
    alpha = Image.fromarray(np.round(170 * map_hw).astype(np.uint8)).resize((112, 112), Image.Resampling.BICUBIC)
    image = Image.new("RGBA", alpha.size, MAP_RED)
    image.putalpha(alpha)
    return data_uri(image, quality=50)
