"""The plan of a search: made from the user's settings, or read from an experiment that is resumed."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from lungct_tune.cli import command_words
from lungct_tune.config.search_space import SearchSpace, parse_space, read_space
from lungct_tune.config.settings import OF_ONE_RUN, Settings, SettingsError, flags, validate
from lungct_tune.data import ImageSet, fetch_images, make_phantoms, read_images
from lungct_tune.data.cache import default_cache
from lungct_tune.data.split import DataSplit, read_split, restore_split, split_and_fold
from lungct_tune.errors import UserError, number_of
from lungct_tune.experiment.bundle import FOLDER, has_bundle
from lungct_tune.experiment.folder import SPLIT, Experiment
from lungct_tune.experiment.form import written_by_a_search
from lungct_tune.experiment.kept_settings import (
    SETTINGS,
    SPACE,
    SUMS,
    confirm_paths,
    confirm_study,
    paths_to_give,
    read_kept,
    read_kept_space,
)
from lungct_tune.experiment.lock import exclusive_lock, refuse_running
from lungct_tune.experiment.study_mirror import DATABASE, JOURNAL, DatabaseMirror, JournalMirror, remove_unbegun
from lungct_tune.filesystem import StorageError
from lungct_tune.stopping import was_asked

if TYPE_CHECKING:
    import optuna
    import torch

CHANGEABLE = OF_ONE_RUN | {
    *("trials", "hold_test", "slots", "final_workers", "cpus_per_worker", "gpus_per_worker", "storage", "study"),
    *("checkpoint_interval", "compare_baseline", "seeds"),
}
"""The settings that may change when a search is resumed. A change of any other would make it another search."""


WEIGHTS = "weights_sha256"
"""The user attribute of the study with the sha256 of the file of weights. Earlier versions kept none."""


class PlanError(UserError):
    """A search cannot start or continue. The message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """Complete settings, the experiment and the search space of one search."""

    settings: Settings
    experiment: Experiment
    space: SearchSpace
    space_text: str
    fingerprint: str | None
    """The fingerprint of the data that a resumed search started with; None for a new search."""
    given: frozenset[str] = frozenset()
    """The names of the settings that the user gave for a resumed search."""

    @property
    def is_new(self) -> bool:
        """Whether it is a new search, and none that continues or is read."""
        return self.fingerprint is None

    @property
    def study_url(self) -> str:
        """The Optuna storage's URL, or the path of the study's file."""
        return self.settings.study or str(self._study_file)

    @cached_property
    def _study_file(self) -> Path:
        folder = self.experiment.local_folder
        database = folder / DATABASE
        is_old = not self.is_new and (database.exists() or self.experiment.exists(DATABASE))
        return database if is_old else folder / JOURNAL

    @property
    def resume_command(self) -> str:
        """The command that continues this search, as it was started."""
        return self.command("--judge" if self.judges else "--resume")

    @property
    def judges(self) -> bool:
        """Whether the user asked for the test of a search with `hold_test`."""
        return "judge" in self.given

    def command(self, how: str) -> str:
        """The command that does something with this search: `--resume` or `--judge`."""
        settings = self.settings.model_dump()
        given = ["storage", "study", *paths_to_give(settings, self.experiment), "address", "track"]
        return shlex.join([*command_words("search"), how, self.experiment.name, *flags(settings, given)])

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Adds the command that continues the search to what stops it, if it has started and not ended.

        Raises:
            KeyboardInterrupt: also for any error that follows when the user stops the search. A scheduler may send its
                signal to all processes, and then Ray's are gone.
        """
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, (KeyboardInterrupt, UserError)) or was_asked()):
                raise
            stop = error if isinstance(error, UserError) else KeyboardInterrupt()
            with suppress(StorageError):
                if self.experiment.exists(SETTINGS) and not has_bundle(self.experiment):
                    stop.add_note(f"To continue: {self.resume_command}{self._unsaved()}")
            raise stop from None

    def _unsaved(self) -> str:
        """The options with which the user has changed the search, as far as settings.yaml does not have them yet."""
        names = self.given & (CHANGEABLE - OF_ONE_RUN - {"storage", "study"})
        kept, values = (read_kept(self.experiment) or {}) if names else {}, self.settings.model_dump(mode="json")
        words = flags(values, sorted(name for name in names if kept.get(name) != values[name]))
        return "".join(f" {shlex.quote(word)}" for word in words)

    @contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Locks the search for this process, see `exclusive_lock`.

        Raises:
            PlanError: another process has started or ended the search since this plan was made.
            StorageError: another process runs it, or its folder cannot be created.
        """
        with exclusive_lock(self.experiment, say):
            _check_may_run(self.experiment, is_new=self.is_new)
            yield

    @contextmanager
    def opened_study(self) -> Iterator[optuna.Study]:
        """Creates or opens the study for writing. With remote storage it also keeps a copy there, see `StudyMirror`.

        Raises:
            StudyError, JournalError: the study cannot be opened.
            StorageError: on entering, the storage cannot be read.
        """
        from lungct_tune.experiment.study import name_taken, open_study, sqlite_storage, told_as_user_errors
        from lungct_tune.experiment.study_journal import opened_journal

        assert self.settings.epochs is not None  # decided by the plan
        how = self.experiment.name, self.space, self.settings.epochs
        if self.settings.study:
            with told_as_user_errors(self.settings.study):
                yield open_study(self.settings.study, *how, new=self.is_new)
            return
        file = self._study_file
        is_journal = file.name == JOURNAL
        if self.is_new and (left := remove_unbegun(self.experiment, file)):  # before it is copied to the storage
            raise name_taken(f"{self.experiment.name!r} in {' and '.join(left)}")
        with ExitStack() as held, told_as_user_errors(str(file)):
            if not self.experiment.is_local:
                held.enter_context((JournalMirror if is_journal else DatabaseMirror)(self.experiment, file))
            storage = held.enter_context(opened_journal(file)) if is_journal else sqlite_storage(file)
            yield open_study(storage, *how, new=self.is_new, file=file)

    def load_and_split(self) -> DataSplit:
        """Finds, decodes (once), groups and splits the images.

        Raises:
            DataError: the images cannot be used.
            PlanError: they are not the images that the search started with.
        """
        settings = self.settings
        assert settings.image_size is not None  # decided by for_data()
        root = settings.data or make_phantoms(default_cache(), settings.seed)
        images = read_images(
            fetch_images(root),
            settings.image_size,
            class_map=settings.class_map,
            check_map=self.is_new,
            skip_unreadable=settings.skip_unreadable,
            table=settings.table,
            window=settings.ct_window,
        )
        if self.fingerprint not in (None, images.fingerprint):
            raise PlanError(
                f"the images in {images.root} are not those that {self.experiment.name} started with; "
                "restore them, or start a new search"
            )
        if not self.is_new:
            with written_by_a_search(f"{self.experiment.uri}/{SPLIT}"):
                kept = restore_split(images, self.experiment.read(SPLIT) or b"", groups=settings.split_file is not None)
            if settings.split_file and "split_file" in self.given:
                self._check_split(kept, images, settings.split_file)
            return kept
        return split_and_fold(images, settings.split, settings.folds, settings.split_seed, settings.split_file)

    def _check_split(self, kept: DataSplit, images: ImageSet, file: Path) -> None:
        """Checks that a split file that is given again has the split that the search started with."""
        given, split = read_split(images, file)
        differs = (split != kept.split) | (given.table["group"] != kept.images.table["group"]).to_numpy()
        if differs.any():
            what = f"{number_of(int(differs.sum()), 'image')} in another part or group"
            raise PlanError(
                f"{file} is not the split that {self.experiment.name} started with: {what}, such as "
                f"{images.table['path'][differs].iloc[0]}. The search keeps its split, in "
                f"{self.experiment.uri}/{SPLIT}: restore the file, leave --split-file out, or start a new search"
            )

    def read_weights(self) -> dict[str, torch.Tensor] | None:
        """Reads the pretrained weights, down to the deepest truncation of the search space; None for random weights.

        Raises:
            WeightsError: they are not available, or do not reach that depth.
        """
        if self.settings.weights == "none":
            return None
        from lungct_tune.models.pretrained import read_covering  # imports torch

        return read_covering(self.settings.weights or "", self.space.deepest)

    def check_weights(self, study: optuna.Study) -> None:
        """Checks that a file of weights is the one that the search started with. The study keeps its sha256.

        Raises:
            PlanError: it is another one.
        """
        source = self.settings.weights or "none"
        if source in ("imagenet", "none"):
            return
        with Path(source).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if study.user_attrs.get(WEIGHTS, digest) != digest:
            raise PlanError(
                f"the weights in {source} are not those that {self.experiment.name} started with; restore them, or "
                "start a new search"
            )
        study.set_user_attr(WEIGHTS, digest)

    def save(self, split: DataSplit) -> None:
        """Writes the files that `--resume` reads. `settings.yaml` is last: it marks the search as started.

        Those that are the same already are left alone: a machine that is lost may damage what it has just written.
        """
        files = {SPACE: self.space_text.encode(), SPLIT: split.as_csv()}
        sums = {SUMS: {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}}
        last = {"fingerprint": split.images.fingerprint}  # whose lack says that the file was cut
        kept = self.settings.as_yaml() + yaml.safe_dump(sums) + yaml.safe_dump(last)
        for path, content in {**files, SETTINGS: kept.encode()}.items():
            if self.experiment.read(path) != content:
                self.experiment.write(path, content)


