"""All hostile inputs, for all commands."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cases import SECRET, Case
from stored import bundle_cases, experiment, experiment_cases
from user_files import (
    folder_cases,
    groups_cases,
    image_cases,
    settings_cases,
    space_cases,
    weights_cases,
)


def flag_cases() -> Iterator[Case]:
    nothing = lambda here, _: None  # noqa: E731
    for command, words, says in [
        ("search", ["--study", ""], "--study"),
        ("search", ["--settings", ""], "--settings"),
        ("search", ["--plan", "--storage", "://"], "storage"),
        ("search", ["--plan", "--cpus-per-worker", "inf"], "cpus_per_worker"),
        ("search", ["--plan", "--trials", "\x1b[2J"], "trials"),
        ("search", ["--plan", "--data", f"s3://me:{SECRET}@host/x"], "s3"),
        ("search", ["--plan", "--data", f"fsspec+http://host/x?token={SECRET}"], "http"),
        ("search", ["--plan", "--space", f"https://me:{SECRET}@host/x.yaml"], "space"),
        ("search", ["--trails", "3"], "--trails"),
        ("search", ["--plan", "--data", "M\udcfcller"], "UTF-8"),
        ("search", ["--resume", "nothing", "--storage", "HERE"], "nothing"),
        ("search", ["--resume", "../x"], "resume"),
        ("audit", ["--data", "HERE", "--html", "HERE/same", "--json", "HERE/same"], "same"),
        ("audit", ["--data", ""], "--data"),
        ("audit", ["--data", "\x1b[2J"], "data"),
        ("audit", ["--data", "HERE", "--image-size", "yes"], "image_size"),
        ("audit", ["--data", "HERE", "--class-map", "a=b=,"], "class_map"),
        ("report", ["nothing", "--storage", "HERE"], "nothing"),
        ("report", ["", "--storage", "HERE"], "empty"),
        ("report", ["x", "--storage", f"s3://me:{SECRET}@host/x"], "s3"),
        ("report", ["nothing", "--storage", "HERE", "--out", "HERE"], "HERE"),
        ("replay", ["nothing", "one"], "TRIAL"),
        ("replay", ["nothing", "1", "--storage", "HERE"], "nothing"),
        ("pull", ["nothing", "HERE/to", "--storage", "HERE"], "nothing"),
        ("pull", [f"s3://me:{SECRET}@host/x/y", "HERE/to"], "s3"),
        ("pull", ["x", "HERE/to", "--cluster", "/dev/zero"], "/dev/zero"),
        ("pull", ["x", "HERE/to", "--cluster", "HERE/no.yaml"], "no.yaml"),
        ("evaluate", ["HERE", "--data", "HERE"], "checksums.txt"),
        ("evaluate", ["", "--data", "HERE"], "empty"),
        ("evaluate", ["HERE/no", "--data", "HERE"], "no"),
    ]:  # fmt: skip
        yield Case(f"flags, {command} {words}", command, tuple(words), nothing, says)

    def own_part(here: Path, given: Path) -> None:
        experiment(here, given)
        (here / "to.part").mkdir()
        (here / "to.part/.lock").touch()
        (here / "to.part/mine.txt").write_text("mine")

    yield Case("pull, a user's own DEST.part", "pull", ("HERE/f89f17a", "HERE/to"), own_part, "to.part")


@cache
def corpus() -> list[Case]:
    parts = (image_cases, folder_cases, groups_cases, settings_cases, space_cases, weights_cases)
    return [case for part in (*parts, bundle_cases, experiment_cases, flag_cases) for case in part()]
