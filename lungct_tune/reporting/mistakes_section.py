"""The report's section on mistakes: every misclassified image, with maps of what the network used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from lungct_tune.data import ImageSet
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.models.gradcam import evidence_scale, grad_cam
from lungct_tune.reporting.heat_maps import MAP_RED, transparency
from lungct_tune.reporting.html import data_uri

if TYPE_CHECKING:
    from lungct_tune.reporting.test_section import Network, Pictures

MOST_SHOWN = 300
"""The most misclassified images that are shown; each takes 25 KB."""

UNFOLDED = 24
"""The mistakes that are shown at once; the others are folded."""

RIGHT_SHOWN = 2
"""Correctly classified images of each class that are shown."""

PIXELS = 224
"""Width of a shown image; smaller ones are shown as they are."""


def mistakes_section(predictions: Predictions, pictures: Pictures, network: Network, seed: int) -> dict[str, Any]:
    """The values for the section on mistakes of judged.html.

    Args:
        network: for the Grad-CAM maps. There are none if its classes are not those of the predictions.
        seed: for the sample of correctly classified images.
    """
    classes, labels_N, predicted_N = predictions.classes, predictions.labels_N, predictions.predicted_N
    confidence_N = predictions.probabilities_NC.max(axis=1)
    wrong = np.flatnonzero(predicted_N != labels_N)
    wrong = wrong[np.argsort(-confidence_N[wrong], kind="stable")]
    random = np.random.default_rng(seed)
    right_by_class = [np.flatnonzero((labels_N == c) & (predicted_N == c)) for c in range(len(classes))]
    right = [row for rows in right_by_class for row in random.permutation(rows)[:RIGHT_SHOWN]]
    shown = np.array([*wrong[:MOST_SHOWN], *right], dtype=int)
    cases = [
        {
            "id": number,
            "path": predictions.paths_N[row],
            "group": predictions.groups_N[row],
            "truth": classes[labels_N[row]],
            "predicted": classes[predicted_N[row]],
            "probabilities": list(zip(classes, predictions.probabilities_NC[row], strict=True)),
        }
        for number, row in enumerate(shown)
    ]
    again = _add_pictures(cases, shown, predictions, pictures.images, network) if pictures.images and cases else ""
    few = f" Only the first {MOST_SHOWN} are shown." if len(wrong) > MOST_SHOWN else ""
    cards = _by_group(cases[: len(shown) - len(right)])
    images_before = np.cumsum([0, *map(len, cards)])[:-1]
    unfolded = int((images_before < UNFOLDED).sum())
    return {
        "summary": f"{len(wrong)} of {len(labels_N)} images are misclassified. The most confident come first, with the "
        "other slices of the same group." + few,
        "no_pictures": f"Without pictures: {pictures.missing}" if pictures.missing else "",
        "no_maps": "" if classes == network.classes else "No maps: the network's own classes are finer than these.",
        "has_maps": any(case.get("maps") for case in cases),
        "again": again,
        "wrong": cards[:unfolded],
        "folded": cards[unfolded:],
        "right": _by_group(cases[len(shown) - len(right) :]),
    }


def _by_group(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The images of a group together, in the order of their first."""
    cards: dict[Any, list[dict[str, Any]]] = {}
    for case in cases:
        cards.setdefault(case["group"], []).append(case)
    return list(cards.values())


def _add_pictures(
    cases: list[dict[str, Any]], rows: np.ndarray, predictions: Predictions, images: ImageSet, network: Network
) -> str:
    """Adds picture and maps to each case; says for how many the model predicts the same class again."""
    positions = pd.Index(images.table["path"]).get_indexer(predictions.paths_N[rows])
    images_NHW = images.images_NHW[positions]
    for case, image_HW in zip(cases, images_NHW, strict=True):
        case["picture"], case["maps"] = _picture(image_HW), []
    if predictions.classes != network.classes:
        return ""
    predicted_N, labels_N = predictions.predicted_N[rows], predictions.labels_N[rows]
    classes_N2 = np.stack([predicted_N, labels_N], axis=1)
    scale = evidence_scale(network.model, images_NHW, predicted_N, network.normalisation)
    maps_N2hw, again_NC = grad_cam(network.model, images_NHW, classes_N2, network.normalisation, scale)
    for case, maps_2hw in zip(cases, maps_N2hw, strict=True):
        case["maps"] = [_map(map_hw) for map_hw in maps_2hw[: 1 + (case["predicted"] != case["truth"])]]
    same = int((again_NC.argmax(axis=1) == predicted_N).sum())
    return f"Run again for these pictures, the model predicts the same class for {same} of {len(rows)}."


def _picture(grey_HW: np.ndarray) -> str:
    image = Image.fromarray(grey_HW)
    image.thumbnail((PIXELS, PIXELS))
    return data_uri(image, quality=70)


def _map(map_hw: np.ndarray) -> str:
    """Encodes a map: red where it is high, transparent where it is low; "" for a map of zeros."""
    if not map_hw.any():
        return ""
    alpha = transparency(map_hw, 112)
    image = Image.new("RGBA", alpha.size, MAP_RED)
    image.putalpha(alpha)
    return data_uri(image, quality=50)
