"""Reads an experiment's settings.yaml, and decides which of its values are used: others may write to a storage."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import yaml

from lungct_tune.config.settings import OF_ONE_RUN, SettingsError, flags
from lungct_tune.experiment.folder import Experiment


def read_kept(experiment: Experiment) -> dict[str, Any] | None:
    """The values in settings.yaml and the data's fingerprint; None if there is no search.

    Settings of one run are left out, also if somebody has written them there: an address of a cluster or of a tracking
    server would be sent a token or a password.

    Raises:
        SettingsError: the file is not one that this program wrote.
        StorageError: the storage refuses.
    """
    kept = experiment.read("settings.yaml")
    if kept is None:
        return None
    try:
        values = yaml.safe_load(kept)
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    # without a fingerprint any images would do
    if not isinstance(values, dict) or not isinstance(values.get("fingerprint"), str):
        raise SettingsError(f"{experiment.uri}/settings.yaml is not one that a search wrote; restore it")
    return {name: value for name, value in values.items() if name not in OF_ONE_RUN}


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
    """Checks that the user named the data and weights of a search on remote storage, which others may write to.

    Raises:
        SettingsError: the user did not.
    """
    if experiment.is_local:
        return
    if missing := [name for name in paths_in(kept) if name not in given]:
        raise SettingsError(
            f"paths are not taken from a remote storage, since others may write to it; give them again. settings.yaml "
            f"in {experiment.uri} names: {' '.join(flags(kept, missing))}"
        )


def paths_in(settings: Mapping[str, Any]) -> list[str]:
    """Which of data and weights are files or a URI; phantoms, ImageNet's weights and random weights are not."""
    return [name for name in ("data", "weights") if settings.get(name) not in (None, "imagenet", "none")]
