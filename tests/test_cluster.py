"""How a search divides a cluster, for clusters of every kind: plain arithmetic on what Ray says of the nodes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungct_tune.settings import validate
from lungct_tune.tuning.cluster import ClusterError, connect, divide

LAPTOP = [{"CPU": 2.0}]
GPU_NODES = [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("address", "says"),
    [("127.0.0.1:9", "at 127.0.0.1:9 cannot be joined"), ("ray://head:10001", "does not run through Ray's client")],
)
def test_a_cluster_that_cannot_be_joined_is_named(address: str, says: str) -> None:
    with pytest.raises(ClusterError, match=says):
        connect(address, verbose=False)


def settings(**values: Any) -> Any:
    return validate(values | {"batch_size": values.get("batch_size", 32), "trials": values.get("trials", 99)})


def test_a_laptop_without_gpus() -> None:
    allotment = divide(settings(), LAPTOP)
    assert (allotment.slots, allotment.final_workers) == (2, 2)
    assert allotment.resources_per_worker == {"CPU": 1}
    assert str(allotment) == ("2 slots of 1 worker with 1 CPU each; the final retraining on 2 workers with 1 CPU each")


def test_gpus_are_used_where_there_are_some_and_not_counted_where_there_are_none() -> None:
    allotment = divide(settings(workers=2), GPU_NODES)
    assert (allotment.slots, allotment.workers, allotment.resources_per_worker) == (4, 2, {"CPU": 1, "GPU": 1})


def test_a_fraction_of_a_gpu_lies_on_one_gpu() -> None:
    node = [{"CPU": 16.0, "GPU": 2.0}]
    assert divide(settings(gpus_per_worker=0.4), node).slots == 4  # not 5: the fifth would lie across both
    assert divide(settings(gpus_per_worker=0.6), node).slots == 2
    assert divide(settings(gpus_per_worker=0.1), node).slots == 16  # then the CPUs are what is scarce


def test_the_retraining_gives_every_worker_a_whole_gpu() -> None:
    allotment = divide(settings(gpus_per_worker=0.25), [{"CPU": 16.0, "GPU": 2.0}])
    assert allotment.slots == 8
    assert (allotment.final_workers, allotment.final_resources_per_worker["GPU"]) == (2, 1)


def test_no_more_slots_than_trials_and_enough_images_for_each_final_worker() -> None:
    allotment = divide(settings(trials=3, batch_size=64), [{"CPU": 64.0}])
    assert allotment.slots == 3
    assert allotment.final_workers == 4  # 16 images each


@pytest.mark.parametrize(
    ("values", "nodes", "says"),
    [
        ({"slots": 3}, LAPTOP, "3 slots of 1 worker do not fit"),
        ({"workers": 4}, LAPTOP, "1 slot of 4 workers do not fit"),
        ({"cpus_per_worker": 3}, [{"CPU": 2.0}, {"CPU": 2.0}], "It has 2 nodes: 2 CPU and 0 GPU; 2 CPU and 0 GPU"),
        ({"gpus_per_worker": 1}, LAPTOP, "a worker needs 1 CPU and 1 GPU on one node"),
        ({"final_workers": 3}, LAPTOP, "--final-workers 3 cannot be"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_there_is(values: Any, nodes: Any, says: str) -> None:
    with pytest.raises(ClusterError, match=says):
        divide(settings(**values), nodes)


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.25, 0.3, 0.4, 0.5, 0.6, 1.0, 2.0]),
)
def test_what_is_allotted_can_be_placed(nodes: list[tuple[int, int]], gpus: float) -> None:
    resources = [{"CPU": float(cpus), "GPU": float(g)} for cpus, g in nodes]
    try:
        allotment = divide(settings(gpus_per_worker=gpus), resources)
    except ClusterError:
        return
    placed = 0
    for cpus, count in nodes:  # put workers on single GPUs, or on whole ones, until a node is full
        free = [1.0] * count
        while placed < allotment.slots and cpus >= 1:
            here = [i for i, room in enumerate(free) if room >= min(gpus, 1) - 1e-9][: max(1, int(gpus))]
            if len(here) < max(1, int(gpus)):
                break
            for i in here:
                free[i] -= min(gpus, 1)
            placed, cpus = placed + 1, cpus - 1
    assert placed == allotment.slots
