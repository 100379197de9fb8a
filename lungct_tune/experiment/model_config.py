"""config.json of a bundle. Others may have written it, so what it asks for is bounded before it is used."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, field_validator

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.data.class_names import LONGEST_NAME, MOST_CLASSES
from lungct_tune.experiment.bundle import CONFIG
from lungct_tune.experiment.form import check_form, read_json
from lungct_tune.experiment.metrics import OperatingPoint, TemperatureScaling


class _Part(BaseModel, frozen=True, extra="allow"):
    """What only people read has no field, and is kept as it is."""


class NetworkConfig(_Part, frozen=True):
    """The network."""

    truncation_depth: Annotated[int, Field(ge=1, le=49)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    members: Annotated[int, Field(ge=1, le=50)] = 1
    """How many such networks the model has; several are an ensemble."""
    mirrored: bool = False
    """Whether features are averaged over an image and its mirror image; not so in earlier versions."""


class WindowConfig(_Part, frozen=True):
    """See `lungct_tune.config.window.Window`."""

    center: Annotated[FiniteFloat, Field(ge=-1e6, le=1e6)]
    width: Annotated[FiniteFloat, Field(ge=1, le=1e6)]


class PreprocessingConfig(_Part, frozen=True):
    """From an image file to the network's input."""

    image_size: Annotated[int, Field(ge=32, le=2048)]
    """Width and height in pixels."""
    window: WindowConfig | None = None


class TrainingConfig(_Part, frozen=True):
    """How the model was trained."""

    configuration: dict[str, int | float]
    """The hyperparameters, by name."""
    epochs: int

    @field_validator("configuration")
    @classmethod
    def _of_a_trial(cls, value: dict[str, int | float]) -> dict[str, int | float]:
        if unknown := value.keys() - {field.name for field in fields(Hyperparameters)}:
            raise ValueError(f"{min(unknown)!r} is unknown")
        return value

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The configuration of the trial; what it does not name has its default."""
        values: dict[str, Any] = dict(self.configuration)
        return Hyperparameters(**values)


class SettingsConfig(_Part, frozen=True):
    """The settings of the search that are read again."""

    name: str
    normalisation: Literal["imagenet", "unit"]
    trials: Annotated[int, Field(ge=1)] | None
    data: str | None = ""
    """None: phantoms."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    folds: int | None = None
    hold_test: bool = False


class ModelConfig(_Part, frozen=True):
    """config.json: the model, its preprocessing, and how the model was made."""

    model: NetworkConfig
    classes: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]], Field(min_length=2, max_length=MOST_CLASSES)
    ]
    preprocessing: PreprocessingConfig
    calibration: TemperatureScaling | None
    """None: the network's probabilities are not scaled."""
    training: TrainingConfig
    versions: dict[str, str]
    operating_point: OperatingPoint | None = None
    """None: the classes are not normal and cancers, or a version without one wrote the bundle."""
    settings: SettingsConfig

    @field_validator("classes")
    @classmethod
    def _different(cls, classes: list[str]) -> list[str]:
        if len(set(classes)) < len(classes):
            raise ValueError("two classes have the same name")
        return classes


def read_config(content: bytes) -> ModelConfig:
    """Reads config.json.

    Raises:
        BundleError: a value is missing, has another type, or is out of bounds; the message names it.
    """
    config: ModelConfig = check_form(read_json(content, CONFIG), ModelConfig, CONFIG, strict=True)
    return config
