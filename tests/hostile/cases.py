"""A case of the corpus of hostile inputs: a command, and what a user, a disk or somebody else brings to it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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


def written(name: str, content: str | bytes) -> Callable[[Path, Path], None]:
    def prepare(here: Path, _: Path) -> None:
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare
