"""Reads config.json of a bundle. Others may have written it, so what it asks for is bounded before it is used."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from lungct_tune.experiment.bundle import CONFIG, BundleError


class _Model(BaseModel):
    truncation_depth: Annotated[int, Field(ge=1, le=49)]
    dropout: Annotated[float, Field(ge=0, lt=1)]


class _Preprocessing(BaseModel):
    image_size: Annotated[int, Field(ge=32, le=2048)]


class _Calibration(BaseModel):
    temperature: Annotated[FiniteFloat, Field(ge=0.01, le=100)]


class _OperatingPoint(BaseModel):
    threshold: Annotated[FiniteFloat, Field(ge=0, le=1)]


class _Settings(BaseModel):
    normalisation: Literal["imagenet", "unit"]


class _Config(BaseModel):
    model: _Model
    classes: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=2, max_length=1000)]
    preprocessing: _Preprocessing
    calibration: _Calibration | None
    operating_point: _OperatingPoint | None = None
    settings: _Settings

    @model_validator(mode="after")
    def _different(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        return self


def read_config(content: bytes) -> dict[str, Any]:
    """The content of config.json, as plain values. Those that size, model and probabilities depend on are in bounds.

    Raises:
        BundleError: a value is missing or out of bounds; the message names it.
    """
    try:
        config = json.loads(content)
        _Config.model_validate(config, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{CONFIG}: {where or 'classes'}: {first['msg']}; this program wrote no such bundle"
        ) from None
    except ValueError as error:
        raise BundleError(f"{CONFIG} is not JSON: {error}") from None
    return dict(config)
