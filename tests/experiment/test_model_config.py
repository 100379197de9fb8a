"""A bundle's config.json cannot ask for a model or an image of any size."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from bundles import files_of_a_bundle

from lungct_tune.data import DataError, read_images
from lungct_tune.experiment.bundle import CONFIG, BundleError
from lungct_tune.experiment.model_config import read_config

if TYPE_CHECKING:
    from pathlib import Path

FITTED = {"images": 9, "groups": 3, "what": "validation"}


def config(**changes: Any) -> dict[str, Any]:
    return dict(json.loads(files_of_a_bundle()[CONFIG])) | changes


def test_values_within_bounds_are_read_as_they_are() -> None:
    written = config(calibration={"temperature": 1.5, "fitted_on": FITTED}, more="kept")
    assert json.loads(read_config(json.dumps(written).encode()).model_dump_json(exclude_unset=True)) == written


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"preprocessing": {"image_size": 1_000_000}}, "preprocessing.image_size"),
        ({"preprocessing": {}}, "preprocessing.image_size"),
        ({"preprocessing": {"image_size": 64, "window": {"center": 0, "width": 0}}}, "preprocessing.window.width"),
        ({"preprocessing": {"image_size": 64, "window": "lung"}}, "preprocessing.window"),
        ({"model": {"truncation_depth": 50, "dropout": 0.5}}, "model.truncation_depth"),
        ({"model": {"truncation_depth": 20, "dropout": 1.0}}, "model.dropout"),
        ({"model": {"truncation_depth": 20, "dropout": 0.5, "members": 1000}}, "model.members"),
        ({"classes": [f"class {n}" for n in range(1001)]}, "classes"),
        ({"classes": ["normal", "normal"]}, "classes: .*same name"),
        ({"classes": ["a" * 201, "normal"]}, "classes.0"),
        ({"calibration": {"temperature": 0}}, "calibration.temperature"),
        ({"calibration": {"temperature": 1.5, "fitted_on": {}}}, "calibration.fitted_on"),
        ({"settings": {"name": "a", "trials": 8, "normalisation": "other"}}, "settings.normalisation"),
        ({"settings": {"name": "a", "trials": 8, "normalisation": "unit", "seed": "7"}}, "settings.seed"),
        ({"training": {"configuration": {"depth": 3}, "epochs": 4}}, "training.configuration.*'depth' is unknown"),
        ({"training": {"configuration": [], "epochs": 4}}, "training.configuration"),
        ({"versions": None}, "versions"),
    ],
)
def test_a_value_out_of_bounds_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError, match=rf"config\.json: {named}"):
        read_config(json.dumps(config(**changes)).encode())


def test_what_is_not_json_is_no_config() -> None:
    for content in (b"{", b"[" * 100_000, b"\xff\xfe", json.dumps(config(calibration=float("nan"))).encode()):
        with pytest.raises(BundleError, match="is not JSON"):
            read_config(content)


def test_a_class_that_no_bundle_can_have_is_refused_when_the_images_are_read(phantoms: Path) -> None:
    """Found: the search ran to its end, and then could not write its bundle."""
    with pytest.raises(DataError, match="names of at most 200 characters: rename"):
        read_images(phantoms, 32, class_map={"normal": "n" * 201}, progress=False)
