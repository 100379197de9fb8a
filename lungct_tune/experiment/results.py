"""What an experiment holds of a search, at whatever point it is: what the report is made from."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import optuna
import pandas as pd
import yaml
from sqlalchemy.exc import SQLAlchemyError

from lungct_tune.config.search_space import SearchSpace, parse_space
from lungct_tune.data import SPLITS
from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import AUDIT, CONFIG, METRICS, MODEL, PREDICTIONS, find_bundle
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study import count_outcomes, read_trials
from lungct_tune.experiment.study_mirror import COPY
from lungct_tune.experiment.trial import BASELINE, Outcome, TrialRecord, best_trial
from lungct_tune.training.objective import judged


class NothingHeld(UserError):
    """There is no search to report on: the message says where it was looked for and what to do."""


def _read_table(csv: bytes) -> pd.DataFrame:
    """Names are as they were written: a class may be called 1, None or NA."""
    names = dict.fromkeys(("path", "label", "class", "predicted"), str)
    return pd.read_csv(BytesIO(csv), dtype=names, keep_default_na=False)


@dataclass(frozen=True)
class Predictions:
    """What a model said of images."""

    classes: list[str]
    csv: bytes
    """predictions.csv, a row an image."""

    @cached_property
    def _table(self) -> pd.DataFrame:
        return _read_table(self.csv)

    @property
    def paths(self) -> np.ndarray:
        return self._table["path"].to_numpy()

    @cached_property
    def labels_N(self) -> np.ndarray:
        """What the images are, as indices into `classes`."""
        return self._table["class"].map(self.classes.index).to_numpy()

    @cached_property
    def said_N(self) -> np.ndarray:
        """What the model says they are."""
        return self._table["predicted"].map(self.classes.index).to_numpy()

    @cached_property
    def probabilities_NC(self) -> np.ndarray:
        columns = [f"p_{name.replace(' ', '_')}" for name in self.classes]
        return self._table[columns].to_numpy(dtype=float)


@dataclass(frozen=True)
class SearchResults:
    """What there is to say about a search, finished or not."""

    settings: dict[str, Any]
    """settings.yaml: plain values, since the paths in it may be another machine's."""
    space: SearchSpace
    study: dict[str, Any]
    """The study's own attributes: wall_s, slot_s, cluster."""
    trials: list[TrialRecord]
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

    @property
    def test(self) -> dict[str, Any] | None:
        """The figures of the test split; None before the search has ended."""
        return self.metrics.get("test")

    @cached_property
    def predictions(self) -> Predictions:
        """Of the test images. There are none before the search has ended."""
        return Predictions(self.classes, self.bundle[PREDICTIONS])

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
    def winner(self) -> TrialRecord | None:
        return best_trial(self.trials)

    @cached_property
    def baseline(self) -> TrialRecord | None:
        """The trial of the published configuration, if an epoch of it has ended."""
        return next((trial for trial in self.trials if trial.number == BASELINE and trial.best), None)

    @property
    def baseline_score(self) -> float:
        """The best balanced accuracy of the published configuration's trial, where there is one."""
        assert self.baseline is not None and self.baseline.best is not None
        return self.baseline.best.balanced_accuracy

    @cached_property
    def ended(self) -> dict[str, int]:
        """How many trials ended how."""
        return count_outcomes(self.trials)

    @property
    def done(self) -> int:
        """How many trials have ended."""
        return sum(self.ended.values())

    @property
    def completed(self) -> int:
        """How many trials ran to their end."""
        return self.ended.get(Outcome.COMPLETED.value, 0)

    @property
    def has_failed(self) -> bool:
        """All trials have ended, and none of them ran to its end."""
        return self.done >= self.settings["trials"] and self.winner is None

    @property
    def seen(self) -> int:
        """How many test images have an image of their group in train or valid."""
        elsewhere = set(self.split["group"][self.split["split"] != "test"])
        return int(self.split["group"][self.split["split"] == "test"].isin(elsewhere).sum())

    @property
    def listed(self) -> int:
        """Of how many images groups.csv names the group."""
        return self.audit["groups"]["images_in_groups_csv"] if self.audit else 0

    @cached_property
    def counts(self) -> dict[str, list[int]]:
        """Images of each class in train, valid and test."""
        table = pd.crosstab(self.split["label"], self.split["split"]).reindex(columns=list(SPLITS), fill_value=0)
        return {str(name): [int(n) for n in row] for name, row in zip(table.index, table.to_numpy(), strict=True)}

    @property
    def judged(self) -> str:
        """On what trials are judged, in words."""
        return judged(self.settings.get("folds"))

    @property
    def searched_on(self) -> dict[str, int]:
        """Images of each class that trials are judged on: of validation, or with folds of train and validation."""
        return {
            name: valid + train * bool(self.settings.get("folds")) for name, (train, valid, _) in self.counts.items()
        }

    @property
    def totals(self) -> list[int]:
        """Images in train, valid and test."""
        return [sum(column) for column in zip(*self.counts.values(), strict=True)]


