"""Reads search spaces: YAML files with the ranges that Optuna may search, and the fixed trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lungct_tune.cli import suggestion
from lungct_tune.config.addresses import shown
from lungct_tune.config.hyperparameters import PUBLISHED, Hyperparameters
from lungct_tune.config.settings import SPACES
from lungct_tune.config.yaml_file import parse_yaml
from lungct_tune.errors import UserError
from lungct_tune.files import read_text

LIMITS: dict[str, tuple[float, float]] = {
    "truncation_depth": (1, 49),
    "frozen_share": (0, 1),
    "dropout": (0, 0.95),
    "augmentation": (0, 1),
    "rotation": (0, 180),
    "zoom": (0, 0.5),
    "shift": (0, 0.5),
    "flip": (0, 1),
    "backbone_lr": (1e-8, 1),
    "head_lr": (1e-8, 1),
    "weight_decay": (0, 10),
}
"""The least and greatest allowed value of each parameter. A space may only narrow these."""


class SpaceError(UserError):
    """A search space that cannot be used: the message names file, key and reason."""


@dataclass(frozen=True)
class SearchSpace:
    """The ranges of a search. Parameters that a space does not name keep the published value."""

    distributions: dict[str, BaseDistribution]
    constants: dict[str, int | float]
    fixed_trials: tuple[Hyperparameters, ...]
    """The trials that run first: the published configuration, then those in the file. Optuna chooses the others."""

    def hyperparameters(self, parameters: Mapping[str, Any]) -> Hyperparameters:
        return Hyperparameters(**(PUBLISHED.as_dict() | self.constants | dict(parameters)))

    @property
    def depths(self) -> tuple[int, int]:
        """The smallest and the largest truncation depth that any trial can have."""
        depths = [trial.truncation_depth for trial in self.fixed_trials]
        if (drawn := self.distributions.get("truncation_depth")) is not None:
            low, high, _ = bounds(drawn)
            depths += [int(low), int(high)]
        elif "truncation_depth" in self.constants:
            depths.append(int(self.constants["truncation_depth"]))
        return min(depths), max(depths)

    @property
    def deepest(self) -> int:
        return self.depths[1]


def bounds(distribution: BaseDistribution) -> tuple[float, float, bool]:
    """The least and the greatest value of a parameter, and whether its scale is logarithmic."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            numbers = [float(str(choice)) for choice in choices]
            return min(numbers), max(numbers), False
        case IntDistribution(low=low, high=high, log=log) | FloatDistribution(low=low, high=high, log=log):
            return low, high, log
    raise TypeError(f"{distribution!r}: a search space has none of these")


def is_within(value: float, distribution: BaseDistribution) -> bool:
    """Whether a value is in a parameter's range. The value of a fixed trial may be outside."""
    low, high, _ = bounds(distribution)
    return low <= value <= high


def in_range(distribution: BaseDistribution) -> str:
    """The allowed values of a parameter, as text."""
    if isinstance(distribution, CategoricalDistribution):
        return " or ".join(map(str, distribution.choices))
    low, high, log = bounds(distribution)
    return f"{low:g} to {high:g}{', logarithmic' if log else ''}"


def read_space(path: Path) -> str:
    """The text of a space's file.

    Raises:
        SpaceError: there is no such file, or it cannot be read.
    """
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise SpaceError(f"{path}: cannot be read ({error}); {SPACES}/ has spaces to start from") from error


