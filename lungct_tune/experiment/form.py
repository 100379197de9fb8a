"""Checks what lies in an experiment or a bundle against the form in which this program writes it.

Others may have written it: a storage is shared, a bundle is pulled, a file is edited by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import BundleError

_LONGEST = 200  # characters of an error that a message repeats


def read_json(content: bytes, file: str) -> Any:
    """The values in a JSON file. They have no NaN and no infinity, which JSON does not have either.

    Raises:
        BundleError: it is not JSON.
    """

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:40]} is no finite number")
        return value

    try:
        return json.loads(content, parse_float=number, parse_constant=number)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not JSON: {str(error)[:_LONGEST]}; restore it") from None


def check_form(values: Any, form: Any, file: str, *, strict: bool = False) -> Any:
    """These values in a form: a class, a dataclass or a pydantic model.

    Args:
        file: the name of their file for the message, and what in it.
        strict: whether a value must have its type, so that "1" is no number.

    Raises:
        BundleError: a value is missing or has another form; the message names file and key.
    """
    try:
        adapter = TypeAdapter(form)
        # with strict types, only values that come from JSON may become dataclasses
        return adapter.validate_json(json.dumps(values), strict=True) if strict else adapter.validate_python(values)
    except ValidationError as error:
        first, *_ = error.errors()
        where = ".".join(str(part)[:_LONGEST] for part in first["loc"])
        place = f"{file}: {where}" if where else file
        raise BundleError(
            f"{place}: {first['msg'][:_LONGEST]}. Another version of lungct_tune may have "
            "written it, or somebody has changed it; use that version, or restore the file"
        ) from None


@contextmanager
def written_by_a_search(file: str) -> Iterator[None]:
    """Inside, any error of a library that reads `file` becomes a BundleError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what decoders and databases raise about foreign files has no common class
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:_LONGEST]
        raise BundleError(f"{file} is not one that a search wrote, or it is damaged ({reason}); restore it") from error
