"""What a search is to do: decided anew, or read back from the experiment that it goes on with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import yaml
from sqlalchemy.engine import make_url

from lungct_tune.bundle import FOLDER, has_bundle
from lungct_tune.data import ImageSet
from lungct_tune.experiment import Experiment
from lungct_tune.settings import Settings, SettingsError, validate
from lungct_tune.space import SearchSpace, parse_space, read_space

CHANGEABLE = {
    *("trials", "slots", "final_workers", "cpus_per_worker", "gpus_per_worker", "storage", "study"),
    *("resume", "address", "plan", "verbose"),
}
"""What a resumed search may be told anew; all else would make it another search."""


class PlanError(ValueError):
    """A search that cannot begin or go on: the message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """Settings with nothing left open, where the experiment lies, what may vary."""

    settings: Settings
    experiment: Experiment
    space: SearchSpace
    space_text: str
    fingerprint: str | None
    """Of the data that a resumed search began with."""

    @property
    def study_folder(self) -> Path:
        """Where a SQLite study lies: in the experiment's folder, else, for remote storage, on this machine."""
        local = self.experiment.is_local
        return Path(self.experiment.uri) if local else Path("results", self.experiment.name).resolve()

    def study_storage(self, hide_password: bool = False) -> str:
        """The Optuna storage's URL."""
        if self.settings.study:
            return make_url(self.settings.study).render_as_string(hide_password=hide_password)
        return f"sqlite:///{self.study_folder / 'study.db'}"

    @property
    def resume_command(self) -> str:
        storage = "" if self.settings.storage == "./results" else f" --storage {self.settings.storage}"
        return f"python -m lungct_tune.search --resume {self.experiment.name}{storage}"

    def check_data(self, images: ImageSet) -> None:
        """Refuses to go on with other images than the search began with.

        Raises:
            PlanError: they differ.
        """
        if self.fingerprint not in (None, images.fingerprint):
            raise PlanError(
                f"the images in {images.root} are not those that {self.experiment.name} began with; "
                "put them back as they were, or begin a new search"
            )

    def keep(self, images: ImageSet, split: np.ndarray) -> None:
        """Writes what `--resume` begins from. `settings.yaml` comes last: with it, the search exists."""
        table = images.table.assign(split=split, label=[images.classes[label] for label in images.table["label"]])
        self.experiment.write("split.csv", table[["path", "label", "group", "split"]].to_csv(index=False).encode())
        self.experiment.write("space.yaml", self.space_text.encode())
        kept = self.settings.as_yaml() + yaml.safe_dump({"fingerprint": images.fingerprint})
        self.experiment.write("settings.yaml", kept.encode())


def plan_search(asked: Settings, given: set[str]) -> Plan:
    """The plan of the search that the settings ask for.

    Args:
        asked: what the user chose; with `resume`, only what the user wants to change.
        given: the names of the fields that the user chose.

    Raises:
        PlanError: the name is taken, or there is nothing of that name to go on with.
        SettingsError: a resumed search was told to be another one.
        SpaceError: the search space cannot be used.
    """
    return _resumed(asked, given) if asked.resume else _new(asked)


def _new(asked: Settings) -> Plan:
    settings = asked.for_data()
    kind = "phantoms" if settings.data is None else settings.data.resolve().name
    name = settings.name or f"{datetime.now():%Y-%m-%d-%H%M%S}-{kind}"
    experiment = Experiment.at(settings.storage, name)
    if experiment.exists("settings.yaml"):
        raise PlanError(
            f"{experiment.uri} holds a search already; choose another --name, or go on with it: --resume {name}"
        )
    settings = settings.model_copy(update={"name": name, "data": settings.data and settings.data.resolve()})
    text = read_space(settings.space)
    return Plan(settings, experiment, parse_space(text, str(settings.space)), text, fingerprint=None)


def _resumed(asked: Settings, given: set[str]) -> Plan:
    assert asked.resume is not None
    experiment = Experiment.at(asked.storage, asked.resume)
    kept = experiment.read("settings.yaml")
    if kept is None:
        raise PlanError(
            f"there is no search {asked.resume!r} in {asked.storage}; look there for its name, "
            "and give the --storage that it was begun with"
        )
    content = yaml.safe_load(kept)
    fingerprint = content.pop("fingerprint")
    begun = validate(content)
    if other := sorted(field for field in given - CHANGEABLE if getattr(asked, field) != getattr(begun, field)):
        was = ", ".join(f"{field} = {getattr(begun, field)}" for field in other)
        raise SettingsError(f"a resumed search cannot change {', '.join(other)}; it began with {was}")
    if has_bundle(experiment):
        raise PlanError(
            f"{asked.resume} is finished, its model is in {experiment.uri}/{FOLDER}. Its test split has been "
            "judged, so more trials would be chosen knowing the answer: begin a new search for them"
        )
    text = (experiment.read("space.yaml") or b"").decode()
    space = parse_space(text, f"{experiment.uri}/space.yaml")
    settings = begun.model_copy(update={field: getattr(asked, field) for field in given & CHANGEABLE})
    return Plan(settings, experiment, space, text, fingerprint)
