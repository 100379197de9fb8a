"""Reads the results of a search from its experiment, finished or not. The report is made from them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import optuna
import pandas as pd
from pydantic import BaseModel, FiniteFloat

from lungct_tune.auditing.findings import Audit
from lungct_tune.config.search_space import SearchSpace
from lungct_tune.config.settings import validate
from lungct_tune.data.split import SPLITS
from lungct_tune.data.tables import read_table
from lungct_tune.errors import UserError, first_line, number_of
from lungct_tune.experiment.bundle import (
    AUDIT,
    CHECKSUMS,
    CONFIG,
    FEATURES,
    FOLDER,
    METRICS,
    MODEL,
    PREDICTIONS,
    BundleError,
    as_json,
    check_sums,
    find_bundle,
)
from lungct_tune.experiment.folder import SPLIT, Experiment
from lungct_tune.experiment.form import check_form, read_json, written_by_a_search
from lungct_tune.experiment.kept_settings import confirm_study, read_kept, read_kept_space
from lungct_tune.experiment.metrics import BundleMetrics, SeedComparison, TestMetrics, metrics_json, read_metrics
from lungct_tune.experiment.model_config import ModelConfig, read_config
from lungct_tune.experiment.predictions import Predictions, read_predictions
from lungct_tune.experiment.study import check_trials, count_outcomes, load_study, read_trials
from lungct_tune.experiment.study_mirror import JOURNAL, copy_study
from lungct_tune.experiment.trial import BASELINE, Outcome, TrialRecord, best_trial
from lungct_tune.training.objective import judged


class NothingHeld(UserError):
    """There is no search to read. The message says where it was looked for and what to do."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """The content of a bundle: the final model, or before the search has ended the best model so far."""

    weights: bytes
    """safetensors."""
    config: ModelConfig
    """config.json."""
    metrics: BundleMetrics
    predictions: Predictions | None
    """On the test images; None before the search has ended."""
    features: bytes | None = None
    """training_features.safetensors; None before the search has ended, where all training images are of one group, and
    where it is not read."""

    @property
    def files(self) -> dict[str, bytes]:
        """The content of the bundle's files, by name."""
        files = {MODEL: self.weights, CONFIG: as_json(self.config.model_dump()), METRICS: metrics_json(self.metrics)}
        if self.predictions is not None:
            files[PREDICTIONS] = self.predictions.as_csv()
        if self.features is not None:
            files[FEATURES] = self.features
        return files


@dataclass(frozen=True)
class SearchResults:
    """The results of a search, finished or not."""

    settings: dict[str, Any]
    """settings.yaml, as plain values: its paths may be those of another machine."""
    space: SearchSpace
    study: dict[str, Any]
    """The study's user attributes: wall_s, slot_s, cluster."""
    trials: list[TrialRecord]
    """The trials that have started, by number."""
    split: pd.DataFrame
    """split.csv: path, label, group, split of every image."""
    audit: Audit | None
    bundle: Bundle | None
    """None before a trial has completed."""

    @property
    def test(self) -> TestMetrics | None:
        """The figures of the test split; None before the search has ended."""
        return self.bundle.metrics.test if self.bundle else None

    @property
    def members(self) -> int:
        """How many networks the final model has; several are an ensemble."""
        return self.settings["folds"] or 1 if self.settings.get("ensemble") else 1

    @property
    def seeds(self) -> SeedComparison | None:
        """The winner's results with other seeds; None where it was not trained with other seeds."""
        return self.bundle.metrics.seeds if self.bundle else None

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the packages that made the bundle."""
        return self.bundle.config.versions if self.bundle else {}

    @property
    def phantoms(self) -> bool:
        return self.settings["data"] is None

    @property
    def data(self) -> str:
        """The name of the data."""
        return "phantoms" if self.phantoms else PurePath(self.settings["data"]).name

    @cached_property
    def classes(self) -> list[str]:
        return sorted(self.split["label"].unique())

    @cached_property
    def winner(self) -> TrialRecord | None:
        return best_trial(self.trials)

    @cached_property
    def baseline(self) -> TrialRecord | None:
        """The trial of the published configuration; None before its first epoch has ended."""
        return next((trial for trial in self.trials if trial.number == BASELINE and trial.last), None)

    @property
    def baseline_score(self) -> float:
        """The balanced accuracy of the published configuration's trial, which must exist."""
        assert self.baseline is not None and self.baseline.last is not None
        return self.baseline.last.balanced_accuracy

    @cached_property
    def ended(self) -> dict[str, int]:
        """The number of trials by outcome."""
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
        """How many images have their group named in groups.csv, a table or a split file, or their patient in DICOM."""
        groups = self.audit.groups if self.audit else None
        return groups.images_in_groups_csv + groups.images_with_patient_id if groups else 0

    @property
    def patients_known(self) -> bool:
        """Whether the patients of all images are known, see `ImageSet.patients_known`."""
        known = self.audit.groups.patients_known if self.audit else False
        return self.listed == len(self.split) if known is None else bool(known)  # earlier versions only count them

    @cached_property
    def counts(self) -> dict[str, list[int]]:
        """Images of each class in train, valid and test."""
        table = pd.crosstab(self.split["label"], self.split["split"]).reindex(columns=list(SPLITS), fill_value=0)
        return {str(name): [int(n) for n in row] for name, row in zip(table.index, table.to_numpy(), strict=True)}

    @property
    def judged(self) -> str:
        """How trials are evaluated, as text: "on validation" or "in 5-fold cross-validation"."""
        return judged(self.settings.get("folds"))

    @property
    def searched_on(self) -> dict[str, int]:
        """Images of each class that trials are evaluated on: validation, or with folds train and validation."""
        pooled = (self.settings.get("folds") or 1) > 1
        return {name: valid + train * pooled for name, (train, valid, _) in self.counts.items()}

    @property
    def totals(self) -> list[int]:
        """Images in train, valid and test."""
        return [sum(column) for column in zip(*self.counts.values(), strict=True)]