def plan_search(asked: Settings, given: set[str]) -> Plan:
    """The plan of a new search, or with `resume` of one that continues, or with `judge` of one that ends.

    Args:
        asked: the user's settings; with `resume`, only the settings to change.
        given: the names of the fields that the user set.

    Raises:
        PlanError: the name is taken, or there is no search of that name to resume.
        SettingsError: a setting cannot change in a resumed search.
        SpaceError: the search space cannot be used.
        StorageError: another process runs it.
        StudyError: the database of `study` cannot be used.
    """
    if asked.judge:
        asked = asked.model_copy(update={"resume": asked.judge, "judge": None, "hold_test": False})
        given = given | {"resume", "hold_test"}
    plan = _resumed(asked, given) if asked.resume else _new(asked)
    if not asked.plan:
        check_place(plan.experiment)
        refuse_running(plan.experiment)
        if plan.settings.study:
            from lungct_tune.experiment.study import check_study  # a plan needs no database

            check_study(plan.settings.study, plan.experiment.name, new=plan.is_new)
    return plan


def _new(asked: Settings) -> Plan:
    settings = asked.for_data().with_absolute_paths()
    of = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(settings.data or "phantoms").name)
    name = settings.name or f"{datetime.now():%Y-%m-%d-%H%M%S}-{of}"
    experiment = Experiment.at(settings.storage, name)
    check_place(experiment)
    _check_may_run(experiment, is_new=True)
    assert settings.space is not None  # decided by for_data()
    text = read_space(settings.space)
    space = parse_space(text, str(settings.space))
    return Plan(settings.model_copy(update={"name": name}), experiment, space, text, fingerprint=None)


