"""README and docs: what they show exists, parses, and is as the program is."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
PACKAGE = REPOSITORY / "lungct_tune"
LIMIT = 300_000
"""Bytes of a picture."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def slug(heading: str) -> str:
    """The anchor that GitHub and MkDocs give a heading."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@every_page
def test_every_link_and_picture_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"""(?:\]\(|src=")([^)"\s]+)""", page.read_text()):
        link = urlsplit(target)
        if link.scheme:
            continue
        file = (page.parent / link.path).resolve() if link.path else page
        assert file.is_file(), f"{page.name}: {target}"
        if link.fragment:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert link.fragment in map(slug, headings), f"{page.name}: {target}"


def test_sections_of_pages_that_the_code_names_are_there() -> None:
    files = [*REPOSITORY.glob("lungct_tune/**/*.py"), *REPOSITORY.glob("search_spaces/*.yaml")]
    named = {pair for file in files for pair in re.findall(r'(docs/[\w-]+\.md), "([^"]+)"', file.read_text())}
    assert named
    for page, section in named:
        assert re.search(rf"^#+ {re.escape(section)}$", (REPOSITORY / page).read_text(), re.M), (page, section)


def test_pages_of_the_site_link_to_nothing_outside_of_it() -> None:
    """A link to a file elsewhere in the repository works on GitHub, and is dead on the site."""
    for page in PAGES[1:]:
        for target in re.findall(r"\]\((\.\./[^)\s]+)\)", page.read_text()):
            pytest.fail(f"{page.name}: {target}")


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Every `python -m lungct_tune.X` that a page shows, with its flags."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    shown = re.findall(r"python -m lungct_tune\.(\w+)([^\n`#]*)", text)
    return [(command, re.findall(r"(?<=\s)--[a-z][a-z-]*", rest)) for command, rest in shown]


@every_page
def test_every_command_that_is_shown_has_its_flags(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, flags in commands(page):
        with pytest.raises(SystemExit):
            importlib.import_module(f"lungct_tune.{command}").main(["--help"])
        known = re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)
        assert set(flags) <= set(known), f"{page.name}: {command}"


def test_commands_are_found_in_pages() -> None:
    by_command = {command for page in PAGES for command, _ in commands(page)}
    assert by_command == {
        "clean",
        "search",
        "audit",
        "evaluate",
        "predict",
        "serve",
        "export",
        "compare",
        "report",
        "replay",
        "pull",
        "download",
    }


def test_new_places_in_upgrading_are_there() -> None:
    places = re.findall(r"^\| `.+ \| `([\w.]+)", (DOCS / "upgrading.md").read_text(), re.MULTILINE)
    assert len(places) > 50
    for place in places:
        module, _, name = place.rpartition(".")
        there = [PACKAGE.joinpath(*path.split(".")).with_suffix(".py") for path in (place, module)]
        assert there[0].exists() or re.search(rf"^(def|class) {name}\b", there[1].read_text(), re.MULTILINE), place


def test_messages_in_troubleshooting_are_the_programs() -> None:
    constants = [node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    said = "\n".join(node.value for node in constants if isinstance(node, ast.Constant) and isinstance(node.value, str))
    messages = re.findall(r"^\| `([^`]+)`", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        unsaid = [part for part in message.split("…") if part.strip() not in said]
        assert not unsaid, f"{message}: {unsaid}"


@every_page
def test_targets_that_are_shown_are_in_the_makefile(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    shown = re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    assert set(shown) <= set(targets)


@every_page
def test_python_that_is_shown_imports_what_there_is(page: Path) -> None:
    for module, names in re.findall(r"^from (lungct_tune\S*) import (.+)$", page.read_text(), re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{page.name}: {module}.{name}"


def test_settings_page_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    page = importlib.import_module("make_settings_page")
    assert page.PAGE.read_text() == page.settings_page(), "run `make settings-page`"


def test_map_of_the_code_is_complete() -> None:
    """Every module of the package is on the map, in its folder, and nothing else is."""
    text = (DOCS / "architecture.md").read_text()
    tree = text[text.index("\nlungct_tune/\n") :].split("\n", 2)[2].partition("\n\nsearch_spaces/")[0]
    folders, on_map = [PACKAGE], set()
    for line in filter(None, tree.splitlines()):
        indent, name = re.match(r"( +)(\S+)", line).groups()
        folders[len(indent) // 2 :] = [folders[len(indent) // 2 - 1] / name]
        on_map |= {folders[-1]} if name.endswith(".py") else set()
    assert on_map == {file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"}


@every_page
def test_no_page_names_a_host_of_a_package_registry(page: Path) -> None:
    assert not re.search(r"\b(pypi|pythonhosted|debian|npmjs|crates)\.(org|com|io|net)\b", page.read_text())


def test_pictures_are_small() -> None:
    large = [file.name for file in (DOCS / "pictures").iterdir() if file.stat().st_size > LIMIT]
    assert not large


def test_site_lists_every_page() -> None:
    listed = re.findall(r"^ +- (?:Overview: )?(\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES[1:]]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "architecture" / "index.html").exists() or (tmp_path / "architecture.html").exists()
