"""A bundle's model says of DICOM slices what it says of the same slices as PNG, with the window of the bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dicom_files import as_dicom, write_slice
from PIL import Image
from processes import run_here

from lungct_tune.config.window import Window
from lungct_tune.data import make_phantoms
from lungct_tune.evaluate import main as evaluate
from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.predict import main as predict


@pytest.fixture(scope="module")
def pngs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other phantom patients than those of the bundle."""
    return make_phantoms(tmp_path_factory.mktemp("elsewhere"), seed=7, patients=20, size=48)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory, pngs: Path) -> Path:
    return as_dicom(pngs, tmp_path_factory.mktemp("series"))


def test_predictions_for_dicom_are_those_for_the_same_slices(bundle: Path, pngs: Path, series: Path) -> None:
    paths = pd.read_csv(pngs / "groups.csv")["path"]
    classifier = Classifier.load(bundle)
    drawn = classifier.classify_files([pngs / path for path in paths])
    stored = classifier.classify_files([(series / path).with_suffix("") for path in paths])
    columns = [name for name in drawn if name not in ("path", "learned_from")]
    pd.testing.assert_frame_equal(drawn[columns], stored[columns])
    assert (stored["unreadable"] == "").all()


def test_patients_are_joined_by_patient_id(bundle: Path, pngs: Path, series: Path, tmp_path: Path) -> None:
    tables = []
    for folder in (pngs, series):
        out = tmp_path / f"{folder.name}.csv"
        assert run_here(predict, bundle, folder, "--by", "patient", "--out", out)[0] == 0
        tables.append(pd.read_csv(out))
    drawn, stored = tables
    assert len(drawn) == len(stored) == 20 and stored["patient"].str.fullmatch("patient-[0-9a-f]{16}").all()
    pd.testing.assert_frame_equal(drawn.filter(like="p_"), stored.filter(like="p_"))
    assert [Path(path).name for path in drawn["first_image"]] == [f"{Path(p).name}.png" for p in stored["first_image"]]


def test_an_evaluation_on_dicom_has_the_figures_of_that_on_png(
    bundle: Path, pngs: Path, series: Path, tmp_path: Path
) -> None:
    figures = []
    for folder in (pngs, series):
        status, _, complained = run_here(evaluate, bundle, "--data", folder, "--out", tmp_path / folder.name)
        assert status == 0, complained
        figures.append(json.loads((tmp_path / folder.name / "metrics.json").read_text())["test"])
    assert figures[0] == figures[1]


def test_the_window_is_the_bundles(bundle: Path, tmp_path: Path) -> None:
    classifier = Classifier.load(bundle)
    assert classifier.window is None
    window = {"center": 100.0, "width": 900.0}
    preprocessing = classifier.config.preprocessing.model_copy(update={"window": Window(**window)})
    windowed = replace(classifier, config=classifier.config.model_copy(update={"preprocessing": preprocessing}))
    assert windowed.window == Window(**window)
    grey_HW = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    path = write_slice(tmp_path / "x", grey_HW, window=Window(**window), WindowCenter=0, WindowWidth=2)
    Image.fromarray(grey_HW).save(tmp_path / "x.png")
    (drawn, stored), other = (
        windowed.classify_files([tmp_path / "x.png", path]).filter(like="p_").to_numpy(),
        classifier,
    )
    assert list(drawn) == list(stored) != list(other.classify_files([path]).filter(like="p_").to_numpy()[0])
    no_ct = write_slice(tmp_path / "no ct", grey_HW, Modality="MR")
    assert "not in Hounsfield units" in windowed.classify_files([no_ct])["unreadable"][0]
