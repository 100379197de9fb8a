"""Hostile inputs for all commands: what a user, a disk or somebody else may bring that cannot be used.

A case is a command whose folder a function has prepared. In its arguments, HERE stands for that folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

SECRET = "hunter2-of-the-corpus"
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@dataclass(frozen=True)
class Case:
    name: str
    command: str
    arguments: tuple[str, ...]
    prepare: Callable[[Path, Path], None]
    """Given the case's folder and that of an experiment, its bundle and its images, which it must not change."""
    says: str
    """What the message must name."""


def png(seed: int = 0) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def images(here: Path) -> Path:
    """Two classes of two images each."""
    for n, name in enumerate(("normal", "adenocarcinoma")):
        (here / "data" / name).mkdir(parents=True)
        for i in range(2):
            (here / "data" / name / f"{i}.png").write_bytes(png(2 * n + i))
    return here / "data"


AUDIT = ("--data", "HERE/data", "--image-size", "32")


def file_in(folder: str, name: str, content: bytes) -> Callable[[Path, Path], None]:
    def prepare(here: Path, _: Path) -> None:
        path = images(here) / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return prepare


def changed(do: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    return lambda here, _: do(images(here)) and None


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def image_cases() -> Iterator[Case]:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 48), dtype=np.uint8))
    whole = {format: saved(noise, format) for format in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")}
    contents = {"empty": b"", "text": b"no picture", "zeros": bytes(5000), "archive": b"PK\3\4" + bytes(99)}
    for format, content in whole.items():
        for share in (0.1, 0.5, 0.8):
            contents[f"{format} cut at {share}"] = content[: int(len(content) * share)]
        contents[f"{format} behind noise"] = bytes(range(256)) + content
    for seed in range(12):
        contents[f"noise {seed}"] = np.random.default_rng(seed).bytes(3000)
        flipped = bytearray(whole["PNG"])
        flipped[50 + 90 * seed] ^= 0xFF
        contents[f"PNG with a changed byte {seed}"] = bytes(flipped)
    contents["frames"] = saved(noise, "GIF", save_all=True, append_images=[noise.rotate(90), noise.rotate(45)])
    contents["pages"] = saved(noise, "TIFF", save_all=True, append_images=[noise.rotate(90)])
    contents["not a number"] = saved(Image.fromarray(np.full((24, 24), np.nan, np.float32)), "TIFF")
    contents["huge"] = saved(Image.new("1", (6000, 6000)), "PNG")
    contents["PostScript"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    endless = bytearray(whole["TIFF"])
    endless[-4:] = struct.pack("<I", 8)
    contents["TIFF that points into itself"] = bytes(endless[:8]) + b"\1\0" + bytes(12) + struct.pack("<I", 8)
    for name, content in contents.items():
        yield Case(f"image, {name}", "audit", AUDIT, file_in("normal", "broken.png", content), "broken.png")
    special: dict[str, Callable[[Path], object]] = {
        "pipe": lambda data: os.mkfifo(data / "normal/broken.png"),
        "device": lambda data: (data / "normal/broken.png").symlink_to("/dev/zero"),
        "terabyte": lambda data: os.truncate(_touch(data / "normal/broken.png"), 10**12),
        "link to itself": lambda data: (data / "normal/broken.png").symlink_to("broken.png"),
        "link to nothing": lambda data: (data / "normal/broken.png").symlink_to("nowhere"),
        "no UTF-8": lambda data: Path(os.fsdecode(os.fsencode(data) + b"/normal/broken\xff.png")).write_bytes(png(9)),
        "escape sequences": lambda data: (data / "normal/\x1b[31mbroken.png").write_bytes(b"x"),
    }
    for name, do in special.items():
        yield Case(f"image, {name}", "audit", AUDIT, changed(do), "broken")


def _touch(path: Path) -> Path:
    path.touch()
    return path


def folder_cases() -> Iterator[Case]:
    layouts: dict[str, tuple[Callable[[Path], object], str]] = {
        "no images": (lambda data: shutil.rmtree(data / "normal") or shutil.rmtree(data / "adenocarcinoma"), "data"),
        "one class": (lambda data: shutil.rmtree(data / "normal"), "only the class"),
        "empty class": (lambda data: (data / "squamous cell carcinoma").mkdir(), "squamous cell carcinoma"),
        "loose image": (lambda data: (data / "loose.png").write_bytes(png(7)), "loose.png"),
        "unknown class": (lambda data: (data / "normal").rename(data / "\x1b[2Jhealthy"), "healthy"),
        "markup": (lambda data: (data / "normal").rename(data / "[/bold]healthy"), "healthy"),
        "two places": (lambda data: shutil.copytree(data, data / "other"), "other"),
        "beside split": (lambda data: shutil.copytree(data, data / "train"), "beside"),
        "a file": (lambda data: (shutil.rmtree(data), data.write_text("x")), "data"),
        "gone": (shutil.rmtree, "data"),
        "a pipe": (lambda data: (shutil.rmtree(data), os.mkfifo(data)), "data"),
    }
    for name, (do, says) in layouts.items():
        yield Case(f"folder, {name}", "audit", AUDIT, changed(do), says)


def groups_cases() -> Iterator[Case]:
    contents = {
        "empty": b"",
        "other columns": b"file,patient\nnormal/0.png,1\n",
        "no lines": b"path\n",
        "semicolons": b"path;group\nnormal/0.png;1\n",
        "unknown path": b"path,group\nnormal/9.png,1\n",
        "outside": b"path,group\n../x.png,1\n",
        "absolute": b"path,group\n/etc/passwd,1\n",
        "empty group": b"path,group\nnormal/0.png,\n",
        "twice": b"path,group\nnormal/0.png,1\nnormal/0.png,2\n",
        "twice, spelled otherwise": b"path,group\nnormal/0.png,1\n./normal//0.png,2\n",
        "Latin-1": b"path,group\nnormal/M\xfcller.png,1\n",
        "UTF-16": "path,group\nnormal/0.png,1\n".encode("utf-16"),
        "null": b"path,group\nnormal/0.png\0,1\n",
        "escape": b"path,group\n\x1b[2J.png,1\n",
        "quote": b'path,group\n"normal/0.png,1\n',
        "a long line": b"path,group\n" + b"x" * 1_000_000 + b",1\n",
        "wider lines": b"path,group\na,b,c,d\na\nb,c\n",
        "secret": f"path,group\ns3://me:{SECRET}@host/x,1\n".encode(),
    }
    for name, content in contents.items():
        yield Case(f"groups.csv, {name}", "audit", AUDIT, file_in("", "groups.csv", content), "groups.csv")
    for name, do in {
        "pipe": lambda data: os.mkfifo(data / "groups.csv"),
        "device": lambda data: (data / "groups.csv").symlink_to("/dev/zero"),
        "terabyte": lambda data: os.truncate(_touch(data / "groups.csv"), 10**12),
    }.items():
        yield Case(f"groups.csv, {name}", "audit", AUDIT, changed(do), "groups.csv")


def written(name: str, content: str | bytes) -> Callable[[Path, Path], None]:
    def prepare(here: Path, _: Path) -> None:
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


YAML: dict[str, str | bytes] = {
    "bomb": BOMB,
    "a list": "- 1",
    "a word": "word",
    "empty": "",
    "no YAML": "a: [1",
    "tabs": "a:\n\t- 1",
    "Latin-1": b"name: M\xfcller",
    "null": b"name: a\0b",
    "deep": "a: " + "[" * 50_000,
    "long": "a: 1\n" * 200_000,
    "code": "a: !!python/object/apply:os.system ['touch /tmp/owned']",
    "a key that is a list": "? [1]\n: 2",
    "two documents": "a: 1\n---\nb: 2",
}


def settings_cases() -> Iterator[Case]:
    for name, content in YAML.items():
        yield Case(
            f"settings, {name}", "search", ("--plan", "--settings", "HERE/x.yaml"), written("x.yaml", content), ""
        )
    wrong: dict[str, list[str]] = {
        "trials": ["yes", "0", "-1", "1.5", ".inf", ".nan", "many", "[1]", "{a: 1}", "''", "1e400"],
        "seed": ["true", "-1", "1e99", ".nan", "4294967296", "x"],
        "cpus_per_worker": [".inf", "-1", "0", ".nan", "yes", "x"],
        "image_size": ["31", "1e9", "no", "[]"],
        "batch_size": ["1", "yes"],
        "checkpoint_interval": [".nan", ".inf", "-1"],
        "split": ["yes", "random", "1"],
        "storage": ["''", "'://'", "3", "null", "[a]"],
        "study": ["''", "x", f"'postgresql://me:{SECRET}@host/db'", "3"],
        "track": ["x", f"'mlflow:http://me:{SECRET}@host'", "''"],
        "name": ["'../x'", "''", "2024", '"\\u001b[2J"'],
        "class_map": ["3", "[a]", "{a: [b]}", "{a: {b: c}}"],
        "data": ["/nowhere", "3", "[a]", "''", f"'file:///nowhere?token={SECRET}'"],
        "space": ["/nowhere", "3", "/dev/zero", "''"],
        "folds": ["1", "yes", "999"],
        "trails": ["3"],
        "verbose": ["maybe", "3"],
    }
    for key, values in wrong.items():
        for value in values:
            prepare = written("x.yaml", f"{key}: {value}\n")
            yield Case(f"settings, {key}: {value}", "search", ("--plan", "--settings", "HERE/x.yaml"), prepare, key)
    for name, path in {"pipe": "HERE/pipe", "device": "/dev/zero", "folder": "HERE", "missing": "HERE/no.yaml"}.items():
        yield Case(f"settings, {name}", "search", ("--settings", path), lambda here, _: os.mkfifo(here / "pipe"), path)


def space_cases() -> Iterator[Case]:
    plan = ("--plan", "--space", "HERE/x.yaml")
    for name, content in YAML.items():
        yield Case(f"space, {name}", "search", plan, written("x.yaml", content), "x.yaml")
    lines = {
        "unknown": "depth: 3",
        "bool": "dropout: yes",
        "text": "dropout: half",
        "infinity": "dropout: {low: 0, high: .inf}",
        "no number": "dropout: {low: .nan, high: 0.5}",
        "too high": "dropout: {low: 0, high: 2}",
        "reversed": "dropout: {low: 0.5, high: 0.1}",
        "no high": "dropout: {low: 0.5}",
        "more": "dropout: {low: 0.1, high: 0.5, step: 2}",
        "log of 0": "dropout: {low: 0, high: 0.5, log: true}",
        "log of text": "dropout: {low: 0.1, high: 0.5, log: 'yes'}",
        "whole": "truncation_depth: {low: 1.5, high: 9}",
        "deep": "truncation_depth: {low: 1, high: 50}",
        "giant": f"truncation_depth: {{low: 1, high: {10**400}}}",
        "choices": "dropout: [0.1, 0.2]",
        "choice of lists": "dropout: [[1], 2]",
        "no choice": "dropout: []",
        "nothing varies": "dropout: 0.5",
        "fixed": "dropout: {low: 0, high: 0.5}\nfixed_trials: 3",
        "fixed text": "dropout: {low: 0, high: 0.5}\nfixed_trials: [a]",
        "fixed key": "dropout: {low: 0, high: 0.5}\nfixed_trials: [{depth: 3}]",
        "fixed value": "dropout: {low: 0, high: 0.5}\nfixed_trials: [{dropout: [1]}]",
        "twice": "dropout: {low: 0, high: 0.5}\ndropout: {low: 0, high: 0.4}",
        "escape": '"\\e[2J": 3',
    }
    for name, content in lines.items():
        yield Case(f"space, {name}", "search", plan, written("x.yaml", content), "x.yaml")


def weights_cases() -> Iterator[Case]:
    stem = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.ones(64)}
    tensors: dict[str, Any] = {
        "other network": {f"blocks.{i}.weight": torch.zeros(3) for i in range(9)},
        "a tensor": torch.zeros(3),
        "a number": 3,
        "nothing": {},
        "text": {"state_dict": "x", "\x1b[2J": torch.zeros(2)},
        "only the stem": stem,
        "not finite": stem | {"bn1.weight": torch.full((64,), float("nan"))},
        "infinite": stem | {"bn1.weight": torch.full((64,), float("inf"))},
        "int8": {key: value.to(torch.int8) for key, value in stem.items()},
        "bool": {key: value > 0 for key, value in stem.items()},
        "complex": {key: value.to(torch.complex64) for key, value in stem.items()},
        "sparse": stem | {"bn1.weight": torch.ones(64).to_sparse()},
        "meta": stem | {"bn1.weight": torch.empty(64, device="meta")},
        "grey": stem | {"conv1.weight": torch.zeros(64, 1, 7, 7)},
    }
    search = ("--plan", "--image-size", "32", "--weights", "HERE/x.pth")
    for name, content in tensors.items():
        yield Case(
            f"weights, {name}", "search", search, lambda here, _, c=content: torch.save(c, here / "x.pth"), "x.pth"
        )
    for name, content in {
        "empty": b"",
        "noise": b"\x07noise",
        "zip": b"PK\3\4xx",
        "pickle": b"\x80\2cos\nsystem\n.",
    }.items():
        yield Case(f"weights, {name}", "search", search, written("x.pth", content), "x.pth")
        others = (*search[:-1], "HERE/x.safetensors")
        yield Case(f"safetensors, {name}", "search", others, written("x.safetensors", content), "x.safetensors")
    for name, path in {"missing": "HERE/no.pth", "device": "/dev/zero", "folder": "HERE"}.items():
        yield Case(f"weights, {name}", "search", (*search[:-1], path), lambda here, _: None, path)
    secret = (*search[:-1], f"s3://me:{SECRET}@host/x.pth")
    yield Case("weights, secret", "search", secret, lambda here, _: None, "x.pth")


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

                yield Case(f"bundle, {name} {what}{' sealed' * seal}", "evaluate", evaluate, prepare, name)
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
                    f"experiment, pull {name} {what}", "pull", ("HERE/f89f17a", "HERE/to"), damage, Path(name).name
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
