"""How many folds a search has by default, and what they cost: a line of its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lungct_tune.config.settings import FOLDS, Settings
from lungct_tune.data import DataError
from lungct_tune.data.split import DataSplit
from lungct_tune.experiment.forecast import Forecast, as_range
from lungct_tune.experiment.plan import Plan

FEW_IMAGES = 2000
"""With fewer images in train and validation, one part of them is too small to judge trials by."""


def decide_folds(plan: Plan, split: DataSplit, has_gpus: Callable[[], bool]) -> tuple[Plan, DataSplit]:
    """The plan with the final number of folds in its settings, and the split with these folds.

    A search that is continued keeps the folds of its split.csv, whatever the cluster is now. By default there are
    `FOLDS` of them for fewer than `FEW_IMAGES` images of the user's own if there are GPUs, which train such an epoch in
    a tenth of a second, and for an ensemble. Where a class has too few groups for them, there are none.

    Args:
        has_gpus: whether workers get GPUs; is called only if it matters.

    Raises:
        DataError: a class has too few groups for the folds of an ensemble.
    """
    settings = plan.settings
    if plan.is_new and settings.folds is None:
        if settings.ensemble:
            split = split.in_folds(FOLDS, settings.split_seed)
        elif _would_help(settings, split) and has_gpus():
            split = _in_folds(split, settings.split_seed) or split
    return replace(plan, settings=settings.model_copy(update={"folds": len(split.folds)})), split


def folds_line(plan: Plan, split: DataSplit, forecast: Forecast | None) -> str:
    """What the plan says of folds, with the time that the other choice would take; "" where folds do not matter.

    Args:
        plan: with the number of folds decided.
        forecast: with these folds.
    """
    settings, pooled = plan.settings, len(split.searched_rows)
    if settings.cross_validates:
        line = f"{settings.folds}: a trial has as many models, evaluated on all {pooled} images of train and valid"
        if settings.ensemble:
            return f"{line}; those of the best trial become the ensemble"
        other = replace(split, fold=None)
        if plan.is_new:
            line += f"; --folds 1 evaluates one model on {len(other.validation_rows)}{_taking(forecast, other)}"
        return line
    if not plan.is_new or not _would_help(settings, split):
        return ""
    few = f"1: a trial is evaluated on {len(split.validation_rows)} images"
    if (folded := _in_folds(split, settings.split_seed)) is None:
        return f"{few}; a class has too few groups for {FOLDS} folds"
    return f"{few}; with --folds {FOLDS} on all {pooled}, which is more trustworthy{_taking(forecast, folded)}"


def _would_help(settings: Settings, split: DataSplit) -> bool:
    """Whether trials could be evaluated better.

    Phantoms are a demonstration, which is to be fast. Each worker of a slot needs a fold.
    """
    return settings.data is not None and len(split.searched_rows) < FEW_IMAGES and settings.workers <= FOLDS


def _in_folds(split: DataSplit, seed: int) -> DataSplit | None:
    """The split in `FOLDS` folds; None if a class has too few groups for them."""
    try:
        return split.in_folds(FOLDS, seed)
    except DataError:
        return None


def _taking(forecast: Forecast | None, split: DataSplit) -> str:
    """The time of the search with the folds of another split, as the end of a sentence."""
    if forecast is None:  # the pace could not be measured
        return f", and takes about {len(split.folds)} times as long" if split.fold is not None else ""
    train_rows, valid_rows = split.folds[0]
    work = replace(forecast.work, folds=len(split.folds), train_images=len(train_rows), valid_images=len(valid_rows))
    return f", and takes {as_range(*replace(forecast, work=work).total())}"
