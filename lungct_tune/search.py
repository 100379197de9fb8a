"""The main job: images in, a search, the best configuration retrained, judged once, one bundle out.

python -m lungct_tune.search --help
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import make_url

from lungct_tune import __version__
from lungct_tune.bundle import FOLDER, as_json, has_bundle, write_bundle
from lungct_tune.data import (
    SPLITS,
    DataError,
    ImageSet,
    make_phantoms,
    read_images,
    split_images,
    twins_across,
)
from lungct_tune.data.cache import default_cache
from lungct_tune.evaluation import OBJECTIVE, judge
from lungct_tune.experiment import Experiment, StorageError
from lungct_tune.settings import Settings, SettingsError, read_settings, validate
from lungct_tune.space import SearchSpace, SpaceError, parse_space, read_space

PHANTOMS = "These are PHANTOMS, drawn by a program. They are not patients; no figure below says anything about CT."

CHANGEABLE = {"trials", "slots", "final_workers", "cpus_per_worker", "gpus_per_worker", "storage", "study"}
CHANGEABLE |= {"resume", "address", "plan", "verbose", "settings"}
"""What a resumed search may be told anew; all else would make it another search."""


class SearchError(RuntimeError):
    """The search cannot go on: the message says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    from lungct_tune.tuning.cluster import ClusterError
    from lungct_tune.weights import WeightsError

    console = Console(highlight=False)
    known = (SettingsError, SpaceError, DataError, WeightsError, StorageError, ClusterError, SearchError)
    try:
        search(*read_settings(argv), console)
    except known as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nstopped. {stop}", file=sys.stderr)
        return 130
    return 0


def search(settings: Settings, given: set[str], console: Console) -> None:
    """The whole journey.

    Args:
        settings: what the user chose; with `resume`, only what the user wants to change.
        given: the names of the fields that the user chose.

    Raises:
        Each room's own error (see `main`), with a message for the user.
        KeyboardInterrupt: Ctrl-C, with a message that says how to go on.
    """
    # ---- what is asked for ----------------------------------------------------------------------------
    settings, experiment, space, fingerprint = _resumed(settings, given) if settings.resume else _new(settings)

    # ---- images: found, decoded once, grouped, split --------------------------------------------------
    if settings.data is None:
        console.print(PHANTOMS, style="bold yellow")
    root = settings.data or make_phantoms(default_cache(), settings.seed)
    images = read_images(
        root, settings.image_size or 0, class_map=settings.class_map, skip_unreadable=settings.skip_unreadable
    )
    if fingerprint not in (None, images.fingerprint):
        raise SearchError(
            f"the images in {root} are not those that {experiment.name} began with; "
            "put them back as they were, or begin a new search"
        )
    split = split_images(images, settings.split, settings.seed)
    _print_data(images, split, console)

    # ---- pretrained weights, before any worker starts -------------------------------------------------
    backbone = _backbone(settings, space)

    # ---- the cluster, and what of it the search takes -------------------------------------------------
    import ray

    from lungct_tune.tuning.cluster import allot, check_storage, connect

    started_here = not ray.is_initialized()
    dashboard = connect(settings.address, settings.verbose)
    try:
        allotment = allot(settings)
        console.print(f"\n[bold]{experiment.name}[/]: {settings.trials} trials of at most {settings.epochs} epochs")
        console.print(f"  cluster    {allotment}")
        console.print(f"  dashboard  {dashboard or 'none'} (its token: ray get-auth-token)")
        console.print(f"  experiment {experiment.uri}", soft_wrap=True)
        console.print(f"  study      {_study_storage(settings, experiment, hide_password=True)}", soft_wrap=True)
        if settings.plan:
            _print_space(space, console)
            return
        check_storage(experiment)
        if not settings.resume:
            _keep_plan(experiment, settings, images, split)
        _search_retrain_judge(settings, experiment, space, images, split, backbone, allotment, console)
    except KeyboardInterrupt:
        where = "" if settings.storage == "./results" else f" --storage {settings.storage}"
        raise KeyboardInterrupt(f"To go on: python -m lungct_tune.search --resume {experiment.name}{where}") from None
    finally:
        if started_here:
            ray.shutdown()


def _search_retrain_judge(
    settings: Settings,
    experiment: Experiment,
    space: SearchSpace,
    images: ImageSet,
    split: np.ndarray,
    backbone: Any,
    allotment: Any,
    console: Console,
) -> None:
    import ray

    from lungct_tune.tuning import study as studies
    from lungct_tune.tuning.cluster import share
    from lungct_tune.tuning.final import FinalPlan, retrain_and_judge
    from lungct_tune.tuning.material import Material
    from lungct_tune.tuning.run import run_search
    from lungct_tune.tuning.slots import SlotPlan

    assert settings.trials and settings.epochs and settings.batch_size  # for_data filled them
    labels_N = images.table["label"].to_numpy()
    backbone_ref = None if backbone is None else ray.put(backbone)
    folder = Path(experiment.uri) if experiment.is_local else default_cache()

    def material(rows: np.ndarray, file: str) -> Material:
        return Material(
            images=share(images.images_NHW, rows, folder / file),
            labels_N=labels_N[rows],
            classes=len(images.classes),
            backbone=backbone_ref,
            normalisation=settings.normalisation,
            batch_size=settings.batch_size or 0,
            epochs=settings.epochs or 0,
        )

    # ---- the search: its workers are given train and validation, and no test image ---------------------
    searched = np.flatnonzero(split != "test")
    plan = SlotPlan(
        experiment=experiment,
        material=material(searched, "search-images.npy"),
        train_indices=np.flatnonzero(split[searched] == "train"),
        valid_indices=np.flatnonzero(split[searched] == "valid"),
        workers=allotment.workers,
        resources_per_worker=allotment.resources_per_worker,
    )
    _study_folder(experiment).mkdir(parents=True, exist_ok=True)
    study = studies.open_study(_study_storage(settings, experiment), experiment.name, space, settings.epochs)
    console.print(f"\nsearching, {allotment.slots} trials at a time", style="bold")
    run_search(study, space, plan, trials=settings.trials, slots=allotment.slots, seed=settings.seed, console=console)
    trials = studies.finished_trials(study)
    best = studies.best_trial(trials)
    if best is None:
        reasons = "\n".join(f"  trial {trial.number}: {trial.user_attrs.get('ended')}" for trial in trials)
        raise SearchError(f"no trial ran to its end, so there is nothing to retrain:\n{reasons}")

    # ---- retrained on train and validation, judged once on test ---------------------------------------
    configuration, figures = studies.configuration_of(best), studies.best_figures(best) or {}
    epochs = int(figures["epoch"])
    console.print(f"\nretraining trial {best.number} on train and validation, {epochs} epochs", style="bold")
    del plan
    test = np.flatnonzero(split == "test")
    judged = retrain_and_judge(
        FinalPlan(
            experiment=experiment,
            material=material(np.arange(len(split)), "all-images.npy"),
            configuration=configuration,
            seed=settings.seed,
            epochs=epochs,
            train_indices=searched,
            test_indices=test,
            workers=allotment.final_workers,
            resources_per_worker=allotment.resources_per_worker,
        ),
        name=f"trial_{best.number:04d}_{epochs:03d}_epochs",
    )

    # ---- the bundle -----------------------------------------------------------------------------------
    table = studies.trials_table(study)
    metrics = {
        "data": "phantoms: no patients, and nothing learnt about CT" if settings.data is None else "real images",
        "test": judge(
            labels_N[test],
            judged.probabilities_NC,
            images.classes,
            majority=int(np.bincount(labels_N[searched]).argmax()),
        ),
        "baseline_trial": _trial_figures(table, studies.BASELINE),
        "best_trial": _trial_figures(table, best.number),
        "search": _effort(table, study.user_attrs["wall_s"], allotment.slots),
    }
    write_bundle(
        experiment,
        {
            "model.safetensors": judged.weights,
            "config.json": as_json(_config(settings, images, configuration, epochs)),
            "metrics.json": as_json(metrics),
            "predictions.csv": _predictions(images, test, judged.probabilities_NC),
            "trials.csv": table.to_csv(index=False).encode(),
        },
    )
    _print_outcome(experiment, metrics, settings, console)


# ---- the plan of a search, new or resumed --------------------------------------------------------------


def _new(settings: Settings) -> tuple[Settings, Experiment, SearchSpace, None]:
    settings = settings.for_data()
    kind = "phantoms" if settings.data is None else settings.data.resolve().name
    name = settings.name or f"{datetime.now():%Y-%m-%d-%H%M%S}-{kind}"
    experiment = Experiment.at(settings.storage, name)
    if experiment.exists("settings.yaml"):
        raise SearchError(
            f"{experiment.uri} holds a search already; choose another --name, or go on with it: --resume {name}"
        )
    space = parse_space(read_space(settings.space), str(settings.space))
    data = settings.data and settings.data.resolve()
    return settings.model_copy(update={"name": name, "data": data}), experiment, space, None