def _resumed(asked: Settings, given: set[str]) -> Plan:
    assert asked.resume is not None
    experiment, asked = Experiment.at(asked.storage, asked.resume), asked.with_absolute_paths()
    # images may have moved: the fingerprint says whether they are those of the search
    plan = read_plan(experiment, given, **{field: getattr(asked, field) for field in given & {"data", "table"}})
    begun = plan.settings
    if "space" in given and asked.space and parse_space(read_space(asked.space), str(asked.space)) != plan.space:
        raise SettingsError(
            f"a resumed search cannot change space; it began with {experiment.uri}/space.yaml, and {asked.space} is "
            "another one"
        )
    # a copy of the space, of a file of weights (see `check_weights`) or of a split, may be anywhere
    moved: set[str] = set() if {asked.weights, begun.weights} & {None, "imagenet", "none"} else {"weights"}
    moved |= {"split_file"} if asked.split_file and begun.split_file else set()
    fixed = given - CHANGEABLE - moved - {"space"}
    if other := sorted(field for field in fixed if getattr(asked, field) != getattr(begun, field)):
        was = ", ".join(f"{field} = {getattr(begun, field)}" for field in other)
        raise SettingsError(f"a resumed search cannot change {', '.join(other)}; it began with {was}")
    _check_may_run(experiment, is_new=False)
    changed = {field: getattr(asked, field) for field in given & (CHANGEABLE | moved)}
    settings = validate(begun.model_dump() | {"storage": asked.storage} | changed)
    return replace(plan, settings=settings, given=frozenset(given))


