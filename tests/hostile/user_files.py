"""Hostile files of a user: images, folders, groups.csv, settings, search spaces, weights."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import AUDIT, BOMB, SECRET, Case, changed, file_in, png, saved, written
from dicom_files import write_slice
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless


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
    contents |= dicom_contents()
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


def dicom_contents() -> dict[str, bytes]:
    """DICOM files that are damaged, ask for memory, or have what a decoder does not expect."""
    with tempfile.TemporaryDirectory() as scratch:
        grey_HW = np.random.default_rng(2).integers(0, 256, (32, 32), dtype=np.uint8)
        plain, deflated, rle, jpeg2000 = (
            write_slice(Path(scratch, "x"), grey_HW, syntax=syntax).read_bytes()
            for syntax in (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless)
        )
        huge = write_slice(Path(scratch, "x"), grey_HW, Rows=60_000, Columns=60_000)
        contents = {"DICOM, huge": huge.read_bytes()}
        window = write_slice(Path(scratch, "x"), grey_HW, WindowWidth="-1")
        contents["DICOM, a window that is none"] = window.read_bytes()
    bomb = bytearray(jpeg2000)
    size = bomb.find(b"\xff\x4f\xff\x51") + 8
    bomb[size : size + 8] = struct.pack(">2I", 60_000, 60_000)
    contents["DICOM, JPEG 2000 that is larger than its file says"] = bytes(bomb)
    contents["DICOM, only the preamble"] = plain[:132]
    contents["DICOM, cut in the header"] = plain[:400]
    contents["DICOM, cut in the pixels"] = plain[:-900]
    contents["DICOM, deflated and cut"] = deflated[:-300]
    deep = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 20_000
    contents["DICOM, sequences in sequences"] = plain[: plain.find(b"\x08\x00\x08\x00CS")] + deep
    contents["DICOM, RLE and cut"] = rle[:-900]
    return contents


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
        "markup": (lambda data: (data / "normal").rename(data / "[bold]healthy"), "healthy"),
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
        "storage": ["''", "'://'", "3", "[a]"],
        "study": ["''", "x", f"'postgresql://me:{SECRET}@host/db'", "3"],
        "track": ["x", f"'mlflow:http://me:{SECRET}@host'", "''"],
        "name": ["'../x'", "''", "2024", '"\\u001b[2J"'],
        "class_map": ["3", "[a]", "{a: [b]}", "{a: {b: c}}"],
        "data": ["/nowhere", "3", "[a]", "''", f"'file:///nowhere?token={SECRET}'"],
        "space": ["/nowhere", "3", "/dev/zero", "''"],
        "folds": ["0", "yes", "999"],
        "trails": ["3", "null"],
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