def _resumed(asked: Settings, given: set[str]) -> tuple[Settings, Experiment, SearchSpace, str]:
    assert asked.resume is not None
    experiment = Experiment.at(asked.storage, asked.resume)
    kept = experiment.read("settings.yaml")
    if kept is None:
        raise SearchError(
            f"there is no search {asked.resume!r} in {asked.storage}; look there for its name, "
            "and give the --storage that it was begun with"
        )
    content = yaml.safe_load(kept)
    fingerprint = content.pop("fingerprint")
    changed = {field: getattr(asked, field) for field in given & CHANGEABLE - {"settings"}}
    begun = validate(content)
    if other := sorted(f for f in given - CHANGEABLE if getattr(asked, f) != getattr(begun, f)):
        was = ", ".join(f"{field} = {getattr(begun, field)}" for field in other)
        raise SettingsError(f"a resumed search cannot change {', '.join(other)}; it began with {was}")
    settings = begun.model_copy(update=changed)
    if has_bundle(experiment):
        raise SearchError(
            f"{asked.resume} is finished, its model is in {experiment.uri}/{FOLDER}. Its test split has been "
            "judged, so more trials would be chosen knowing the answer: begin a new search for them"
        )
    space = parse_space((experiment.read("space.yaml") or b"").decode(), f"{experiment.uri}/space.yaml")
    return settings, experiment, space, fingerprint


def _keep_plan(experiment: Experiment, settings: Settings, images: ImageSet, split: np.ndarray) -> None:
    """What a resumed search begins from. `settings.yaml` comes last: with it, the search exists."""
    table = images.table.assign(split=split, label=[images.classes[label] for label in images.table["label"]])
    experiment.write("split.csv", table[["path", "label", "group", "split"]].to_csv(index=False).encode())
    experiment.write("space.yaml", read_space(settings.space).encode())
    kept = settings.as_yaml() + yaml.safe_dump({"fingerprint": images.fingerprint})
    experiment.write("settings.yaml", kept.encode())


def _study_storage(settings: Settings, experiment: Experiment, hide_password: bool = False) -> str:
    """The Optuna storage: the user's, else SQLite in the experiment's folder, else on this machine."""
    if settings.study:
        return make_url(settings.study).render_as_string(hide_password=hide_password)
    return f"sqlite:///{_study_folder(experiment) / 'study.db'}"


def _study_folder(experiment: Experiment) -> Path:
    return Path(experiment.uri) if experiment.is_local else Path("results", experiment.name).resolve()


def _backbone(settings: Settings, space: SearchSpace) -> Any:
    """The pretrained tensors, known to reach as deep as the space does; None for a random start."""
    from lungct_tune.weights import WeightsError, covered_depth, read_weights

    if settings.weights in (None, "none"):
        return None
    state = read_weights(settings.weights)
    if (covered := covered_depth(state)) < space.deepest:
        raise WeightsError(
            f"weights {settings.weights} cover truncation depths up to {covered}, and the search space "
            f"{settings.space} goes to {space.deepest}. Narrow truncation_depth there (fixed_trials too; "
            "search_spaces/shallow.yaml ends at 22), give weights of the whole network, or --weights none"
        )
    return state


# ---- what the bundle says ------------------------------------------------------------------------------


def _config(settings: Settings, images: ImageSet, configuration: Any, epochs: int) -> dict[str, Any]:
    from lungct_tune.model import HEAD_WIDTHS
    from lungct_tune.training import NORMALISATIONS

    mean, deviation = NORMALISATIONS[settings.normalisation]
    packages = ("torch", "torchvision", "ray", "optuna", "numpy", "scikit-learn", "pillow")
    return {
        "model": {
            "architecture": "ResNet50 cut after its k-th ReLU, pooling, batch norm, three dense layers",
            "truncation_depth": configuration.truncation_depth,
            "dropout": configuration.dropout,
            "head_widths": list(HEAD_WIDTHS),
        },
        "classes": list(images.classes),
        "preprocessing": {
            "image_size": settings.image_size,
            "mode": "8-bit grey, as three equal channels scaled to 0..1",
            "mean": list(mean),
            "deviation": list(deviation),
        },
        "training": {"configuration": configuration.as_dict(), "epochs": epochs, "seed": settings.seed},
        "settings": yaml.safe_load(settings.as_yaml()),
        "data_fingerprint": images.fingerprint,
        "versions": {"lungct_tune": __version__} | {package: version(package) for package in packages},
    }


def _predictions(images: ImageSet, test: np.ndarray, probabilities_NC: np.ndarray) -> bytes:
    """One row a test image: path, class, predicted class, a probability for each class, group."""
    rows = images.table.iloc[test]
    table = pd.DataFrame(
        {
            "path": rows["path"].to_numpy(),
            "class": [images.classes[label] for label in rows["label"]],
            "predicted": [images.classes[label] for label in probabilities_NC.argmax(axis=1)],
        }
    )
    for c, name in enumerate(images.classes):
        table[f"p_{name.replace(' ', '_')}"] = probabilities_NC[:, c]
    table["group"] = rows["group"].to_numpy()
    return table.to_csv(index=False).encode()