def read_results(experiment: Experiment, study: str | None = None) -> SearchResults:
    """Reads an experiment, finished or not.

    Args:
        study: the URL of the study's database, if it is in one.

    Raises:
        NothingHeld: there is no search, or its study cannot be read.
        SettingsError: the study is in a database, and its URL is missing or wrong.
        StorageError: the storage refuses.
    """
    kept = read_kept(experiment)
    if kept is None:
        hint = "it is a pulled bundle, which has its own report.html" if experiment.exists("checksums.txt") else ""
        raise NothingHeld(
            f"there is no search in {experiment.uri} (no settings.yaml){experiment.similar()}; "
            + (hint or "give the NAME of one and its --storage, or its folder or URI")
        )
    given = {"study": study} if study else {}
    confirm_study(kept, experiment, given)
    url = validate(given).study
    with tempfile.TemporaryDirectory() as scratch:
        bundle = read_bundle(experiment)  # before the study, so that the study has every trial that it names
        found = gather_results(experiment, _open_study(experiment, kept["name"], url, Path(scratch)), bundle)
    if found.test and bundle and found.done < bundle.metrics.search.trials:
        raise NothingHeld(
            f"the study of {experiment.uri} has {number_of(found.done, 'trial')} that ended, but {FOLDER}/ was made "
            f"after {bundle.metrics.search.trials}: {'check --study' if url else f'restore {JOURNAL}'}"
        )
    return found


def read_bundle(experiment: Experiment) -> Bundle | None:
    """Reads the bundle of an experiment, or the best so far; None before a trial has completed.

    Raises:
        BundleError: it is damaged, or its files have other forms than this program writes.
        StorageError: the storage refuses.
    """
    if (folder := find_bundle(experiment)) is None:
        return None
    names = (MODEL, CONFIG, METRICS, PREDICTIONS)
    weights, config, metrics, predictions = contents = [experiment.read(f"{folder}/{name}") for name in names]
    sums = experiment.read(f"{folder}/{CHECKSUMS}")
    if weights is None or config is None or metrics is None or sums is None:
        if folder != FOLDER:
            return None  # the search has just replaced it by a better one
        lost = [name for name in (MODEL, CONFIG, METRICS, CHECKSUMS) if not experiment.exists(f"{folder}/{name}")]
        raise BundleError(
            f"{experiment.uri}/{folder}: missing: {', '.join(lost)}. Restore what is missing, or fetch the bundle again"
        )
    check_sums(f"{experiment.uri}/{folder}", sums, dict(zip(names, contents, strict=True)))
    content = read_config(config)
    return Bundle(
        weights=weights,
        config=content,
        metrics=read_metrics(metrics),
        predictions=None if predictions is None else read_predictions(predictions, content.classes),
    )


def gather_results(experiment: Experiment, study: optuna.Study, bundle: Bundle | None) -> SearchResults:
    """Gathers the results of an experiment, whose study is open and whose bundle is already read."""
    kept = read_kept(experiment)
    assert kept is not None  # the caller has read it
    split, audit = (experiment.read(name) for name in (SPLIT, AUDIT))
    check_trials(study)
    trials = read_trials(study)
    ended = sum(trial.is_finished for trial in trials)  # more than asked for, if `--resume` got a lower --trials
    return SearchResults(
        settings=kept | {"trials": max(kept["trials"], ended)},
        space=read_kept_space(experiment)[1],
        study=check_form(study.user_attrs, _StudyAttributes, "the study").model_dump(),
        trials=trials,
        split=_read_split(split, f"{experiment.uri}/{SPLIT}"),
        audit=None if audit is None else check_form(read_json(audit, f"{experiment.uri}/{AUDIT}"), Audit, AUDIT),
        bundle=bundle,
    )


class _Planned(BaseModel):
    seconds: tuple[FiniteFloat, FiniteFloat]
    slowdown: FiniteFloat
    began: FiniteFloat


class _StudyAttributes(BaseModel, extra="allow"):
    wall_s: FiniteFloat = 0.0
    slot_s: FiniteFloat = 0.0
    cluster: str = ""
    planned: _Planned | None = None


def _read_split(csv: bytes | None, file: str) -> pd.DataFrame:
    if csv is None:
        raise BundleError(f"{file} is missing; restore it")
    with written_by_a_search(file):
        table = read_table(csv)
        if not set(table["split"]) <= set(SPLITS):
            raise ValueError(f"a split is called {min(set(table['split']) - set(SPLITS))!r}")
        return table[["path", "label", "group", "split", *table.columns.intersection(["fold"])]]


def _open_study(experiment: Experiment, name: str, url: str | None, scratch: Path) -> optuna.Study:
    """Opens the study in a database, or without a URL a copy of its file, because a search may be writing to it."""
    try:
        if url:
            return optuna.load_study(storage=url, study_name=name)
        if (copy := copy_study(experiment, scratch)) is None:
            raise NothingHeld(
                f"{experiment.uri} has no {JOURNAL}: the search has not started, or kept its study elsewhere"
            )
        return load_study(copy, name)
    except UserError:
        raise
    except Exception as error:  # Optuna and SQLAlchemy raise any kind about a damaged study
        where, remedy = ("its database", "check --study") if url else (experiment.uri, f"restore {JOURNAL}")
        reason = "it is not there" if isinstance(error, KeyError) else f"{type(error).__name__}: {first_line(error)}"
        raise NothingHeld(f"the study {name!r} cannot be read from {where}: {reason}; {remedy}") from error
