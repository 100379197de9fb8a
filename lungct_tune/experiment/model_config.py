"""Reads config.json of a bundle. Others may have written it, so what it asks for is bounded before it is used."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, field_validator

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.experiment.bundle import CONFIG
from lungct_tune.experiment.form import check_form, read_json


class _Model(BaseModel):
    truncation_depth: Annotated[int, Field(ge=1, le=49)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    members: Annotated[int, Field(ge=1, le=50)] = 1


class _Window(BaseModel):
    center: Annotated[FiniteFloat, Field(ge=-1e6, le=1e6)]
    width: Annotated[FiniteFloat, Field(ge=1, le=1e6)]


class _Preprocessing(BaseModel):
    image_size: Annotated[int, Field(ge=32, le=2048)]
    window: _Window | None = None


class _FittedOn(BaseModel, extra="forbid"):
    images: int
    groups: int
    what: str


class _Calibration(BaseModel):
    temperature: Annotated[FiniteFloat, Field(ge=0.01, le=100)]
    fitted_on: _FittedOn


class _Training(BaseModel):
    configuration: dict[str, int | float]
    epochs: int

    @field_validator("configuration")
    @classmethod
    def _of_a_trial(cls, value: dict[str, int | float]) -> dict[str, int | float]:
        if unknown := value.keys() - {field.name for field in fields(Hyperparameters)}:
            raise ValueError(f"{min(unknown)!r} is unknown")
        return value


class _OperatingPoint(BaseModel):
    threshold: Annotated[FiniteFloat, Field(ge=0, le=1)]
    at_95_specificity: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None


class _Settings(BaseModel):
    name: str
    normalisation: Literal["imagenet", "unit"]
    trials: Annotated[int, Field(ge=1)] | None
    folds: int | None = None


class _Config(BaseModel):
    model: _Model
    classes: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=2, max_length=1000)]
    preprocessing: _Preprocessing
    calibration: _Calibration | None
    training: _Training
    versions: dict[str, str]
    operating_point: _OperatingPoint | None = None
    settings: _Settings

    @field_validator("classes")
    @classmethod
    def _different(cls, classes: list[str]) -> list[str]:
        if len(set(classes)) < len(classes):
            raise ValueError("two classes have the same name")
        return classes


def read_config(content: bytes) -> dict[str, Any]:
    """The content of config.json, as plain values. Those that size, model and probabilities depend on are in bounds.

    Raises:
        BundleError: a value is missing or out of bounds; the message names it.
    """
    config = read_json(content, CONFIG)
    check_form(config, _Config, CONFIG, strict=True)
    return dict(config)
