"""Measures the search for near copies: recall, precision, time and memory.

    python benchmarks/near_copies.py                          recall and precision on planted copies of phantoms
    python benchmarks/near_copies.py --data chest-ctscan      the same on planted copies of real images
    python benchmarks/near_copies.py --cost 1000 10000 50000  time and memory, by number of images

Copies are planted in images of different patients. A pair of a copy and its original is correct, any other pair is a
false alarm. In real images, a pair of originals that is also found without planted copies counts as neither. The cost
is that of the search alone, without decoding, on phantoms of 64 pixels, one per patient. Memory is the peak of the
process, without the images, which are memory-mapped.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from lungct_tune.data import make_phantoms, phantoms
from lungct_tune.data.copies import PRINT, find_copies
from lungct_tune.data.decode import THUMBNAIL
from lungct_tune.data.folders import find_images
from lungct_tune.data.grey import read_grey
from lungct_tune.data.groups import SERIES_CORRELATION, groups_by_likeness

if TYPE_CHECKING:
    from collections.abc import Callable


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("L")


def rescaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def shifted(image: Image.Image, x: float, y: float) -> Image.Image:
    """Shifts an image by shares of its width and height; the new area is black."""
    matrix = (1, 0, -round(x * image.width), 0, 1, -round(y * image.height))
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def windowed(image: Image.Image, low: float, high: float, gamma: float) -> Image.Image:
    greys = np.clip((np.arange(256) / 255 - low) / (high - low), 0, 1) ** gamma
    return image.point(np.round(255 * greys).astype(int).tolist())


Turn = Image.Transpose

KINDS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "JPEG, quality 20 to 90": lambda image, rng: jpeg(image, int(rng.integers(20, 91))),
    "rescaled, 0.4 to 2 times": lambda image, rng: rescaled(image, rng.uniform(0.4, 2)),
    "flipped or turned by 180°": lambda image, rng: [
        ImageOps.mirror(image),
        ImageOps.flip(image),
        ImageOps.flip(ImageOps.mirror(image)),
    ][rng.integers(3)],
    "shifted, up to 5 %": lambda image, rng: shifted(image, *rng.uniform(-0.05, 0.05, 2)),
    "window and gamma": lambda image, rng: windowed(
        image, rng.uniform(0, 0.15), rng.uniform(0.85, 1), rng.uniform(0.6, 1.6)
    ),
    "all of these, mildly": lambda image, rng: jpeg(
        rescaled(
            shifted(
                windowed(ImageOps.mirror(image), rng.uniform(0, 0.08), rng.uniform(0.92, 1), rng.uniform(0.8, 1.25)),
                *rng.uniform(-0.03, 0.03, 2),
            ),
            rng.uniform(0.6, 1.4),
        ),
        int(rng.integers(50, 91)),
    ),
    "turned by 90° or 270°, flipped or not": lambda image, rng: image.transpose(
        [Turn.ROTATE_90, Turn.ROTATE_270, Turn.TRANSPOSE, Turn.TRANSVERSE][rng.integers(4)]
    ),
    "inverted": lambda image, rng: ImageOps.invert(image),
    "turned by 90°, inverted, rescaled, JPEG": lambda image, rng: jpeg(
        rescaled(ImageOps.invert(image.transpose(Turn.ROTATE_90)), rng.uniform(0.6, 1.4)), int(rng.integers(50, 91))
    ),
}


def small(image: Image.Image, side: int) -> np.ndarray:
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def pairs_of(images: list[Image.Image]) -> set[tuple[int, int]]:
    fingerprints_NHW = np.stack([small(image, PRINT) for image in images])
    digests = [image.tobytes().hex() + str(image.size) for image in images]
    return {(copy.first, copy.second) for copy in find_copies(fingerprints_NHW, digests, digests)}


def quality(originals: list[Image.Image], console: Console) -> None:
    """Prints recall and precision for each kind of copy; for each kind, copies of half of the images are planted."""
    already = pairs_of(originals)
    n, rng = len(originals), np.random.default_rng(0)
    table = Table("planted copies", "planted", "found", "recall", "false alarms", "precision")
    for kind, change in KINDS.items():
        which = rng.choice(n, n // 2, replace=False)
        found = pairs_of(originals + [change(originals[i], rng) for i in which])
        right = {(int(i), n + at) for at, i in enumerate(which)}
        # if an original already had a copy, a pair of that copy and the planted one is correct too
        alike = {(min(a, b), max(a, b)) for a, b in already} | {(i, i) for i in range(n)}
        origin = [*range(n), *(int(i) for i in which)]
        false = [(i, j) for i, j in found if (min(origin[i], origin[j]), max(origin[i], origin[j])) not in alike]
        hits = len(found & right)
        precision = hits / max(hits + len(false), 1)
        table.add_row(kind, str(len(right)), str(hits), f"{hits / len(right):.3f}", str(len(false)), f"{precision:.3f}")
    console.print(f"{n} images; before any copy is planted: {len(already)} pairs")
    console.print(table)


def draw(patient: int) -> tuple[np.ndarray, np.ndarray]:
    class_name = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")[patient % 4]
    image = Image.fromarray(phantoms._slice([0, patient], class_name, 0.0, 64))
    return small(image, PRINT), small(image, THUMBNAIL)


def cost(sizes: list[int], console: Console) -> None:
    """Prints time, CPU time and peak memory of both searches, each in its own process."""
    table = Table("images", "copies", "CPU", "memory", "false alarms", "groups by likeness", "CPU", "memory")
    with tempfile.TemporaryDirectory() as folder:
        largest = max(sizes)
        fingerprints_NHW = open_memmap(f"{folder}/prints.npy", "w+", np.uint8, (largest, PRINT, PRINT))
        thumbnails_NHW = open_memmap(f"{folder}/thumbnails.npy", "w+", np.uint8, (largest, THUMBNAIL, THUMBNAIL))
        with multiprocessing.Pool() as pool:
            for i, drawn in enumerate(pool.imap(draw, range(largest), chunksize=64)):
                fingerprints_NHW[i], thumbnails_NHW[i] = drawn
        fingerprints_NHW.flush()
        thumbnails_NHW.flush()
        for n in sizes:
            rows = []
            for search in (_search_copies, _search_groups):
                with multiprocessing.get_context("spawn").Pool(1) as alone:
                    rows.append(alone.apply(_measured, (search, folder, n)))
            (wall, cpu, memory, found), (wall_g, cpu_g, memory_g, _) = rows
            copies = (f"{wall:.1f} s", f"{cpu:.1f} s", f"{memory:.0f} MB", str(found))
            table.add_row(str(n), *copies, f"{wall_g:.1f} s", f"{cpu_g:.1f} s", f"{memory_g:.0f} MB")
    console.print(table)


def _search_copies(folder: str, n: int) -> int:
    names = [str(i) for i in range(n)]
    return len(find_copies(np.load(f"{folder}/prints.npy", mmap_mode="r")[:n], names, names))


def _search_groups(folder: str, n: int) -> int:
    thumbnails_NHW = np.load(f"{folder}/thumbnails.npy", mmap_mode="r")[:n]
    return int(groups_by_likeness(thumbnails_NHW, [str(i) for i in range(n)])[SERIES_CORRELATION].max()) + 1


def _measured(search: Callable[[str, int], int], folder: str, n: int) -> tuple[float, float, float, int]:
    """Seconds, CPU seconds, peak MB more than before the search, and the search's result."""
    before, peak, done = _own_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], _own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    answer = search(folder, n)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    return wall, cpu, peak[0] - before, answer


def _own_memory() -> float:
    """Memory of this process in MB, without the pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="plant copies in these images instead of in phantoms")
    parser.add_argument("--images", type=int, default=200, help="how many of them (200)")
    parser.add_argument("--cost", type=int, nargs="+", metavar="N", help="measure time and memory instead")
    asked = parser.parse_args()
    console = Console(highlight=False)
    if asked.cost:
        cost(asked.cost, console)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = asked.data or make_phantoms(Path(folder), 0, patients=asked.images, size=192)
        paths = sorted({(root / file.path).read_bytes(): root / file.path for file in find_images(root).files}.values())
        if not asked.data:
            paths = [path for path in paths if path.stem.endswith("-0")]  # one slice of each patient
        chosen = np.random.default_rng(0).permutation(len(paths))[: asked.images]
        quality([read_grey(Image.open(paths[i])).image for i in chosen], console)


if __name__ == "__main__":
    main()
