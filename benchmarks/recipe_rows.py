"""The rows of benchmarks/recipe.py: what each training is like, and how it is judged."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """How one model is trained and judged. The defaults are those of commit f89f17a, cut at activation 22."""

    depth: int = 22
    epochs: int = 12
    size: int = 64
    batch: int = 32
    geometry: str = "squash"  # pad: keep the aspect; body: crop to the body, keep the aspect
    rotation: float = 72.0  # degrees, uniform in ±
    zoom: float = 0.2  # uniform in 1 ±
    flip: float = 0.5  # probability of a horizontal flip
    shift: float = 0.0  # share of the width, uniform in ±
    intensity: float = 0.0  # log gamma and log contrast in ± this, brightness in ± a third of it
    noise: float = 0.0  # standard deviation, grey values from 0 to 1
    smoothing: float = 0.1
    weighted: bool = True  # classes by the inverse of their frequency, as CrossEntropyLoss(weight=…) does
    mixup: float = 0.0  # alpha of the beta distribution
    probe: float = 0.0  # share of the epochs in which only the head learns
    decay_by_stage: float = 1.0  # factor of the learning rate from one stage to the one before
    backbone_lr: float = 3e-4
    head_lr: float = 1e-3
    weight_decay: float = 1e-2
    dropout: float = 0.5
    frozen: int = 0  # activations
    horizon: int = 50  # over about how many steps the averaged weights reach back
    models: int = 1  # that are averaged, each trained without another of so many parts of the training images
    clusters: int = 0  # see --clusters
    float32: bool = False  # also on a CPU that the program trains on in bfloat16
    judged: str = "running"  # norms: running, estimated; ema: averaged weights, with estimated norms; flips: ema, flips

    def key(self, seed: int) -> str:
        """Names the training: what differs from the defaults. One training is judged in several ways."""
        defaults = asdict(Recipe()) | {"judged": self.judged}
        changed = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        return json.dumps({**changed, "seed": seed}, sort_keys=True)


JUDGED = ("running", "estimated", "ema", "ema flips")
REFERENCE = Recipe()
MILD = replace(REFERENCE, rotation=15.0, zoom=0.1, shift=0.05)
DEFAULT = replace(MILD, weighted=False, horizon=16, judged="ema flips")  # of the program: it averages over an epoch
ROWS: dict[str, Recipe] = {
    "f89f17a": REFERENCE,
    "+ re-estimated norms": replace(REFERENCE, judged="estimated"),
    "+ averaged weights": replace(REFERENCE, judged="ema"),
    "+ flips at test time": replace(REFERENCE, judged="ema flips"),
    "+ no class weights": replace(REFERENCE, weighted=False),
    "mild: rotation 15°, zoom 10 %, shift 5 %": MILD,
    "mild + re-estimated norms": replace(MILD, judged="estimated"),
    "mild + averaged weights": replace(MILD, judged="ema"),
    "mild + flips at test time": replace(MILD, judged="ema flips"),
    "mild + no class weights": replace(MILD, weighted=False, judged="ema"),
    "mild + intensity 0.3": replace(MILD, intensity=0.3, judged="ema"),
    "mild + body crop, padded": replace(MILD, geometry="body", judged="ema"),
    "default": DEFAULT,
    "default + no label smoothing": replace(DEFAULT, smoothing=0.0),
    "default + running batch-norm statistics": replace(DEFAULT, judged="running"),
    "default + no flips at test time": replace(DEFAULT, judged="ema"),
    "default + no flips": replace(DEFAULT, flip=0.0, judged="ema"),
    "default + rotation 30°": replace(DEFAULT, rotation=30.0),
    "default + intensity 0.1": replace(DEFAULT, intensity=0.1),
    "default + intensity 0.3": replace(DEFAULT, intensity=0.3),
    "default + noise 0.03": replace(DEFAULT, noise=0.03),
    "default + padded": replace(DEFAULT, geometry="pad"),
    "default + MixUp 0.2": replace(DEFAULT, mixup=0.2),
    "default + head first for a sixth": replace(DEFAULT, probe=1 / 6),
    "default + rates by stage 0.5": replace(DEFAULT, decay_by_stage=0.5),
    "default + backbone rate 1e-3": replace(DEFAULT, backbone_lr=1e-3),
    "default + batch 16": replace(DEFAULT, batch=16, horizon=32),
    "default + batch 64": replace(DEFAULT, batch=64, horizon=8),
    "default + dropout 0.2": replace(DEFAULT, dropout=0.2),
    "default + 10 frozen": replace(DEFAULT, frozen=10),
    "default + 24 epochs": replace(DEFAULT, epochs=24),
    "default + 48 epochs": replace(DEFAULT, epochs=48),
    "default + 96 pixels": replace(DEFAULT, size=96),
    "default + 128 pixels": replace(DEFAULT, size=128),
    "default + 128 pixels, 10 frozen": replace(DEFAULT, size=128, frozen=10),
    "default + 128 pixels, backbone rate 1e-3": replace(DEFAULT, size=128, backbone_lr=1e-3),
    "default + 224 pixels": replace(DEFAULT, size=224),
    "default + average of 4 models": replace(DEFAULT, models=4),
    "default + float32": replace(DEFAULT, float32=True),
    "default, depth 20": replace(DEFAULT, depth=20),
    "linear probe": replace(REFERENCE, frozen=22),
}
