"""A file from a stranger neither starts a program nor fills the memory when it is decoded."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from lungct_tune.data import DataError, cache, read_images
from lungct_tune.data.decode import MEMORY, Decoded, decode
from lungct_tune.data.grey import MOST_PIXELS, PERCENTILES, read_grey

MEASURE = """
import resource, sys
from pathlib import Path
from lungct_tune.data.decode import decode
def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
decode(Path(sys.argv[1]), 224)
print(peak() - before)
"""


def test_a_format_that_starts_programs_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript for PostScript, whatever the file is called."""
    (tmp_path / "bin").mkdir()
    started = tmp_path / "started"
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {started}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    for name, content in (("normal", "EPS"), ("adenocarcinoma", "PNG")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "x.png", format=content)
    with pytest.raises(DataError, match=r"normal/x\.png: not an image in one of the formats PNG, JPEG"):
        read_images(tmp_path / "images", 32, cache=tmp_path / "cache")
    assert not started.exists()


def test_an_image_of_more_pixels_than_any_slice_is_refused(tmp_path: Path) -> None:
    Image.new("1", (5001, 4000)).save(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size < 10_000
    with pytest.raises(ValueError, match="5001 x 4000 pixels; at most 20,000,000"):
        decode(tmp_path / "x.png", 32)


@pytest.mark.parametrize(
    ("name", "mode"), [("16 bit.png", "I;16"), ("32 bit.tif", "F"), ("four channels.webp", "RGBA")]
)
def test_an_image_of_the_most_pixels_is_decoded_in_bounded_memory(tmp_path: Path, name: str, mode: str) -> None:
    height, width = 4000, MOST_PIXELS // 4000
    values_HW = np.tile(np.arange(width, dtype=np.float32), (height, 1))
    image = {
        "I;16": lambda: Image.fromarray(values_HW.astype(np.uint16)),
        "F": lambda: Image.fromarray(values_HW),
        "RGBA": lambda: Image.new("RGBA", (width, height), (10, 20, 30, 40)),
    }[mode]()
    options = {"lossless": True, "method": 0} if mode == "RGBA" else {}
    image.save(tmp_path / name, **options)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MEMORY


@pytest.mark.parametrize(("free", "at_once"), [(0, 1), (2 * MEMORY, 2)])
def test_no_more_threads_decode_than_memory_allows(
    free: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("normal", "adenocarcinoma"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels_HW = np.random.default_rng(number + 10 * len(name)).integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels_HW).save(tmp_path / "images" / name / f"{number}.png")
    decoding, most, lock = 0, 0, threading.Lock()

    def counted(path: Path, size: int, _: None) -> Decoded:
        nonlocal decoding, most
        with lock:
            decoding += 1
            most = max(most, decoding)
        time.sleep(0.02)
        decoded = decode(path, size)
        with lock:
            decoding -= 1
        return decoded

    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cache, "_free_memory", lambda: free)
    monkeypatch.setattr(cache, "decode", counted)
    read_images(tmp_path / "images", 32, cache=tmp_path / "cache", skip_unreadable=True)
    assert most == at_once


def test_deep_images_are_scaled_in_blocks_as_they_would_be_at_once() -> None:
    values_HW = np.random.default_rng(0).integers(0, 4096, (1100, 1000)).astype(np.uint16)  # more than a block
    exact_HW = values_HW.astype(np.float64)
    low, high = np.percentile(exact_HW, PERCENTILES)
    expected_HW = np.clip(np.round((exact_HW - low) * (255 / (high - low))), 0, 255)
    np.testing.assert_array_equal(np.asarray(read_grey(Image.fromarray(values_HW)).image), expected_HW)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_refused(value: float) -> None:
    values_HW = np.zeros((4, 4), np.float32)
    values_HW[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        read_grey(Image.fromarray(values_HW))
