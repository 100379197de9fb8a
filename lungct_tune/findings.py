"""What a search has found, in sentences and rows: what the report says, drawn from what the experiment holds."""

from __future__ import annotations

import json
import math
import shlex
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import optuna
import pandas as pd
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from lungct_tune.bundle import CONFIG, METRICS, MODEL, find_bundle
from lungct_tune.configuration import PUBLISHED, Configuration
from lungct_tune.data import SPLITS
from lungct_tune.evaluation import OBJECTIVE
from lungct_tune.experiment import Experiment
from lungct_tune.settings import Settings
from lungct_tune.space import SearchSpace, parse_space
from lungct_tune.study_copy import COPY
from lungct_tune.terminal import PHANTOMS, describe
from lungct_tune.tuning.study import (
    BASELINE,
    COMPLETED,
    DIVERGED,
    FAILED,
    FINISHED,
    best_figures,
    best_trial,
    configuration_of,
)

AUDIT, PREDICTIONS = "audit.json", "predictions.csv"

EDGE = 0.02
"""A value within this share of a range from its end counts as lying at the edge of the space."""

LATE = 0.1
"""A best epoch within this share of the epochs from the last counts as still improving."""


class NothingHeld(ValueError):
    """There is no search to report on: the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class Findings:
    """What an experiment holds of a search, finished or not."""

    settings: dict[str, Any]
    """settings.yaml: plain values, since the paths in it may be another machine's."""
    space: SearchSpace
    study: dict[str, Any]
    """The study's own attributes: wall_s, slot_s, cluster."""
    trials: list[FrozenTrial]
    """Those that began, by number."""
    split: pd.DataFrame
    """split.csv: path, label, group, split of every image."""
    audit: dict[str, Any] | None
    bundle: Mapping[str, bytes]
    """The files of the bundle, or of the best so far; empty before a trial has completed."""

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return dict(json.loads(self.bundle[METRICS])) if METRICS in self.bundle else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        return dict(json.loads(self.bundle[CONFIG])) if CONFIG in self.bundle else {}

    @cached_property
    def predictions(self) -> pd.DataFrame | None:
        """predictions.csv: a row a test image; None before the search has ended."""
        return pd.read_csv(BytesIO(self.bundle[PREDICTIONS])) if PREDICTIONS in self.bundle else None

    @property
    def test(self) -> dict[str, Any] | None:
        """The figures of the test split; None before the search has ended."""
        return self.metrics.get("test")

    @property
    def phantoms(self) -> bool:
        return self.settings["data"] is None

    @property
    def data(self) -> str:
        """What the data are called."""
        return "phantoms" if self.phantoms else PurePath(self.settings["data"]).name

    @cached_property
    def classes(self) -> list[str]:
        return sorted(self.split["label"].unique())

    @cached_property
    def winner(self) -> FrozenTrial | None:
        return best_trial(self.trials)

    @cached_property
    def baseline(self) -> FrozenTrial | None:
        """The trial of the published configuration, if an epoch of it has ended."""
        return next((trial for trial in self.trials if trial.number == BASELINE and best_figures(trial)), None)

    @cached_property
    def ended(self) -> dict[str, int]:
        """How many trials ended how."""
        words = (
            "A point on the line is as sure as it should be; larger points are of more images. As trained: "
            f"{said(calibration['before'])}"
        )

    if calibration["after"]:
        words += (
            f"; after temperature scaling (temperature {calibration['temperature']:.2f}, fitted on "
            f"{calibration['fitted_on']['images']} images: {calibration['fitted_on']['what']}) "
            f"{said(calibration['after'])}"
        )
    return words + "."


def references(test: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What else was judged on the same test images, by what the report calls it."""
    titles = {"published": "published configuration, retrained", "majority class": "always the largest class"}
    return [
        (f"best shortcut: {row['name']}" if key == "shortcut" else titles.get(key, key), row)
        for key, row in test["references"].items()
    ]


def difference(published: Mapping[str, Any] | None) -> str:
    """The paired difference to the published configuration, where it was retrained; "" where it was not."""
    if published is None:
        return ""
    f = published["difference"]
    return (
        f"This model's accuracy less the published configuration's, on the same images: {100 * f['value']:+.1f} points "
        f"(95 % interval {100 * f['ci95'][0]:+.1f} to {100 * f['ci95'][1]:+.1f}); McNemar's test p = "
        f"{published['mcnemar_p']:.2g}."
    )


def facts(found: Findings) -> list[tuple[str, str]]:
    """What the figures rest on: data, seed, machines, time."""
    done, epochs = sum(found.ended.values()), sum(len(t.user_attrs.get("history", [])) for t in found.trials)
    training_s = sum(
        epoch["train_s"] + epoch["valid_s"] for t in found.trials for epoch in t.user_attrs.get("history", [])
    )
    wall_s = found.study.get("wall_s", 0.0)
    return [
        ("data", "drawn by lungct_tune.data.phantoms" if found.phantoms else str(found.settings["data"])),
        ("fingerprint of the data", found.settings["fingerprint"]),
        ("seed", str(found.settings["seed"])),
        ("hardware", found.study.get("cluster", "not noted")),
        ("time of the search", f"{duration(wall_s)}; in epochs, over all slots, {duration(training_s)}"),
        ("trials and epochs", f"{done} trials, {epochs} epochs"),
        ("images", f"{found.settings['image_size']} x {found.settings['image_size']} pixels, 8-bit grey"),
        ("weights to begin with", str(found.settings["weights"])),
    ]


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
