"""Ray Tune's callbacks while a search runs: time, progress, metrics, MLflow, the best bundle so far."""

from __future__ import annotations

from typing import Any

from ray import tune


class SearchCallback(tune.Callback):  # type: ignore[misc]
    """What listens in the driver while a search runs."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for Tuner.restore, which is not needed because of the study
