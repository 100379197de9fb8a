"""The command line of serve, as far as it starts no Ray."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from lungct_tune.serve import main


def test_a_port_that_is_taken_is_an_error(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main([str(bundle), "--port", port]) == 2
    assert f"--port {port}: nothing can listen there" in capsys.readouterr().err


def test_a_damaged_bundle_is_an_error(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = shutil.copytree(bundle, tmp_path / "best")
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"changed")
    assert main([str(damaged)]) == 2
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["fastapi", "python_multipart"])
def test_what_is_not_installed_is_named(
    module: str, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main([str(bundle)]) == 2
    assert f"{module} is missing" in (said := capsys.readouterr().err) and "lungct-tune[serve]" in said


@pytest.mark.parametrize(
    "words",
    [
        *(["--port", word] for word in ("0", "65536", "http", "²")),
        *(["--replicas", word] for word in ("0", "3-2", "-1", "1-", "two")),
        *(["--gpus-per-replica", word] for word in ("-1", "nan", "1.5", "1e3")),
    ],
)
def test_wrong_values_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bundle", *words])
    assert end.value.code == 2 and words[0] in capsys.readouterr().err
