"""A search that ships an ensemble, from the command to the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, SPACE

from lungct_tune import predict, search
from lungct_tune.data import read_images
from lungct_tune.evaluation.calibration import calibrated
from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.experiment.predictions import read_predictions
from lungct_tune.models.ensemble import members_of
from lungct_tune.models.preprocessing import as_grey, forward

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.long]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """The folder of a search that has not looked at test."""
    storage = tmp_path_factory.mktemp("storage")
    (storage / "space.yaml").write_text(SPACE)
    of_what = ["--data", str(phantoms), "--space", str(storage / "space.yaml"), *SMALL, "--folds", "2", "--ensemble"]
    how = ["--trials", "3", "--epochs", "3", "--slots", "2", "--hold-test", "--compare-baseline"]
    assert search.main([*of_what, *how, "--storage", str(storage), "--name", "one"]) == 0
    return storage / "one"


def test_the_models_of_the_folds_are_judged_together_once(
    held: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main(["--judge", "one", "--storage", str(held.parent)]) == 0
    assert "for an ensemble of 2 models, 3 epochs" in capsys.readouterr().out
    best = held / "best"
    config, metrics = (json.loads((best / name).read_text()) for name in ("config.json", "metrics.json"))
    assert config["model"]["members"] == 2 and metrics["looks"] == 1
    number, temperature = metrics["best_trial"]["trial"], config["calibration"]["temperature"]
    of_members = [
        np.load(held / f"final/trial_{number:04d}_003_epochs_without_fold_{k}/test_probabilities.npy") for k in (0, 1)
    ]
    judged = read_predictions((best / "predictions.csv").read_bytes(), config["classes"])
    expected_NC = np.mean([calibrated(NC, temperature) for NC in of_members], axis=0)
    np.testing.assert_allclose(judged.probabilities_NC, expected_NC, atol=1e-6)
    assert len(list((held / "final").iterdir())) == (2 if number == 0 else 4), "the published configuration's too"

    # they are the models that the trial had: each predicts the images of its fold as it did then
    images = read_images(phantoms, 32, progress=False)
    table = pd.read_csv(held / "split.csv").set_index("path").loc[images.table["path"]]
    searched, fold_N = np.flatnonzero(table["split"] != "test"), table["fold"].to_numpy()
    valid_NC = np.load(held / "trials" / f"{number:04d}" / "valid.npy")
    classifier = Classifier.load(best, "cpu")
    for k, member in enumerate(members_of(classifier.model)):
        mine = fold_N[searched] == k
        with torch.no_grad():
            grey_N1HW = as_grey(torch.from_numpy(images.images_NHW[searched[mine]]))
            again_NC = forward(member, grey_N1HW, "imagenet").softmax(dim=1).numpy()
        np.testing.assert_allclose(again_NC, valid_NC[mine], atol=1e-4)
    assert "as an ensemble of the models of its 2 folds" in (best / "report.html").read_text()
    image = next(phantoms.glob("test/*/*.png"))
    assert predict.main([str(best), str(image), "--out", str(tmp_path / "said.csv")]) == 0
