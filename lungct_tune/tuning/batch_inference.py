"""Maps a function over many inputs on all nodes of a Ray cluster, with Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import ray
import ray.data

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


def map_on_cluster(function: Rows, inputs: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Yields the rows of all inputs, some at a time, in the order in which the workers have them.

    A worker is an actor with one GPU, or on a cluster without GPUs with one CPU. They start when there is room.

    Args:
        function: is pickled, once for all workers.
    """
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    workers = max(1, min(int(resources.get(kind, 1)), -(-len(inputs) // BATCH)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    table = pd.DataFrame({"input": list(inputs)})
    mapped = (
        ray.data.from_pandas(table)
        .repartition(-(-len(inputs) // BATCH))
        .map_batches(
            _Worker,
            fn_constructor_args=(ray.put(function),),
            batch_size=BATCH,
            batch_format="pandas",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
            num_cpus=1 if kind == "CPU" else 0,
            num_gpus=1 if kind == "GPU" else 0,
        )
    )
    for rows in mapped.iter_batches(batch_size=None, batch_format="pandas"):
        assert isinstance(rows, pd.DataFrame)
        yield rows
