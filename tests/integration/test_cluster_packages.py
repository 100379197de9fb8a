"""Nodes install what the locks pin, and check it."""

from __future__ import annotations

import re
import tomllib

import pytest
from conftest import REPOSITORY

FILES = ["cluster.yaml", "clusters/gcp.yaml", "clusters/onprem.yaml", "clusters/Dockerfile"]


def text(file: str) -> str:
    return (REPOSITORY / file).read_text()


@pytest.mark.parametrize("file", FILES)
def test_what_track_and_study_take_is_installed_where_the_search_runs(file: str) -> None:
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    installed = re.findall(r"--extra (\S+)", text(file))
    assert {"dicom", "mlflow", "onnx", "postgresql", "serve"} <= set(installed) < set(extras)


@pytest.mark.parametrize("file", [*FILES, "Makefile"])
def test_what_is_installed_is_checked_against_the_locks(file: str) -> None:
    lines = "\n".join(line for line in text(file).splitlines() if not line.lstrip().startswith("#"))
    installs = re.findall(
        r"pip install(.+?)(?:&&|\n *- |\n\t|\n\n|\nRUN|$)", re.sub(r"\\?\n {4}", " ", lines), re.DOTALL
    )
    assert len(installs) >= 2
    for install in installs:
        if "--no-deps --editable ." not in install:  # the project itself
            assert "--require-hashes" in install and re.search(r"requirements(-uv)?\.lock", install), install


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-uv.lock"])
def test_every_package_of_a_lock_has_its_checksums(lock: str) -> None:
    pins = re.split(r"\n(?=[A-Za-z0-9])", text(lock).strip())
    assert pins and all(re.match(r"\S+==\S+ .*\\\n    --hash=sha256:[0-9a-f]{64}", pin) for pin in pins)
    assert "://" not in text(lock)


def test_the_lock_has_what_every_extra_asks_for() -> None:
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    asked = {re.match(r"[\w-]+", requirement)[0].lower() for extra in extras.values() for requirement in extra}  # type: ignore[index]
    pinned = set(re.findall(r"^([\w.-]+)==", text("requirements.lock"), re.MULTILINE))
    assert asked - {"lungct-tune"} <= pinned
