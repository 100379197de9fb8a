"""Reads an experiment's settings.yaml, and decides which of its values are used: others may write to a storage."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from lungct_tune.config.search_space import SearchSpace, SpaceError, parse_space
from lungct_tune.config.settings import OF_ONE_RUN, SettingsError, flags, validate
from lungct_tune.config.yaml_file import parse_yaml
from lungct_tune.experiment.folder import SPLIT, Experiment

SETTINGS, SPACE = "settings.yaml", "space.yaml"

SUMS = "sha256"
"""The key in settings.yaml with the sha256 of space.yaml and of split.csv: of those that were cut at the end of a line,
the rest can be read. Earlier versions wrote none."""


def read_kept(experiment: Experiment) -> dict[str, Any] | None:
    """The values in settings.yaml and the data's fingerprint; None if there is no search.

    Settings of one run are left out, also if somebody has written them there: an address of a cluster or of a tracking
    server would be sent a token or a password.

    Raises:
        SettingsError: the file is not one that this program wrote, or space.yaml or split.csv is missing or altered.
        StorageError: the storage refuses.
    """
    kept = experiment.read(SETTINGS)
    if kept is None:
        return None
    file = f"{experiment.uri}/{SETTINGS}"
    try:
        values = parse_yaml(kept)
    except ValueError as error:
        raise SettingsError(f"{file} is not one that a search wrote: {error}; restore it") from error
    # without a fingerprint any images would do
    needed = ("name", "trials", "epochs", "image_size", "batch_size", "fingerprint")
    if not isinstance(values, dict) or (missing := [name for name in needed if values.get(name) is None]):
        what = f"{missing[0]} is missing" if isinstance(values, dict) else "it has no settings"
        raise SettingsError(f"{file} is not one that a search wrote: {what}; restore it")
    _check_sums(experiment, values.pop(SUMS, None))
    used = {name: value for name, value in values.items() if name not in OF_ONE_RUN}
    if wrong := [name for name in ("fingerprint", "data") if not isinstance(used.get(name, ""), str | None)]:
        raise SettingsError(f"{file} is not one that a search wrote: {wrong[0]} is no text; restore it")
    try:  # the images may be elsewhere now, and a study's URL is never used
        checked = validate(
            {name: value for name, value in used.items() if name not in ("fingerprint", "data", "study")}
        )
    except SettingsError as error:
        raise SettingsError(f"{file} is not one that a search wrote: {error}") from error
    defaults = checked.model_dump(mode="json", exclude={*OF_ONE_RUN, "data", "study"})
    return {"data": None, "study": None} | defaults | used


def _check_sums(experiment: Experiment, sums: Any) -> None:
    for name in (SPACE, SPLIT) if sums else ():
        if (content := experiment.read(name)) is None:
            raise SettingsError(f"{experiment.uri}/{name} is missing; restore it")
        if not isinstance(sums, dict) or hashlib.sha256(content).hexdigest() != sums.get(name):
            raise SettingsError(
                f"{experiment.uri}/{name} is not the file that the search wrote: its sha256 is not the one in "
                f"{SETTINGS}; restore it"
            )


def read_kept_space(experiment: Experiment) -> tuple[str, SearchSpace]:
    """The text of a search's space.yaml, and the space.

    Raises:
        SettingsError: the file is missing, or not one that this program wrote.
        StorageError: the storage refuses.
    """
    file, kept = f"{experiment.uri}/{SPACE}", experiment.read(SPACE)
    if kept is None:
        raise SettingsError(f"{file} is missing; restore it")
    text = kept.decode(errors="replace")
    try:
        return text, parse_space(text, file)
    except SpaceError as error:
        raise SettingsError(f"{error}; restore it, since the search wrote another one") from error


def confirm_study(kept: Mapping[str, Any], experiment: Experiment, given: Collection[str]) -> None:
    """Checks that the user named the database of the study, if it is in one.

    The database's driver sends the user's password to the host of the URL, so that a URL is never taken from a storage,
    not even from a folder: `pull --all` may have brought it there.

    Args:
        given: the names of the settings that the user gave.

    Raises:
        SettingsError: the user did not.
    """
    if kept.get("study") and "study" not in given:
        raise SettingsError(
            f"the study of {experiment.name} is in a database; give its URL again: --study URL. "
            f"settings.yaml in {experiment.uri} names {kept['study']}; your password will be sent there, so give it "
            "only if you know that host"
        )


def confirm_paths(kept: Mapping[str, Any], experiment: Experiment, given: Collection[str]) -> None:
    """Checks that the user named the data, table and weights of a search, if others may have written its settings.

    Others may write to a remote storage. A folder may have been pulled from one, so that a URI in its settings is not
    called either: a request would tell who reads it, and may carry credentials.

    Raises:
        SettingsError: the user did not.
    """
    if missing := [name for name in paths_to_give(kept, experiment) if name not in given]:
        raise SettingsError(
            "addresses, and paths on a remote storage, are not taken from an experiment, since others may write to it; "
            f"give them again. {SETTINGS} in {experiment.uri} names: {' '.join(flags(kept, missing))}"
        )


def paths_to_give(settings: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """Which of data, table and weights the user has to give again, see `confirm_paths`.

    Phantoms, ImageNet's weights and random weights are neither files nor URIs.
    """
    paths = [name for name in ("data", "table", "weights") if settings.get(name) not in (None, "imagenet", "none")]
    return [name for name in paths if not experiment.is_local or "://" in str(settings[name])]
