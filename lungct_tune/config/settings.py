"""The settings of a search, validated in one place for the command line and for YAML files."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lungct_tune.cli import command_line, suggestion
from lungct_tune.config.addresses import check_database, check_server, shown
from lungct_tune.config.window import Window, parse_window
from lungct_tune.config.yaml_file import read_yaml
from lungct_tune.errors import UserError
from lungct_tune.files import is_text, local_path

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

FOLDS = 5
"""The number of folds where the user gives none and the search has some, see `experiment/folds.py`."""

OF_ONE_RUN = frozenset({"resume", "judge", "plan", "address", "track", "verbose"})
"""Settings of one run of the program. They are neither kept in an experiment nor taken from one."""

_PACKAGE = Path(__file__).parents[1]
SPACES = max(_PACKAGE / "search_spaces", _PACKAGE.parent / "search_spaces", key=Path.is_dir)
"""Folder of the search spaces that come with the program: inside an installed package, beside it in a checkout."""

EXAMPLES = """\
examples:
  python -m lungct_tune.search                                      phantoms, a few trials, minutes
  python -m lungct_tune.search --data chest-ctscan --trials 60      real images, on the running cluster
  python -m lungct_tune.search --resume 2026-11-23-054807-phantoms  continue an interrupted search
"""


class SettingsError(UserError):
    """A setting that is not allowed; the message names the field, the value and the allowed values."""


def pairs(value: Any) -> Any:
    """Turns `a=b,c=d` from the command line into a mapping, as YAML gives it."""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",")]
    if not all(folder.strip() and equals and name.strip() for folder, equals, name in pairs):
        raise ValueError("expected FOLDER=CLASS[,FOLDER=CLASS...]")
    folders = [folder.strip() for folder, _, _ in pairs]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ValueError(f"it has {twice} twice; keep one")
    return {folder.strip(): name.strip() for folder, _, name in pairs}


def _place(value: Any) -> Any:
    """Returns what a user calls a place as a path, but a URI of other than local files as it is."""
    if not isinstance(value, str | Path | None):
        raise ValueError("expected the path of a file or folder")
    return local_path(value) or value if isinstance(value, str) else value


LocalPath = Annotated[Path, BeforeValidator(_place)]


def _flag(help: str, metavar: str = "N", default: Any = None) -> Any:
    return Field(default, description=help, json_schema_extra={"metavar": metavar})


class Settings(BaseModel):
    """All settings of a search. A field is a flag (`--image-size`) and a key of a YAML file (`image_size`).

    Fields left at None are decided later, from the data and the cluster. `for_data` fills the fields that depend on
    whether the images are real.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: Annotated[str | Path | None, BeforeValidator(_place)] = _flag(
        "images in class folders, alone or in train/ valid/ test/; a folder or URI (phantoms)", "DIR"
    )
    class_map: Annotated[dict[str, str] | None, BeforeValidator(pairs)] = _flag(
        "other class names: FOLDER=CLASS[,...]", "MAP"
    )
    table: LocalPath | None = _flag("a CSV of path (or SeriesInstanceUID), class and group, for loose images", "FILE")
    window: str | None = _flag(
        "of CT values in DICOM files: lung, mediastinum or CENTER,WIDTH (each file's own)", "WINDOW"
    )
    skip_unreadable: bool = Field(False, description="leave out files that cannot be read")
    space: LocalPath | None = _flag(
        "the search space: what Optuna may vary (search_spaces/default.yaml; phantoms phantoms.yaml)", "FILE"
    )
    trials: Positive | None = _flag("trials to run (40; phantoms 20)")
    epochs: Positive | None = _flag("the most epochs of a trial (48; phantoms 10)")
    image_size: Annotated[int, Field(ge=32, le=2048)] | None = _flag("width and height, in pixels (224; phantoms 48)")
    batch_size: Annotated[int, Field(ge=2)] | None = _flag("images per step, over all workers (32; phantoms 16)")
    split: Literal["grouped", "official"] = Field(
        "grouped", description="70/10/20 that keeps groups together, or the published folders"
    )
    split_seed: Seed = _flag("the seed of the grouped split and of the folds (0)", default=0)
    split_file: LocalPath | None = _flag(
        "a split of your own instead of --split: CSV of path, split and, if known, group", "FILE"
    )
    folds: Annotated[int, Field(ge=1, le=50)] | None = _flag(
        "evaluate each trial by cross-validation over train and validation; 1 is off (5 for fewer than 2,000 images "
        "of yours on GPUs, else 1)",
        "K",
    )
    ensemble: bool = Field(
        False, description="instead of retraining the best trial, ship its folds' models, which predict together"
    )
    seeds: Annotated[int, Field(ge=2, le=100)] | None = _flag(
        "train winner and published configuration again with the same N other seeds, and compare (off)", "N"
    )
    strict: bool = Field(False, description="refuse a split that leaks: copies or series in several parts")
    weights: str | None = _flag("pretrained weights: imagenet, none or a FILE (imagenet; phantoms none)", "W")
    normalisation: Literal["imagenet", "unit"] = Field(
        "imagenet", description="the weights' input: ImageNet's mean and deviation, or grey as 0 to 1"
    )
    compare_baseline: bool = Field(
        False, description="also retrain and evaluate the published configuration (phantoms: always)"
    )
    workers: Positive = _flag("Ray Train workers of a slot, data parallel (1)", default=1)
    cpus_per_worker: Annotated[float, Field(gt=0)] = _flag("CPUs a worker reserves, fractions allowed (1)", "F", 1.0)
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = _flag(
        "GPUs a worker reserves, fractions share one (1 if there are GPUs)", "F"
    )
    slots: Positive | None = _flag("trials at the same time (as many as the cluster holds)")
    checkpoint_interval: Annotated[float, Field(ge=0)] = _flag(
        "seconds of training between two saved states of a trial (30)", "S", 30.0
    )
    final_workers: Positive | None = _flag("workers of the final retraining (as a slot has; with folds 1)")
    storage: str = _flag("where experiments go: a folder, s3://, gs://... (./results)", "URI", "./results")
    name: Name | None = _flag("the experiment's name (time and data)", "NAME")
    study: str | None = _flag("a database for Optuna (a file in the experiment's folder)", "URL")
    track: str | None = _flag("mlflow:http://HOST:PORT, a server to copy the study to", "mlflow:URI")
    resume: Name | None = _flag("continue an interrupted search", "NAME")
    hold_test: bool = Field(False, description="end before the test split is looked at; --judge looks at it")
    judge: Name | None = _flag("evaluate the best of a search with --hold-test on the test split, once", "NAME")
    seed: Seed = _flag("the seed of all other random numbers (0)", default=0)
    address: str | None = _flag("address of a Ray cluster (the running one, else a local one)", "ADDR")
    plan: bool = Field(False, description="print what a search would do, and stop")
    verbose: bool = Field(False, description="show Ray's own output too")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size is not None and self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of workers {self.workers}: "
                "every worker gets an equal share of a step's images"
            )
        if self.batch_size is not None and self.batch_size < 2 * self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} gives each of {self.workers} workers a single image: "
                "batch normalisation needs at least two"
            )
        if self.split_file and self.split == "official":
            raise ValueError("split official and split_file are two splits; give one of them")
        if self.resume and self.judge:
            raise ValueError("resume and judge are two things to do with a search; give one of them")
        folds = self.folds or (FOLDS if self.ensemble else 1)
        if self.ensemble and folds == 1:
            raise ValueError("ensemble with folds 1: an ensemble has the models of several folds; give more folds")
        if 1 < folds < self.workers:
            raise ValueError(
                f"workers {self.workers} with folds {folds}: a worker trains whole folds, so some workers would "
                "have none; use fewer workers and more slots"
            )
        if self.gpus_per_worker and self.gpus_per_worker < 1 and self.workers > 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker} with workers {self.workers}: NCCL does not allow two workers "
                "of one group on one GPU; share a GPU among slots with one worker, or give every worker a whole one"
            )
        if self.gpus_per_worker and self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ValueError(f"gpus_per_worker {self.gpus_per_worker}: above 1 only whole GPUs can be reserved")
        return self

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:  # `yes` in YAML, which would count as 1
            raise ValueError("true or false (in YAML also yes, no, on, off) is no value of this setting")
        if isinstance(value, str) and not value.strip():
            raise ValueError("it is empty; give a value, or leave the setting out")
        if isinstance(value, str) and not is_text(value):
            raise ValueError("it is not UTF-8; rename that file or folder")
        return value

    @field_validator("storage")
    @classmethod
    def _a_place(cls, storage: str) -> str:
        scheme = r"[A-Za-z][A-Za-z0-9+.-]"
        one_slash = re.match(rf"{scheme}+:/[^/]", storage)  # would be a folder called "s3:"
        if one_slash or ("://" in storage and not re.match(rf"{scheme}*://.", storage)):
            raise ValueError("expected a folder, or a URI such as s3://BUCKET/FOLDER")
        return storage

    @field_validator("window", "study", "track")
    @classmethod
    def _understood(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None:
            {"window": parse_window, "study": check_database, "track": check_server}[info.field_name or ""](text)
        return text

    @model_validator(mode="after")
    def _found(self) -> Self:
        if isinstance(self.data, Path) and not self.data.is_dir():
            raise ValueError(f"data {str(self.data)!r} is not a folder; give the images' folder: --data DIR")
        return self

    @property
    def ct_window(self) -> Window | None:
        """The window of CT values in DICOM files; None is each file's own."""
        return None if self.window is None else parse_window(self.window)

    @property
    def cross_validates(self) -> bool:
        """Whether trials have several folds, as far as that is decided."""
        return self.folds is not None and self.folds > 1

    def for_data(self) -> Settings:
        """These settings, with defaults filled in that depend on the images: small and quick for phantoms."""
        phantoms = self.data is None
        decided = {
            "space": SPACES / f"{'phantoms' if phantoms else 'default'}.yaml",
            "trials": 20 if phantoms else 40,
            "epochs": 10 if phantoms else 48,
            "image_size": 48 if phantoms else 224,
            "batch_size": self.workers * max(2, math.ceil((16 if phantoms else 32) / self.workers)),
            "weights": "none" if phantoms else "imagenet",
        }
        return self.model_copy(update={k: v for k, v in decided.items() if getattr(self, k) is None})

    def with_absolute_paths(self) -> Settings:
        """These settings with absolute paths, so that they are valid in any working folder."""
        paths: dict[str, Any] = {
            name: path.resolve()
            for name in ("space", "table", "split_file")
            if (path := getattr(self, name)) is not None
        }
        if isinstance(self.data, Path):
            paths["data"] = self.data.resolve()
        if self.weights not in (None, "imagenet", "none"):
            paths["weights"] = str((local_path(self.weights) or Path(self.weights)).resolve())
        return self.model_copy(update=paths)

    def as_yaml(self) -> str:
        """The settings that define the experiment, as YAML."""
        kept = self.model_dump(mode="json", exclude=set(OF_ONE_RUN))
        return yaml.safe_dump(kept, sort_keys=False)


def read_settings(argv: Sequence[str] | None = None) -> tuple[Settings, set[str]]:
    """Reads the settings from a command line and its --settings file, and the names of the fields given.

    Raises:
        SettingsError: a value is not allowed, a key is unknown, or the file cannot be read.
    """
    parser = command_line(
        "search",
        EXAMPLES,
        usage="%(prog)s [--data DIR] [--space FILE] [--trials N] [--epochs N] ...",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--settings", metavar="FILE", help="YAML of these settings; flags win")
    for name, field in Settings.model_fields.items():
        flag, extra = "--" + name.replace("_", "-"), field.json_schema_extra
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", help=field.description)
        else:
            metavar = str(extra["metavar"]) if isinstance(extra, dict) else "|".join(_choices(name))
            parser.add_argument(flag, metavar=metavar, help=field.description)
    flags = vars(parser.parse_args(argv))
    given = _read_yaml(Path(path)) | flags if (path := flags.pop("settings", None)) is not None else flags
    return validate(given), set(given)


def flags(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The command-line arguments for those of these settings that are not the defaults."""
    words = []
    for name in names:
        default = Settings.model_fields[name].default
        value = values.get(name, default)
        if value is None or value is False or str(value) == str(default):
            continue
        if isinstance(value, dict):
            value = ",".join(f"{folder}={label}" for folder, label in value.items())
        flag = f"--{name.replace('_', '-')}"
        if str(value).startswith("-"):  # which argparse would take for another flag
            words.append(f"{flag}={value}")
        else:
            words += [flag] + ([] if value is True else [str(value)])
    return words


def validate(values: dict[str, Any]) -> Settings:
    """Makes settings from plain values.

    Raises:
        SettingsError: a value is wrong; the message names each wrong field, its value and the allowed values.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    kind, value, limits = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        meant = suggestion(field, Settings.model_fields)
        return f"{field}: no such setting{meant}; the settings are {', '.join(Settings.model_fields)}"
    reason = problem["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        reason = f"expected {limits['expected'].replace(chr(39), '')}{suggestion(str(value), _choices(field))}"
    elif kind in _REASONS:
        reason = _REASONS[kind].format(**limits)
        if field in ("resume", "judge") and kind == "string_pattern_mismatch":
            reason = "expected the name of a search; the folder or bucket that it is in goes to --storage"
    return f"{field} = {shown(value)}: {reason}" if field else reason


_REASONS = {
    "greater_than_equal": "the least is {ge}",
    "greater_than": "it must be more than {gt}",
    "less_than_equal": "the most is {le}",
    "less_than": "it must be less than {lt}",
    "finite_number": "expected a finite number",
    "string_type": "expected text; in YAML, put it into quotes",
    "string_pattern_mismatch": "only letters, digits, dots, hyphens and underscores, the first a letter or digit",
    "dict_type": "expected a mapping of folders to classes",
} | dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "expected a whole number")
_REASONS |= dict.fromkeys(("float_type", "float_parsing"), "expected a number")
_REASONS |= dict.fromkeys(("bool_type", "bool_parsing"), "expected true or false")


def _choices(field: str) -> tuple[str, ...]:
    """The allowed values of a setting that has few of them; empty for others."""
    return tuple(getattr(Settings.model_fields[field].annotation, "__args__", ()))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"settings file {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"settings file {path}: expected lines of `field: value`, found {shown(values)}")
    fields = {key.replace("-", "_"): value for key, value in values.items()}
    if len(fields) < len(values):
        twice = ", ".join(key for key in values if "-" in key and key.replace("-", "_") in values)
        raise SettingsError(f"settings file {path}: {twice} is there twice, with - and with _; remove one of the two")
    # `trials:` is its default, and `trails:` is to be refused
    return {key: value for key, value in fields.items() if value is not None or key not in Settings.model_fields}
