"""The bundle: the folder that people pull, with the model and all that is needed to trust and use it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from lungct_tune import __version__
from lungct_tune.configuration import Configuration
from lungct_tune.data import ImageSet
from lungct_tune.experiment import Experiment
from lungct_tune.settings import Settings

if TYPE_CHECKING:
    from lungct_tune.model import CutResNet

FOLDER = "best"
CHECKSUMS = "checksums.txt"


class BundleError(ValueError):
    """A bundle that cannot be trusted: the message names the file and what is wrong with it."""


def write_bundle(experiment: Experiment, files: Mapping[str, bytes]) -> None:
    """Writes `best/` whole or not at all, with the checksums of its files.

    On a file system the folder gets its name when it is complete; on an object store, which cannot rename a
    folder, `checksums.txt` comes last and a folder without it is no bundle.
    """
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    complete = dict(files) | {CHECKSUMS: sums.encode()}
    folder = f"{FOLDER}.part" if experiment.is_local else FOLDER
    if experiment.is_local:
        shutil.rmtree(Path(experiment.uri, folder), ignore_errors=True)  # of a run that was killed here
    for name, content in complete.items():
        experiment.write(f"{folder}/{name}", content)
    if experiment.is_local:
        Path(experiment.uri, folder).rename(Path(experiment.uri, FOLDER))


def has_bundle(experiment: Experiment) -> bool:
    return experiment.exists(f"{FOLDER}/{CHECKSUMS}")


def as_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"


def describe_model(settings: Settings, images: ImageSet, configuration: Configuration, epochs: int) -> dict[str, Any]:
    """config.json: all that rebuilds the model and its preprocessing, and what made it."""
    from lungct_tune.model import HEAD_WIDTHS
    from lungct_tune.training import NORMALISATIONS

    mean, deviation = NORMALISATIONS[settings.normalisation]
    packages = ("torch", "torchvision", "ray", "optuna", "numpy", "scikit-learn", "pillow")
    return {
        "model": {
            "architecture": "ResNet50 cut after its k-th ReLU, pooling, batch normalisation, three dense layers",
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


def list_predictions(images: ImageSet, test: np.ndarray, probabilities_NC: np.ndarray) -> bytes:
    """predictions.csv: a row a test image, with path, class, predicted class, probabilities, group."""
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


def verify(folder: Path) -> None:
    """Checks every file of a bundle against its checksum.

    Raises:
        BundleError: a file is missing or not what was written.
    """
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
    except OSError as error:
        raise BundleError(f"{folder}: no {CHECKSUMS}, so this is no complete bundle") from error
    for line in lines:
        expected, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path}: missing; fetch the bundle again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise BundleError(f"{path}: not the file that was written (its sha256 differs); fetch the bundle again")


def load_model(folder: Path) -> tuple[CutResNet, dict[str, Any]]:
    """Rebuilds a bundle's model, on the CPU and ready to predict, with its config.json.

    Raises:
        BundleError: the bundle is incomplete or altered.
    """
    from safetensors.torch import load_file

    from lungct_tune.model import CutResNet

    verify(folder)
    config = json.loads((folder / "config.json").read_text())
    model = CutResNet(
        config["model"]["truncation_depth"],
        dropout=config["model"]["dropout"],
        classes=len(config["classes"]),
    )
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), config
