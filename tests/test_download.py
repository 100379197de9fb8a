"""The download from Kaggle where it cannot work: what the user is told."""

from __future__ import annotations

import shlex
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lungct_tune.download import main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_no_network_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # a real connection, refused
    assert main([str(tmp_path / "ct")]) == 2
    said = capsys.readouterr().err
    assert "cannot be downloaded" in said and "in a browser" in said and "--data" in said


def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    assert main([str(tmp_path)]) == 2
    assert "pip install kagglehub" in capsys.readouterr().err


def test_the_command_that_is_said_to_be_next_runs_with_any_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle = SimpleNamespace(dataset_download=lambda name, output_dir: output_dir)
    monkeypatch.setitem(sys.modules, "kagglehub", kaggle)
    assert main(["CT images"]) == 0
    assert shlex.split(capsys.readouterr().out.partition("Next: ")[2])[-2:] == ["--data", "CT images"]
