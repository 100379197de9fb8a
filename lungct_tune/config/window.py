"""The window of CT values that becomes grey: its name or its centre and width, as a user writes it."""

from __future__ import annotations

import math
from typing import NamedTuple


class Window(NamedTuple):
    """A range of CT values in Hounsfield units: what is below it becomes black, what is above it white."""

    center: float
    width: float
    """At least 1."""


WINDOWS = {"lung": Window(-600, 1500), "mediastinum": Window(50, 350)}
"""The windows that have a name. Source: https://radiopaedia.org/articles/windowing-ct."""

_MOST = 1e6  # Hounsfield units; stored values have 16 bits


def parse_window(text: str) -> Window:
    """The window that `lung`, `mediastinum` or `CENTER,WIDTH` means.

    Raises:
        ValueError: it is none of these.
    """
    if text in WINDOWS:
        return WINDOWS[text]
    try:
        center, width = (float(number) for number in text.split(","))
    except ValueError:
        center = width = math.nan
    if not (abs(center) <= _MOST and 1 <= width <= _MOST):
        raise ValueError(
            f"expected {', '.join(WINDOWS)} or CENTER,WIDTH in Hounsfield units with a width of at least 1, such as "
            "-600,1500"
        )
    return Window(center, width)
