"""The test results, as the report shows them: figures, curves and every mistake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from lungct_tune.data import ImageSet
from lungct_tune.experiment.results import Predictions, SearchResults
from lungct_tune.models.gradcam import grad_cam
from lungct_tune.models.truncated_resnet import TruncatedResNet50
from lungct_tune.reporting import test_charts
from lungct_tune.reporting.html import data_uri


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


MOST_SHOWN = 300
"""Wrong images shown with pictures, at most: 25 KB each."""


RIGHT_SHOWN = 2
"""Of each class, images that were recognised and are shown."""


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

    model: TruncatedResNet50
    classes: list[str]
    normalisation: str


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
            "roc": test_charts.roc(said.labels_N, said.probabilities_NC, said.classes),
            "precision_recall": test_charts.precision_recall(said.labels_N, said.probabilities_NC, said.classes),
            "reliability": test_charts.reliability(curves),
        },
        "calibration": about_calibration(calibration),
        "cancer": test["cancer_vs_normal"],
        "references": references(test),
        "difference": difference(test),
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
    maps_N2hw, again_NC = grad_cam(network.model, images_NHW, classes_N2, network.normalisation)
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


def find_pictures(found: SearchResults, data: str | Path | None) -> Pictures:
    """The images of a search, from `data` or where the search had them; why not, if they are not there."""
    from lungct_tune.data import DataError, fetch_images, make_phantoms, read_images
    from lungct_tune.data.cache import default_cache

    settings = found.settings
    root = data or settings["data"] or make_phantoms(default_cache(), settings["seed"])
    try:
        images = read_images(
            fetch_images(root),
            settings["image_size"],
            class_map=settings["class_map"],
            skip_unreadable=settings["skip_unreadable"],
        )
    except DataError as error:
        return Pictures(missing=f"{error}\nSay where the images are: --data DIR")
    if images.fingerprint != settings["fingerprint"]:
        return Pictures(missing=f"the images in {root} are not those of the search; say where they are: --data DIR")
    return Pictures(images)