def read_results(experiment: Experiment) -> SearchResults:
    """Reads an experiment, also in the middle of its search.

    Raises:
        NothingHeld: no search, or one whose study cannot be read.
        StorageError: the storage refuses.
    """
    kept = experiment.read("settings.yaml")
    if kept is None:
        hint = "it is a pulled bundle, which has its own report.html" if experiment.exists("checksums.txt") else ""
        raise NothingHeld(
            f"there is no search in {experiment.uri} (no settings.yaml); "
            + (hint or "give the NAME of one and its --storage, or its folder or URI")
        )
    with tempfile.TemporaryDirectory() as scratch:
        study = _open_study(experiment, yaml.safe_load(kept), Path(scratch))
        folder = find_bundle(experiment)
        names = (CONFIG, METRICS, MODEL, PREDICTIONS)
        files = {name: experiment.read(f"{folder}/{name}") for name in names} if folder else {}
        return gather_results(experiment, study, {name: content for name, content in files.items() if content})


def gather_results(experiment: Experiment, study: optuna.Study, bundle: Mapping[str, bytes]) -> SearchResults:
    """What an experiment holds, with its study open and the bundle's files at hand."""
    settings, space, split, audit = (
        experiment.read(name) or b"" for name in ("settings.yaml", "space.yaml", "split.csv", AUDIT)
    )
    return SearchResults(
        settings=yaml.safe_load(settings),
        space=parse_space(space.decode(), f"{experiment.uri}/space.yaml"),
        study=study.user_attrs,
        trials=read_trials(study),
        split=_read_table(split),
        audit=json.loads(audit) if audit else None,
        bundle=bundle,
    )


def _open_study(experiment: Experiment, settings: Mapping[str, Any], scratch: Path) -> optuna.Study:
    """The study; where it is a file, a copy of it, since a search may be writing."""
    url = settings["study"]
    try:
        if not url:
            copy = scratch / COPY
            if experiment.is_local and Path(experiment.uri, COPY).is_file():
                with closing(sqlite3.connect(f"{Path(experiment.uri, COPY).as_uri()}?mode=ro", uri=True)) as live:
                    copy.write_bytes(live.serialize())
            elif (content := experiment.read(COPY)) is not None:
                copy.write_bytes(content)
            else:
                raise NothingHeld(
                    f"{experiment.uri} has no {COPY}: the search has not begun, or kept its study elsewhere"
                )
            url = f"sqlite:///{copy}"
        return optuna.load_study(storage=url, study_name=settings["name"])
    except (KeyError, SQLAlchemyError, sqlite3.Error, ImportError, optuna.exceptions.StorageInternalError) as error:
        where = "its database" if settings["study"] else f"{experiment.uri}/{COPY}"
        raise NothingHeld(f"the study {settings['name']!r} cannot be read from {where}: {error}") from error
