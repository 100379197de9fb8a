"""Draws artificial CT slices, so that the program can run and be tested without images of patients.

Only the shape of what lies in a lung tells the classes apart. Its area, brightness and place, and the anatomy, window,
contrast and noise, have the same distributions for all four. So no histogram, no border and no similar image names the
class, and a network has something to learn. A phantom patient has two slices that look nearly the same, like a real
series. No result on phantoms says anything about people.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from lungct_tune.data.cache import require_space

SLICES = 2
"""Images of one phantom patient."""

_FOLDERS = {
    "adenocarcinoma": "adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib",
    "large.cell.carcinoma": "large.cell.carcinoma_left.hilum_T2_N2_M0_IIIa",
    "normal": "normal",
    "squamous.cell.carcinoma": "squamous.cell.carcinoma_left.hilum_T1_N2_M0_IIIa",
}  # name of a class in the published test folder: its name in train and valid

_VERSION = 2  # part of the folder's name; raise it when a change gives other images for the same seed

_NOTICE = """\
THESE ARE NOT PATIENTS.

Every image in this folder was drawn by a program (lungct_tune.data.phantoms), from random numbers.
Nothing measured on it says anything about people, their lungs or their diseases. Never mix these
files with real ones.
"""

_AIR, _LUNG, _FAT, _TISSUE, _BLOOD, _BONE = -1000, -850, -100, 0, 40, 250  # Hounsfield units
_MASS = 200  # brighter than a real mass, so that a small network learns it at 48 px in a few epochs


def make_phantoms(root: Path, seed: int, *, patients: int = 240, size: int = 48) -> Path:
    """Draws phantom patients, a quarter of them of each class, and writes them in Kaggle's layout.

    Args:
        root: the images go into a new folder in it, which is named after the other arguments. A complete folder is
            reused.
        seed: the same seed gives the same files.
        patients: at least 12, so that every class has a patient in train, valid and test (about 70/10/20).
        size: width and height of the images in pixels.

    Returns:
        The folder with train/, valid/, test/, groups.csv (the patient of each image) and PHANTOMS.txt.

    Raises:
        DataError: `root` cannot be written.
    """
    if patients < 12:
        raise ValueError(f"patients={patients}: at least 12 are needed, 3 of each class, one for each split")
    folder = root / f"phantoms-v{_VERSION}-{patients}x{SLICES}-{size}px-seed{seed}"
    if folder.exists():
        return folder
    require_space(root, patients * SLICES * (size**2 + 4096))  # a file has at least a block
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        unfinished = Path(scratch, folder.name)
        groups = [
            (path.relative_to(unfinished).as_posix(), f"phantom-{patient:03d}")
            for patient in range(patients)
            for path in _write_patient(unfinished, seed, patient, size)
        ]
        with (unfinished / "groups.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "group"), *groups])
        (unfinished / "PHANTOMS.txt").write_text(_NOTICE)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process finished the same folder first
                raise
    return folder


def _write_patient(root: Path, seed: int, patient: int, size: int) -> list[Path]:
    place_in_class, class_number = divmod(patient, len(_FOLDERS))
    class_name = list(_FOLDERS)[class_number]
    turns = ("train", "test", "valid", "train", "train", "train", "test", "train", "train", "train")
    split = turns[place_in_class % len(turns)]
    folder = root / split / (class_name if split == "test" else _FOLDERS[class_name])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{patient:03d}-{slice_number}.png" for slice_number in range(SLICES)]
    for slice_number, path in enumerate(paths):
        height = slice_number / (SLICES - 1) - 0.5
        Image.fromarray(_slice([seed, patient], class_name, height, size)).save(path)
    return paths


def _slice(patient_seed: list[int], class_name: str, height: float, size: int) -> np.ndarray:
    """One slice, (size, size) uint8; `height` is its position in the patient's stack, -0.5 to 0.5.

    All slices of a patient use the same random numbers, so they differ only in height and noise.
    """
    rng = np.random.default_rng(patient_seed)
    thorax = _Thorax(rng, size)
    level = rng.uniform(0, 1) + 0.1 * height  # 0: aortic arch, 1: just above the diaphragm
    _draw_body(thorax, rng)
    lungs = _draw_lungs(thorax, rng, level)
    for lung in lungs:
        _draw_vessels(thorax, rng, lung, height)
    _draw_mediastinum(thorax, rng, level)
    _draw_finding(thorax, rng, class_name, lungs[rng.integers(2)], height)
    low, high, gamma = rng.uniform(-1250, -1000), rng.uniform(300, 700), np.exp(rng.normal(0, 0.25))
    noise_HW = np.random.default_rng([*patient_seed, round(1000 * (height + 1))]).normal(size=(size, size))
    hounsfield_HW = gaussian_filter(thorax.hounsfield_HW, rng.uniform(0.3, 0.7)) + rng.uniform(15, 35) * noise_HW
    grey_HW: np.ndarray = np.round(255 * np.clip((hounsfield_HW - low) / (high - low), 0, 1) ** gamma)
    return grey_HW.astype(np.uint8)


_Point = np.ndarray | tuple[float, float]  # (x, y)


class _Thorax:
    """A slice being drawn, in the body's coordinates: x to the image's right, y to the back, about ±1."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        axis = np.linspace(-1, 1, size)
        turn, dx, dy = rng.normal(0, 0.06), rng.normal(0, 0.04), rng.normal(0, 0.04)
        wide, high = rng.uniform(0.95, 1.12), rng.uniform(0.95, 1.2)
        x_HW, y_HW = np.meshgrid(axis - dx, axis - dy)
        self.x_HW = (x_HW * np.cos(turn) + y_HW * np.sin(turn)) / wide
        self.y_HW = (y_HW * np.cos(turn) - x_HW * np.sin(turn)) / high
        self.hounsfield_HW = np.full((size, size), float(_AIR))
        self.pixel = 2 / size
        self._shift, self._largest = np.array([dx, dy]), max(wide, high)
        self._to_image = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * [wide, high]

    def _near(self, point: _Point, reach: float) -> tuple[slice, slice]:
        """The rows and columns of a window with all pixels that are at most `reach` from the point."""
        size = len(self.hounsfield_HW)
        column, row = ((self._to_image @ point + self._shift) + 1) / 2 * (size - 1)
        half = reach * self._largest / 2 * (size - 1) + 1
        rows, columns = (slice(max(0, int(at - half)), max(0, int(at + half) + 2)) for at in (row, column))
        return rows, columns

    def _fill(self, window: tuple[slice, slice], distance_hw: np.ndarray, hounsfield: float) -> None:
        """Paints where `distance_hw` is negative, with a soft edge of one pixel."""
        cover_hw = np.clip(0.5 - distance_hw / self.pixel, 0, 1)
        self.hounsfield_HW[window] += cover_hw * (hounsfield - self.hounsfield_HW[window])

    def blob(
        self,
        centre: _Point,
        radii: _Point,
        hounsfield: float,
        *,
        turn: float = 0,
        waves: tuple[tuple[int, float, float], ...] = (),
    ) -> None:
        """Draws an ellipse whose radius varies by `waves`: (number around the ellipse, amplitude, phase)."""
        largest = 1 + sum(abs(depth) for _, depth, _ in waves) + self.pixel / min(radii)
        window = self._near(centre, max(radii) * largest)
        dx_hw, dy_hw = self.x_HW[window] - centre[0], self.y_HW[window] - centre[1]
        across_hw = (dx_hw * np.cos(turn) + dy_hw * np.sin(turn)) / radii[0]
        along_hw = (dy_hw * np.cos(turn) - dx_hw * np.sin(turn)) / radii[1]
        distance_hw = np.hypot(across_hw, along_hw) - 1
        if waves:
            angle_hw = np.arctan2(along_hw, across_hw)
            distance_hw -= sum(depth * np.cos(count * angle_hw + phase) for count, depth, phase in waves)
        self._fill(window, distance_hw * min(radii[0], radii[1]), hounsfield)

    def line(self, start: _Point, end: _Point, width: float, hounsfield: float) -> None:
        """Draws a line from `start` (x, y), where it is `width` wide, to `end`, where it is half as wide."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        window = self._near(middle, np.hypot(dx, dy) / 2 + width + self.pixel)
        x_hw, y_hw = self.x_HW[window] - start[0], self.y_HW[window] - start[1]
        along_hw = np.clip((x_hw * dx + y_hw * dy) / (dx**2 + dy**2), 0, 1)
        away_hw = np.hypot(x_hw - along_hw * dx, y_hw - along_hw * dy)
        self._fill(window, away_hw - width / 2 * (1 - along_hw / 2), hounsfield)


class _Lung:
    """A lung: its side (-1 or 1), its centre and its radii."""

    def __init__(self, rng: np.random.Generator, side: int, level: float) -> None:
        self.side = side
        self.centre = np.array([side * rng.uniform(0.37, 0.46), rng.uniform(-0.08, 0.08)])
        self.radii = np.array([rng.uniform(0.27, 0.35), rng.uniform(0.44, 0.58)]) * (0.9 + 0.1 * level)
        self.hilum = self.centre - [side * 0.75 * self.radii[0], rng.uniform(-0.1, 0.1)]

    def at(self, angle: float, depth: float) -> np.ndarray:
        """The point (x, y) at `angle` (0: away from the heart), `depth` (0 to 1) of the way to the pleura."""
        direction = np.array([self.side * np.cos(angle), np.sin(angle)])
        return np.asarray(self.centre + depth * self.radii * direction)


def _waves(rng: np.random.Generator, depth: float, counts: tuple[int, ...]) -> tuple[tuple[int, float, float], ...]:
    return tuple((count, rng.normal(0, depth), rng.uniform(0, 2 * np.pi)) for count in counts)


def _draw_body(thorax: _Thorax, rng: np.random.Generator) -> None:
    wide, deep, fat = rng.uniform(0.84, 0.96), rng.uniform(0.66, 0.82), rng.uniform(0.02, 0.12)
    shape = _waves(rng, 0.02, (2, 3, 4))
    thorax.blob((0, 0.04), (wide, deep), _FAT, waves=shape)
    thorax.blob((0, 0.04), (wide - fat, deep - fat), _TISSUE, waves=shape)
    thorax.line((-0.9, deep + 0.16), (0.9, deep + 0.16), 0.03, _FAT)  # the table
    for angle in np.arange(0, 2 * np.pi, 2 * np.pi / rng.integers(9, 14)) + rng.uniform(0, 1):
        x, y = 0.88 * (wide - fat) * np.cos(angle), 0.04 + 0.88 * (deep - fat) * np.sin(angle)
        thorax.blob((x, y), (0.08, 0.025), _BONE, turn=np.arctan2(y * wide**2, x * deep**2) + np.pi / 2)
    back = deep - fat - rng.uniform(0.22, 0.30)
    thorax.blob((0, back), (0.13, 0.11), _BONE - 200, waves=_waves(rng, 0.05, (3,)))
    thorax.line((0, back + 0.1), (0, back + 0.26), 0.06, _BONE)
    thorax.blob((0, back + 0.14), (0.05, 0.04), _TISSUE)


def _draw_lungs(thorax: _Thorax, rng: np.random.Generator, level: float) -> list[_Lung]:
    lungs = [_Lung(rng, side, level) for side in (-1, 1)]
    for lung in lungs:
        lean = lung.side * rng.normal(0.08, 0.06)
        thorax.blob(lung.centre, lung.radii, _LUNG, turn=lean, waves=_waves(rng, 0.03, (2, 3, 5)))
    return lungs


def _draw_mediastinum(thorax: _Thorax, rng: np.random.Generator, level: float) -> None:
    """Draws the heart or the great vessels (depending on `level`), the aorta, and in upper slices the trachea."""
    wide = 0.14 + 0.17 * level + rng.normal(0, 0.02)
    x = 0.09 * level + rng.normal(0, 0.03)
    thorax.blob((x, rng.uniform(-0.2, -0.05)), (wide, rng.uniform(0.28, 0.4)), _BLOOD, turn=-0.5 * level)
    thorax.blob((rng.uniform(0.06, 0.14), 0.3), (0.085, 0.085), _BLOOD)
    trachea = (rng.normal(0, 0.02), rng.uniform(0, 0.1))
    if level < 0.5:
        thorax.blob(trachea, (0.055, 0.06), _AIR)


def _draw_vessels(thorax: _Thorax, rng: np.random.Generator, lung: _Lung, height: float) -> None:
    """Draws branches from the hilum, and dots where a vessel crosses the slice; they move with height."""
    thorax.blob(lung.hilum, (0.07, 0.09), _BLOOD)
    for _ in range(rng.integers(4, 7)):
        angle, depth = rng.uniform(-1.6, 1.6) + 0.1 * height, rng.uniform(0.1, 0.4)
        fork = lung.at(angle, depth)
        thorax.line(lung.hilum, fork, rng.uniform(0.03, 0.05), _TISSUE - 100)
        for turn in rng.uniform(-0.6, 0.6, size=2):
            thorax.line(fork, lung.at(angle + turn, depth + 0.35), 0.02, _TISSUE - 300)
    for _ in range(rng.integers(8, 20)):
        dot = lung.at(rng.uniform(0, 2 * np.pi) + 0.1 * height, rng.uniform(0.2, 0.85))
        thorax.blob(dot, (0.015, 0.015), _TISSUE - 100)


def _draw_finding(thorax: _Thorax, rng: np.random.Generator, class_name: str, lung: _Lung, height: float) -> None:
    """Adenocarcinoma: spiculated. Large cell: round and smooth. Squamous: with a cavity. Normal: a band, as of a scar.

    All have the same bright area, which is the patient's own, and lie anywhere in the lung. Every slice cuts them near
    their middle, so every slice shows them.
    """
    radius = np.sqrt(1 - height**2) * rng.uniform(0.15, 0.21)  # of a disc of this area
    centre = lung.at(rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.5))
    turn, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    if class_name == "adenocarcinoma":
        depth = 0.45
        radius /= np.sqrt(1 + depth**2 / 2)  # the area of an outline that varies by a cosine
        thorax.blob(centre, (radius, radius), _MASS, waves=((int(rng.integers(6, 9)), depth, phase),))
    elif class_name == "large.cell.carcinoma":
        longer = rng.uniform(1, 1.25)
        thorax.blob(centre, (radius * longer, radius / longer), _MASS, turn=turn)
    elif class_name == "squamous.cell.carcinoma":
        cavity = rng.uniform(0.75, 0.9) * radius
        outer = np.hypot(radius, cavity)
        thorax.blob(centre, (outer, outer), _MASS)
        thorax.blob(centre, (cavity, cavity), _LUNG)
    else:
        longer = rng.uniform(1.9, 2.3)
        thorax.blob(centre, (radius * longer, radius / longer), _MASS, turn=turn)


PHANTOMS = "These are PHANTOMS, drawn by a program, not patients: no figure here says anything about CT."