def _trial_figures(table: pd.DataFrame, number: int) -> dict[str, Any] | None:
    """One trial's row for metrics.json; None for a trial that did not come to an epoch's end."""
    rows = table[table["trial"] == number].dropna(subset=[f"best_{OBJECTIVE}"])
    return None if rows.empty else json.loads(rows.iloc[0].to_json())


def _effort(table: pd.DataFrame, wall_s: float, slots: int) -> dict[str, Any]:
    """What the search cost. `overhead_ratio` is 1 where slots did nothing but train and validate."""
    training_s = float(table["training_s"].sum())
    return {
        "trials": len(table),
        "epochs": int(table["epochs"].sum()),
        "wall_s": wall_s,
        "training_s": training_s,
        "slots": slots,
        "overhead_ratio": slots * wall_s / training_s if training_s else None,
        "ended": table["ended"].str.split(r" after|:", regex=True).str[0].value_counts().to_dict(),
    }


# ---- what the user sees --------------------------------------------------------------------------------


def _print_data(images: ImageSet, split: np.ndarray, console: Console) -> None:
    table = Table(title=f"{len(split)} images in {images.table['group'].nunique()} groups", title_justify="left")
    table.add_column("class")
    for name in SPLITS:
        table.add_column(name, justify="right")
    for label, name in enumerate(images.classes):
        of_class = images.table["label"].to_numpy() == label
        table.add_row(name, *(str(int((of_class & (split == part)).sum())) for part in SPLITS))
    console.print(table)
    if images.unreadable:
        console.print(f"left out, unreadable: {len(images.unreadable)} files", style="yellow")
        for path, reason in images.unreadable:
            console.print(f"  {path}: {reason}", soft_wrap=True)
    if images.conflicts:
        console.print("left out, the same image under several classes:", style="yellow")
        for paths in images.conflicts:
            console.print(f"  {', '.join(paths)}", soft_wrap=True)
    if seen := int(twins_across(images, split).sum()):
        console.print(
            f"{seen} of {(split == 'test').sum()} test images have a near copy in train or valid: "
            "the test accuracy will be too high",
            style="bold yellow",
        )


def _print_space(space: SearchSpace, console: Console) -> None:
    console.print("\nfixed trials, before Optuna chooses any:")
    for configuration in space.fixed_trials:
        console.print(f"  {configuration.as_dict()}", soft_wrap=True)
    console.print("varied:")
    for name, distribution in space.distributions.items():
        console.print(f"  {name}: {distribution}", soft_wrap=True)
    for name, value in space.constants.items():
        console.print(f"  {name}: {value} in every other trial")


def _print_outcome(experiment: Experiment, metrics: dict[str, Any], settings: Settings, console: Console) -> None:
    table = Table(title="on validation, best epoch", title_justify="left")
    names = ("trial", "truncation_depth", "frozen_depth", "dropout", "augmentation", "epochs")
    for name in ("", *names, "balanced accuracy"):
        table.add_column(name.replace("_", " "), justify="right" if name else "left")
    for title, trial in (("published", metrics["baseline_trial"]), ("best found", metrics["best_trial"])):
        if trial is not None:
            values = [f"{trial[name]:.2f}" if isinstance(trial[name], float) else str(trial[name]) for name in names]
            table.add_row(title, *values, f"{trial[f'best_{OBJECTIVE}']:.3f}")
    console.print(table)
    test, effort = metrics["test"], metrics["search"]
    low, high = test["accuracy_ci95"]
    ended = ", ".join(f"{count} {how}" for how, count in effort["ended"].items())
    ratio = f"{effort['overhead_ratio']:.2f}" if effort["overhead_ratio"] else "undefined"
    console.print(
        f"search: {effort['trials']} trials ({ended}), {effort['epochs']} epochs, {effort['wall_s']:.0f} s, "
        f"overhead ratio {ratio}",
        soft_wrap=True,
    )
    console.print(
        f"[bold]test accuracy {test['accuracy']:.3f}[/] (95 % interval {low:.3f} to {high:.3f}, {test['n']} images; "
        f"always naming the largest class: {test['majority_rule_accuracy']:.3f})",
        soft_wrap=True,
    )
    if settings.data is None:
        console.print(PHANTOMS, style="bold yellow")
    console.print(f"bundle: {experiment.uri}/{FOLDER}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
