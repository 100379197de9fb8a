"""Hostile bundles and experiments: damaged, edited by hand, or made by somebody else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from cases import Case


def bundle(here: Path, given: Path) -> Path:
    shutil.copytree(given / "results/f89f17a/best", here / "best")
    return here / "best"


def sealed(folder: Path) -> None:
    """Writes checksums that fit, as somebody does who makes a bundle."""
    files = sorted(path for path in folder.iterdir() if path.name != "checksums.txt")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (folder / "checksums.txt").write_text("".join(lines))


def without(keys: tuple[str, ...], value: Any = None) -> Callable[[Any], Any]:
    """Replaces the value at these keys, or removes it."""

    def change(content: Any) -> Any:
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        if value is None:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        return content

    return change


def of_json(file: str, change: Callable[[Any], Any], where: str = "best") -> Callable[[Path, Path], None]:
    """A bundle, or an experiment, with a changed JSON or YAML file."""

    def prepare(here: Path, given: Path) -> None:
        folder = bundle(here, given) if where == "best" else experiment(here, given)
        loads, dumps = (yaml.safe_load, yaml.safe_dump) if file.endswith(".yaml") else (json.loads, json.dumps)
        (folder / file).write_text(dumps(change(loads((folder / file).read_text()))))
        sealed(folder if where == "best" else folder / "best")

    return prepare


CONFIG_KEYS = [
    *(("model",), ("model", "truncation_depth"), ("model", "dropout"), ("classes",), ("preprocessing",)),
    *(("preprocessing", "image_size"), ("calibration",), ("training",), ("training", "configuration"), ("versions",)),
    *(("settings",), ("settings", "normalisation"), ("settings", "name"), ("settings", "trials")),
]


def bundle_cases() -> Iterator[Case]:
    evaluate = ("HERE/best", "--data", "HERE/data", "--out", "HERE/out")
    for keys in CONFIG_KEYS:
        for value in (None, "\x1b[2Jx", -5, [1], {"a": 1}):
            if value == "\x1b[2Jx" and keys[-1] in ("name",):
                continue
            yield Case(
                f"bundle, config {keys} {value!r}",
                "evaluate",
                evaluate,
                of_json("config.json", without(keys, value)),
                keys[0],
            )
    for name in ("config.json", "model.safetensors", "checksums.txt", "learned_from.csv"):
        for what, content in {"empty": b"", "noise": b"\xff\xfe\0", "list": b"[1]", "deep": b"[" * 99_999}.items():
            for seal in (False, True):

                def prepare(
                    here: Path, given: Path, name: str = name, content: bytes = content, seal: bool = seal
                ) -> None:
                    (bundle(here, given) / name).write_bytes(content)
                    if seal and name != "checksums.txt":
                        sealed(here / "best")

                yield Case(
                    f"bundle, {name} {what}{' sealed' * seal}",
                    "evaluate",
                    evaluate,
                    prepare,
                    "best" if name == "checksums.txt" else name,
                )
    for name, do in {
        "pipe": lambda folder: os.mkfifo(folder / "pipe"),
        "more": lambda folder: (folder / "more").touch(),
        "gone": lambda folder: (folder / "config.json").unlink(),
        "no bundle": shutil.rmtree,
    }.items():
        yield Case(
            f"bundle, {name}", "evaluate", evaluate, lambda here, given, do=do: do(bundle(here, given)) and None, "best"
        )


def experiment(here: Path, given: Path) -> Path:
    shutil.copytree(given / "results/f89f17a", here / "f89f17a")
    return here / "f89f17a"


def experiment_cases() -> Iterator[Case]:
    report, resume = ("HERE/f89f17a", "--out", "HERE/x.html"), ("--resume", "f89f17a", "--storage", "HERE")
    commands = {"report": report, "replay": ("HERE/f89f17a", "1"), "search": resume}
    for key in ("name", "trials", "epochs", "image_size", "fingerprint"):
        for value in (None, "\x1b[2Jx", [1], -1):
            for command, arguments in commands.items():
                if key in ("name", "fingerprint") and value == "\x1b[2Jx":
                    continue
                prepare = of_json("settings.yaml", without((key,), value), "experiment")
                yield Case(f"experiment, {command}, {key} {value!r}", command, arguments, prepare, key)
    for name in (
        "settings.yaml",
        "space.yaml",
        "split.csv",
        "audit.json",
        "study.db",
        "best/config.json",
        "best/metrics.json",
        "best/predictions.csv",
        "best/checksums.txt",
    ):
        for what, content in {
            "empty": b"",
            "noise": b"\xff\xfe\0" * 50,
            "list": b"[1]",
            "table": b"a,b\n1,2\n",
        }.items():
            if (name, what) in (("audit.json", "empty"),):
                continue

            def damage(here: Path, given: Path, name: str = name, content: bytes = content) -> None:
                (experiment(here, given) / name).write_bytes(content)

            says = "study" if name == "study.db" else Path(name).name
            yield Case(f"experiment, {name} {what}", "report", report, damage, says)
            if name.startswith("best/"):
                yield Case(
                    f"experiment, pull {name} {what}",
                    "pull",
                    ("HERE/f89f17a", "HERE/to"),
                    damage,
                    "best" if "checksums" in name else Path(name).name,
                )
    for keys in (
        ("verdict",),
        ("copies",),
        ("copies", "pairs"),
        ("groups",),
        ("shortcuts",),
        ("split_health",),
        ("classes",),
    ):
        for value in (None, 3, "x", [1]):
            prepare = of_json("audit.json", without(keys, value), "experiment")
            yield Case(f"experiment, audit {keys} {value!r}", "report", report, prepare, "audit.json")
    for keys in (("best_trial",), ("search",), ("test",), ("test", "accuracy"), ("data",)):
        for value in (None, 3, [1], {"a": 1}):
            prepare = of_json("best/metrics.json", without(keys, value), "experiment")
            yield Case(f"experiment, metrics {keys} {value!r}", "report", report, prepare, "metrics.json")
    for attribute in ("configuration", "history", "ended", "made_with"):
        for value in ("3", '"x"', "[1]", '[{"epoch": "x"}]', '{"a": 1}'):
            if (attribute, value) in (("ended", '"x"'), ("made_with", '{"a": 1}')):
                continue

            def attack(here: Path, given: Path, attribute: str = attribute, value: str = value) -> None:
                with sqlite3.connect(experiment(here, given) / "study.db") as study:
                    study.execute("UPDATE trial_user_attributes SET value_json = ? WHERE key = ?", (value, attribute))

            yield Case(f"experiment, study {attribute} {value}", "report", report, attack, attribute)