def check_place(experiment: Experiment) -> None:
    """Checks without writing anything that a folder on this machine can be made, or if it is there, be written to.

    Raises:
        StorageError: it cannot.
    """
    if experiment.is_local:
        place = Path(experiment.uri)
        found = next(path for path in (place, *place.parents) if os.path.exists(path))
        if not found.is_dir():
            raise StorageError(f"{experiment.uri} cannot be made: {found} is a file; choose another --storage")
        if os.access(found, os.W_OK | os.X_OK):
            return
        if found == place:
            raise StorageError(f"{place} may not be written; make it writable, or use a copy (pull --all makes one)")
        raise StorageError(f"{experiment.uri} cannot be made: {found} may not be written; choose another --storage")


def _check_may_run(experiment: Experiment, *, is_new: bool) -> None:
    if is_new and experiment.exists(SETTINGS):
        raise PlanError(
            f"{experiment.uri} already holds a search; choose another --name, or continue it: --resume "
            f"{experiment.name}"
        )
    if not is_new and has_bundle(experiment):
        raise PlanError(
            f"{experiment.name} is finished; its model is in {experiment.uri}/{FOLDER}. Its test split has been "
            "used, so more trials would be chosen with knowledge of it: start a new search for them"
        )
    if experiment.is_local and experiment.files(FOLDER):  # without this, the search could not write its own at its end
        raise PlanError(
            f"{experiment.uri}/{FOLDER} is there, and is no complete bundle of this search; move it away, then run the "
            "command again"
        )
    if not experiment.is_local and (experiment.local_folder / SETTINGS).exists():
        raise PlanError(
            f"{experiment.local_folder} has another search of this name, whose study would be replaced; run the "
            "command in another folder"
        )


def read_plan(experiment: Experiment, given: Collection[str], **elsewhere: Any) -> Plan:
    """Reads the plan of an existing search. Its settings do not have the study's URL, which only the user may give.

    Args:
        given: the names of the settings that the user gave.
        elsewhere: settings that differ on this machine, for example the path of the data.

    Raises:
        PlanError: there is no such search.
        SettingsError: its settings cannot be used here, or the user has to give some of them again.
    """
    kept = read_kept(experiment)
    if kept is None:
        raise PlanError(no_such_search(experiment))
    confirm_study(kept, experiment, given)
    confirm_paths(kept, experiment, given)
    fingerprint = kept.pop("fingerprint")
    text, space = read_kept_space(experiment)
    return Plan(validate(kept | {"study": None} | elsewhere), experiment, space, text, fingerprint)


def no_such_search(experiment: Experiment) -> str:
    """The message for an experiment that does not exist."""
    storage, _, name = experiment.uri.rpartition("/")
    return (
        f"there is no search {name!r} in {storage}{experiment.similar()}; check its name, and give the --storage that "
        "it was started with"
    )
