"""Draws Grad-CAM maps over their images, as files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lungct_tune.errors import UserError
from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.experiment.bundle import check_outside_bundles

PIXELS = 448
"""Width and height of a picture."""

MAP_RED = (226, 46, 26)

OPACITY = 170
"""Of the red where the evidence is highest, of 255."""


class HeatMapFolder:
    """Writes a PNG for each image into a folder: the image, and in red where it has evidence for the predicted class.

    The red has one scale for all images of a bundle. The files have the names of the images, below their common folder.

    Args:
        folder: is made if it is missing.
        sources: of all images.

    Raises:
        UserError: the folder has files.
    """

    def __init__(self, folder: Path, classifier: Classifier, sources: Sequence[str]) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already and is no empty folder; choose another --heatmaps")
        check_outside_bundles(folder, "--heatmaps")
        self._folder, self._classifier = folder, classifier
        self._common = os.path.commonpath([os.path.dirname(os.path.abspath(source)) for source in sources])

    def __call__(self, rows: pd.DataFrame, images_NHW: np.ndarray) -> None:
        """Draws images that were classified.

        Args:
            rows: of `Classifier.classify_files`.
            images_NHW: uint8 grey, of the same images.

        Raises:
            UserError: a file cannot be written.
        """
        if rows.empty:
            return
        classes_N = pd.Index(self._classifier.classes).get_indexer(pd.Index(rows["class"]))
        maps_Nhw = self._classifier.heat_maps(images_NHW, classes_N)
        for source, image_HW, map_hw in zip(rows["path"], images_NHW, maps_Nhw, strict=True):
            name = os.path.relpath(os.path.abspath(source), self._common)
            file = self._folder / f"{name}.heatmap.png"
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                overlay(image_HW, map_hw).save(file)
            except OSError as error:
                raise UserError(f"{file} cannot be written ({error}); choose another --heatmaps") from error


def overlay(image_HW: np.ndarray, map_hw: np.ndarray) -> Image.Image:
    """An image with its map in red: transparent at 0, of `OPACITY` at 1."""
    picture = Image.fromarray(image_HW).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).convert("RGB")
    picture.paste(MAP_RED, (0, 0), transparency(map_hw, PIXELS))
    return picture


def transparency(map_hw: np.ndarray, pixels: int) -> Image.Image:
    """How opaque the red of a map is, as a square image of so many pixels."""
    alpha = Image.fromarray(np.round(OPACITY * map_hw).astype(np.uint8))
    return alpha.resize((pixels, pixels), Image.Resampling.BICUBIC)
