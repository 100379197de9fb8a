"""Maps a function over many inputs on all nodes of a Ray cluster, with Ray Data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import ray
import ray.data

from lungct_tune.tuning.cluster import joined

BATCH = 64
"""Inputs that a worker gets at a time."""

Rows = Callable[[list[str]], pd.DataFrame]
"""Maps inputs to one row for each."""


class _Worker:
    """An actor of Ray Data, which keeps the function with its model for all of its batches."""

    def __init__(self, function: ray.ObjectRef[Rows]) -> None:
        self._function = ray.get(function)

    def __call__(self, batch: pd.DataFrame) -> pd.DataFrame:
        return self._function(batch["input"].tolist())


def map_on_cluster(address: str | None, function: Rows, inputs: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Yields the rows of all inputs, some at a time, in the order in which the workers have them.

    A worker is an actor with one GPU, or on a cluster without GPUs with one CPU. They start when there is room.

    Args:
        address: of a Ray cluster; None is the one at hand.
        function: is pickled, once for all workers.

    Raises:
        ClusterError: the cluster cannot be joined.
    """
    # Ray Data's own actors make Ray log at every start that their arguments are in the object store
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it has a level of its own, and prints its plans
    with joined(address, False, "predict"):
        resources, batches = ray.cluster_resources(), -(-len(inputs) // BATCH)
        on_gpus = resources.get("GPU", 0) >= 1
        workers = max(1, min(int(resources.get("GPU" if on_gpus else "CPU", 1)), batches))
        ray.data.DataContext.get_current().enable_progress_bars = False
        mapped = (
            ray.data.from_pandas(pd.DataFrame({"input": list(inputs)}))
            .repartition(batches)
            .map_batches(
                _Worker,
                fn_constructor_args=(ray.put(function),),
                batch_size=BATCH,
                batch_format="pandas",
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
                num_cpus=0 if on_gpus else 1,
                num_gpus=1 if on_gpus else 0,
            )
        )
        for rows in mapped.iter_batches(batch_size=None, batch_format="pandas"):
            assert isinstance(rows, pd.DataFrame)
            yield rows
