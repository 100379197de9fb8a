"""Tracking with MLflow where it cannot be: what the user is told before a search begins."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from lungct_tune.search import main
from lungct_tune.tuning.callbacks.mlflow import MLflowTracker, TrackingError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.long
def test_a_search_that_mlflow_cannot_track_is_refused_before_it_begins(
    tmp_path: Path, phantoms: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(phantoms), "--weights", "none", "--storage", str(tmp_path / "s"), "--image-size", "32"]
    assert main([*arguments, "--track", "mlflow:http://127.0.0.1:9"]) == 2
    assert "MLflow at http://127.0.0.1:9 cannot be used" in capsys.readouterr().err
    assert not list((tmp_path / "s").glob("*/study.*"))


def test_without_mlflow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TrackingError, match="uv pip install mlflow"):
        MLflowTracker("mlflow:http://127.0.0.1:9", "any", new=True)