def parse_space(text: str, path: str) -> SearchSpace:
    """Reads a space from YAML; errors name `path` as its source.

    Each key is a field of `Hyperparameters`. Its value is one of

    - `{low: 4, high: 49}`, with `log: true` for a logarithmic scale,
    - `[a, b, c]`, a choice of values,
    - `a`, the same value in every trial.

    `fixed_trials` lists trials by the parameters in which they differ from the published configuration.

    Raises:
        SpaceError: the text is not YAML, or a key or a value is wrong.
    """
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise SpaceError(f"{path}: {error}") from error
    if not isinstance(content, dict) or not content:
        raise SpaceError(f"{path}: expected lines of `parameter: range`, found {shown(content)}")
    fixed = content.pop("fixed_trials", None) or []
    if not isinstance(fixed, list):
        raise SpaceError(f"{path}: fixed_trials: expected a list of trials, found {shown(fixed)}")
    trials = [PUBLISHED] + [_fixed_trial(f"{path}: fixed_trials[{i}]", trial) for i, trial in enumerate(fixed)]
    distributions: dict[str, BaseDistribution] = {}
    constants: dict[str, int | float] = {}
    for key, value in content.items():
        _known(path, key)
        if isinstance(value, dict):
            distributions[key] = _range(path, key, value, trials)
        elif isinstance(value, list):
            distributions[key] = _choice(path, key, value, trials)
        else:
            constants[key] = _number(path, key, value)
    if not distributions:
        raise SpaceError(f"{path}: varies no parameter; give a range for one of {', '.join(LIMITS)}")
    return SearchSpace(distributions, constants, tuple(trials))


def _choice(path: str, key: str, value: list[Any], trials: list[Hyperparameters]) -> BaseDistribution:
    choices = [_number(path, key, choice) for choice in value]
    # Optuna accepts a fixed trial with a value outside a range, but not outside a list of choices
    if missing := {getattr(trial.resolved, key) for trial in trials} - set(choices):
        raise SpaceError(
            f"{path}: {key}: the choices {choices} do not include {sorted(missing)}, which the published configuration "
            "or a fixed trial has; add it, or give a range {low: ..., high: ...}"
        )
    return CategoricalDistribution(choices)


def _range(path: str, key: str, value: dict[str, Any], trials: list[Hyperparameters]) -> BaseDistribution:
    if unknown := set(value) - {"low", "high", "log"}:
        raise SpaceError(f"{path}: {key}: {sorted(map(str, unknown))} not understood; a range has low, high, log")
    if missing := {"low", "high"} - set(value):
        raise SpaceError(f"{path}: {key}: a range needs {' and '.join(sorted(missing))}")
    low, high = (_number(path, key, value[end]) for end in ("low", "high"))
    log = value.get("log", False)
    if not isinstance(log, bool):
        raise SpaceError(f"{path}: {key}: log is {shown(log)}; it must be true or false")
    if low > high:
        raise SpaceError(f"{path}: {key}: low {low} is above high {high}")
    if log and low <= 0:
        raise SpaceError(f"{path}: {key}: a logarithmic range must begin above 0, not at {low}")
    if log and any(getattr(trial.resolved, key) <= 0 for trial in trials):
        raise SpaceError(
            f"{path}: {key}: a logarithmic range cannot include 0, which the published configuration or a fixed "
            "trial has; leave out `log`, or change the fixed trial"
        )
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def _number(where: str, key: str, value: Any) -> int | float:
    low, high = LIMITS[key]
    integer = isinstance(getattr(PUBLISHED, key), int)
    # YAML 1.1 reads 1e-5 as text, but the user means a number
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not low <= number <= high or (integer and number != int(number)):
        kind = "a whole number" if integer else "a number"
        raise SpaceError(f"{where}: {key}: {shown(value)} is not allowed; it must be {kind} from {low:g} to {high:g}")
    return int(number) if integer else number


def _fixed_trial(where: str, trial: Any) -> Hyperparameters:
    if not isinstance(trial, dict):
        raise SpaceError(f"{where}: expected parameters and values, found {shown(trial)}")
    for key in trial:
        _known(where, key)
    values = {key: _number(where, key, value) for key, value in trial.items()}
    return Hyperparameters(**(PUBLISHED.as_dict() | values))


def _known(where: str, key: Any) -> None:
    if key not in LIMITS:
        meant = suggestion(str(key), LIMITS)
        raise SpaceError(f"{where}: {key}: no such parameter{meant}; the parameters are {', '.join(LIMITS)}")
