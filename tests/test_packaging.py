"""The wheel, installed where there is no checkout: it carries all that the commands need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import REPOSITORY

import lungct_tune

SOURCES = ["pyproject.toml", "README.md", "LICENSE", "lungct_tune", "search_spaces", "clusters"]
UV = [sys.executable, "-m", "uv", "--quiet", "--offline"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with nothing but the wheel; of this one it sees what the wheel depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # a copy, since a build leaves files beside its sources, and takes up those of an earlier one
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    subprocess.run([*UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, folder], check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    environment = folder / "environment"
    subprocess.run([*UV, "venv", "--python", sys.executable, environment], check=True)
    programs = environment / "bin"
    subprocess.run([*UV, "pip", "install", "--python", programs / "python", "--no-deps", wheel], check=True)
    # as a folder of modules only: what stands there of this checkout, which is installed by a .pth file, is not seen
    (site,) = environment.glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return programs


def run(*command: object, within: Path) -> str:
    """What a command prints that ends well, started in a folder without a checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=within, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_in(folder: Path) -> set[str]:
    """The paths of the files in a folder and those below it, without what Python compiled."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}


def test_the_wheel_has_every_file_of_the_package_and_the_search_spaces(installed: Path) -> None:
    (package,) = installed.parent.glob("lib/*/site-packages/lungct_tune")
    spaces = {f"search_spaces/{name}" for name in files_in(REPOSITORY / "search_spaces")}
    assert files_in(package) == files_in(REPOSITORY / "lungct_tune") | spaces | {"clusters/prices.yaml"}
    assert "py.typed" in files_in(package)


def test_the_wheel_alone_finds_its_default_search_space_and_its_templates(installed: Path, tmp_path: Path) -> None:
    look = """
from lungct_tune.config.search_space import parse_space, read_space
from lungct_tune.config.settings import Settings
from lungct_tune.reporting.html import render

path = Settings().for_data().space
parse_space(read_space(path), str(path))
print(path)
print(render("page.css", {}).decode())
"""
    path, *css = run(installed / "python", "-c", look, within=tmp_path).splitlines()
    assert Path(path).is_relative_to(installed.parent)
    assert css


@pytest.mark.usefixtures("cluster")
@pytest.mark.long
def test_the_installed_command_plans_a_search_from_another_folder(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "lungct-tune", "--version", within=tmp_path) == f"lungct-tune {lungct_tune.__version__}\n"
    said = run(installed / "lungct-tune", "search", "--plan", within=tmp_path)
    assert "480 images in " in said and "backbone_lr: 0.0003 to 0.005, logarithmic" in said
    assert not any(tmp_path.iterdir())
