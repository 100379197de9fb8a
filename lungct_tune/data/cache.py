"""Decodes every image once and caches the result by content, so that the next start is fast.

An entry is two files. `<key>.npy` has the pixels; it is memory-mapped, since a set may be larger than memory.
`<key>.json` has what decoding found (groups, copies, unreadable files) and the checksum of the first file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL
import psutil
from numpy.lib.format import open_memmap

from lungct_tune.config.window import Window
from lungct_tune.data import copies, dicom
from lungct_tune.data.copies import PRINT, Copy, find_copies
from lungct_tune.data.decode import DECODER_VERSION, MEMORY, THUMBNAIL, FileProperties, decode
from lungct_tune.data.folders import DataError
from lungct_tune.data.grey import MOST_BYTES
from lungct_tune.data.groups import CORRELATIONS, SERIES_CORRELATION, groups_by_likeness, label_conflicts, merge
from lungct_tune.display import tracked
from lungct_tune.files import open_file

AT_FIRST = "it could not be read at first; run the command again"
"""Why a file is not used that can be read only now: its digest, and with DICOM its patient, are not known."""

_COPY_BLOCK = 1024  # images copied at a time


@dataclass(frozen=True)
class Reading:
    """What decoding found. An image is named by its position in the list that was decoded."""

    kept: list[int]
    """The images whose pixels are in the array, in its order."""
    groups: list[int]
    """The group of each kept image. A group has copies, and slices that look like one series."""
    group_counts: list[tuple[float, int]]
    """(threshold, groups): the number of groups at each similarity threshold."""
    copies: list[Copy]
    """Pairs of copies, including images that are not kept."""
    conflicts: list[list[int]]
    """Sets of copies under different classes."""
    properties: list[FileProperties]
    """The file properties of each kept image."""
    unreadable: list[tuple[int, str]]
    """(image, reason) of each image that cannot be decoded."""
    plain: list[int]
    """The kept images without content: nearly all pixels have one grey value."""


def default_cache() -> Path:
    """The user's cache folder for this program: $XDG_CACHE_HOME/lungct_tune, or ~/.cache/lungct_tune.

    Raises:
        DataError: neither is set, and the system knows no home of this user.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lungct_tune"
    except RuntimeError as error:
        raise DataError("this user has no home folder to keep decoded images in; set XDG_CACHE_HOME") from error


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, or "" if it cannot be read; decoding then reports the reason."""
    try:
        with open_file(path, MOST_BYTES) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def decode_all(
    paths: Sequence[Path],
    digests: Sequence[str],
    labels: Sequence[str],
    size: int,
    window: Window | None,
    cache: Path,
    progress: bool,
) -> tuple[np.ndarray, Reading]:
    """Returns the decoded images, (N, size, size) uint8, read-only and memory-mapped, and what decoding found.

    Uses the entry in `cache` for this content. If there is none, or it is damaged, decodes the images into a new
    entry. Unreadable images and copies under different classes are not in the array. If a file may be readable another
    time, see `is_passing`, nothing is kept. A file with an empty digest could not be read before, and is unreadable.

    Raises:
        DataError: the cache folder cannot be written or its disk is too full.
    """
    version = [DECODER_VERSION, PIL.__version__, CORRELATIONS, SERIES_CORRELATION, copies.VERSION]
    version += [dicom.VERSION, dicom.packages()]
    content = [version, size, window, list(zip(digests, labels, strict=True))]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    pixels, findings = cache / f"{key}.npy", cache / f"{key}.json"
    if entry := _read_entry(pixels, findings):
        return np.load(pixels, mmap_mode="r"), entry
    require_space(cache, len(paths) * (2 * size**2 + THUMBNAIL**2 + PRINT**2))
    # a network drive keeps the folder of a file that is still mapped
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as scratch:
        found, is_lasting = _decode_into(Path(scratch), paths, digests, labels, size, window, progress)
        new_pixels, new_findings = Path(scratch, "kept.npy"), Path(scratch, "findings.json")
        images_NHW = np.load(new_pixels, mmap_mode="r")
        if is_lasting:
            new_findings.write_text(json.dumps({"sha256": _digest(new_pixels), **asdict(found)}))
            new_pixels.replace(pixels)
            new_findings.replace(findings)
    return images_NHW, found


def is_passing(error: Exception) -> bool:
    """Whether a file may be readable another time: memory, disk or network failed, and not the file."""
    # a damaged file can have an offset that is no valid argument
    return isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.EINVAL)


def reason_of(error: Exception, path: str) -> str:
    """Why a file could not be read: without its path, which may be that of a copy, and without "[Errno 2]"."""
    said = (isinstance(error, OSError) and error.strerror) or str(error)
    # a name without a folder may be a word of the message
    return said.replace(path if "/" in path else repr(path), "the file") or type(error).__name__


def _read_entry(pixels: Path, findings: Path) -> Reading | None:
    """What the entry's second file says; None if there is no entry, or it is damaged."""
    try:
        entry = json.loads(findings.read_text())
        if entry.pop("sha256") != _digest(pixels):
            return None
        copies = [Copy(*pair) for pair in entry.pop("copies")]
        properties = [FileProperties(*file) for file in entry.pop("properties")]
        return Reading(**entry, copies=copies, properties=properties)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _digest(pixels: Path) -> str:
    with pixels.open("rb") as file:  # larger than any image's file
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(cache: Path, needed: int) -> None:
    """Creates the cache folder if it is missing, and checks the free space.

    Raises:
        DataError: the folder cannot be created or written, or its disk has less than `needed` bytes free.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if free < needed:  # a memory map on a full disk ends in SIGBUS, which cannot be caught
            raise OSError(f"{-(-needed // 10**6):,} MB are needed, and {free // 10**6:,} MB are free")
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise DataError(
            f"the cache folder {cache} cannot be used: {error}; set XDG_CACHE_HOME to another folder"
        ) from error


def _decode_into(
    scratch: Path,
    paths: Sequence[Path],
    digests: Sequence[str],
    labels: Sequence[str],
    size: int,
    window: Window | None,
    progress: bool,
) -> tuple[Reading, bool]:
    """Writes the usable images to `scratch`/kept.npy. Arrays are memory-mapped, so that little memory is used.

    Returns:
        What was found, and whether the next run would find the same.
    """
    n = len(paths)
    images_NHW = open_memmap(scratch / "all.npy", "w+", np.uint8, (n, size, size))
    thumbnails_NHW = open_memmap(scratch / "thumbnails.npy", "w+", np.uint8, (n, THUMBNAIL, THUMBNAIL))
    fingerprints_NHW = open_memmap(scratch / "prints.npy", "w+", np.uint8, (n, PRINT, PRINT))
    properties: dict[int, FileProperties] = {}
    pixel_digests: dict[int, str] = {}
    is_plain: dict[int, bool] = {}
    passing: list[int] = []

    def decode_row(i: int) -> str | None:
        try:
            decoded = decode(paths[i], size, window)
        except Exception as error:  # Pillow's plugins raise many kinds of errors on broken files
            if digests[i] and is_passing(error):  # a file without a digest has another key once it can be read
                passing.append(i)
            if digests[i] or isinstance(error, (OSError, MemoryError)):
                return reason_of(error, str(paths[i]))
        if not digests[i]:
            return AT_FIRST
        images_NHW[i], thumbnails_NHW[i], fingerprints_NHW[i], properties[i], pixel_digests[i], is_plain[i] = decoded
        return None

    unreadable = [(i, reason) for i, reason in enumerate(_in_threads(decode_row, n, progress)) if reason]
    readable = np.setdiff1d(np.arange(n), [i for i, _ in unreadable])
    if unreadable:
        thumbnails_NHW, fingerprints_NHW = thumbnails_NHW[readable], fingerprints_NHW[readable]
    digests_N, labels_N = [digests[i] for i in readable], [labels[i] for i in readable]
    found = find_copies(fingerprints_NHW, digests_N, [pixel_digests[i] for i in readable])
    pairs_P2 = np.array([pair[:2] for pair in found], dtype=np.intp).reshape(-1, 2)
    groups = {
        threshold: merge(groups_N, *pairs_P2.T)
        for threshold, groups_N in groups_by_likeness(thumbnails_NHW, digests_N).items()
    }
    conflicts = [readable[alike] for alike in label_conflicts(merge(np.arange(len(readable)), *pairs_P2.T), labels_N)]
    is_kept = ~np.isin(readable, np.concatenate([*conflicts, np.empty(0, dtype=int)]))
    kept = readable[is_kept]
    if len(kept) == n:
        (scratch / "all.npy").replace(scratch / "kept.npy")
    else:
        kept_NHW = open_memmap(scratch / "kept.npy", "w+", np.uint8, (len(kept), size, size))
        for start in range(0, len(kept), _COPY_BLOCK):
            block = slice(start, start + _COPY_BLOCK)
            kept_NHW[block] = images_NHW[kept[block]]
    reading = Reading(
        kept=kept.tolist(),
        groups=groups[SERIES_CORRELATION][is_kept].tolist(),
        group_counts=[(threshold, len(np.unique(groups_N[is_kept]))) for threshold, groups_N in groups.items()],
        copies=[pair._replace(first=int(readable[pair.first]), second=int(readable[pair.second])) for pair in found],
        conflicts=[alike.tolist() for alike in conflicts],
        properties=[properties[i] for i in kept],
        unreadable=unreadable,
        plain=[int(i) for i in kept if is_plain[i]],
    )
    return reading, not passing


def _in_threads(decode_row: Callable[[int], str | None], n: int, progress: bool) -> list[str | None]:
    """The results of `decode_row` for 0 to n - 1. Threads are enough, since Pillow decodes without the GIL."""
    with ThreadPoolExecutor(decoding_threads()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files that cannot be used are reported anyway
        return list(tracked(pool.map(decode_row, range(n)), "Decoding images", n, shown=progress))


def decoding_threads() -> int:
    """How many images can be decoded at the same time on this machine."""
    return max(1, min(os.cpu_count() or 1, _free_memory() // MEMORY))


def _free_memory() -> int:
    """Bytes of memory that are free on this machine, or in this container if that is less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")  # of Linux's control groups: docs.kernel.org/admin-guide/cgroup-v2.html
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        free = min(free, limit - used + int(cached))
    except (OSError, ValueError, KeyError):  # no such group, or no limit ("max")
        pass
    return int(free)
