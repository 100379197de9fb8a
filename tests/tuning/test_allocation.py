"""How a search divides a cluster, for clusters of every kind: plain arithmetic on what Ray says of the nodes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungct_tune.config.settings import validate
from lungct_tune.tuning.allocation import ClusterError, divide, divide_for_retraining, workers_of, workers_that_fit
from lungct_tune.tuning.cluster import connect, starts_here, workers_have_gpus

if TYPE_CHECKING:
    from pathlib import Path

LAPTOP = [{"CPU": 2.0}]
GPU_NODES = [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:9", "at 127.0.0.1:9 cannot be joined"),
        ("ray://head:10001", "does not run through Ray's client"),
        ("http://127.0.0.1:8265", "does not run through the server of `ray job`; give the head's HOST:PORT"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_named(address: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=says):
        connect(address, verbose=False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=says):
        connect(None, verbose=False)


def test_a_token_that_is_missing_here_is_said_with_how_to_get_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        join = f"from lungct_tune.tuning.cluster import connect; connect({address!r}, verbose=False)"
        here = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        here |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
        said = subprocess.run([sys.executable, "-c", join], env=here, capture_output=True, text=True).stderr
    assert f"ClusterError: the Ray cluster at {address} asks for a token: " in said
    assert "Run `ray get-auth-token` on its head" in said


@pytest.mark.parametrize("home", ["home", "home/me", "home/of/me"])
def test_a_home_that_cannot_be_written_is_named_where_ray_keeps_its_token(home: str, tmp_path: Path) -> None:
    """Also one that does not exist, as that of `nobody`."""
    (tmp_path / "home").write_text("")  # root may write to any folder, but not into a file
    here = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    here |= {"HOME": str(tmp_path / home), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(tmp_path)}
    start = "from lungct_tune.tuning.cluster import connect; connect('local', verbose=False)"
    said = subprocess.run([sys.executable, "-c", start], env=here, capture_output=True, text=True).stderr
    assert f"ClusterError: Ray cannot write its token to {tmp_path}/{home}/.ray/auth_token: Not a directory" in said


@pytest.mark.parametrize("address", [None, "local"])
def test_a_machine_that_is_too_busy_for_ray_is_named(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's error for a start of more than 30 s is a plain Exception. `local` starts one beside one that runs."""

    def time_out(**options: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr("ray.init", time_out)
    monkeypatch.setattr("lungct_tune.tuning.cluster.has_local_cluster", lambda: bool(address))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"timed out during startup(.|\n)*busy, run the command again later"):
        connect(address, verbose=False)
    assert starts_here(address)


def settings(**values: Any) -> Any:
    return validate(values | {"batch_size": values.get("batch_size", 32), "trials": values.get("trials", 99)})


FIXED: list[dict[str, float]] = []
"""What comes to a cluster without an autoscaler."""


def test_a_laptop_without_gpus() -> None:
    allotment = divide(settings(), LAPTOP, FIXED)
    assert (allotment.slots, allotment.resources_per_worker) == (2, {"CPU": 1})
    assert str(allotment) == "2 slots of 1 worker with 1 CPU each"
    final = divide_for_retraining(settings(), LAPTOP, FIXED)
    assert final.slot == "1 worker with 1 CPU each"


def test_gpus_are_used_where_there_are_some_and_not_counted_where_there_are_none() -> None:
    allotment = divide(settings(workers=2), GPU_NODES, FIXED)
    assert (allotment.slots, allotment.workers, allotment.resources_per_worker) == (4, 2, {"CPU": 1, "GPU": 1})


def test_a_fraction_of_a_gpu_lies_on_one_gpu() -> None:
    node = [{"CPU": 16.0, "GPU": 2.0}]
    assert divide(settings(gpus_per_worker=0.4), node, FIXED).slots == 4  # not 5: the fifth would lie across both
    assert divide(settings(gpus_per_worker=0.6), node, FIXED).slots == 2
    assert divide(settings(gpus_per_worker=0.1), node, FIXED).slots == 16  # then the CPUs are what is scarce
    assert workers_that_fit([{"CPU": 8.0, "GPU": 1.5}], {"CPU": 1, "GPU": 0.5}) == 3  # what others have left


def test_the_retraining_has_the_workers_of_a_slot_and_several_get_a_whole_gpu_each() -> None:
    node = [{"CPU": 16.0, "GPU": 2.0}]
    assert divide(settings(gpus_per_worker=0.25), node, FIXED).slots == 8
    final = divide_for_retraining(settings(gpus_per_worker=0.25), node, FIXED)
    assert (final.workers, final.resources_per_worker["GPU"], final.slots) == (1, 0.25, 8)
    final = divide_for_retraining(settings(gpus_per_worker=0.25, final_workers=2), node, FIXED)
    assert (final.workers, final.resources_per_worker["GPU"], final.slots) == (2, 1, 1)
    assert divide_for_retraining(settings(workers=2), node, FIXED).workers == 2
    assert divide_for_retraining(settings(workers=2, folds=4), node, FIXED).workers == 1
    assert divide_for_retraining(settings(workers=2, folds=1), node, FIXED).workers == 2
    assert divide_for_retraining(settings(slots=4), [], to_come=None).slots == 4, "for nodes that may come"


def test_gpus_count_once_the_cluster_is_joined_and_if_workers_get_some(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, joining = list(LAPTOP), Future[str]()
    monkeypatch.setattr("lungct_tune.tuning.cluster.cluster_nodes", lambda: (nodes, FIXED))
    assert not workers_have_gpus(settings(), None)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(workers_have_gpus, settings(), joining)
        nodes[:] = GPU_NODES
        joining.set_result("")
        assert answer.result()
    assert not workers_have_gpus(settings(gpus_per_worker=0), joining)


def test_no_more_slots_than_trials() -> None:
    assert divide(settings(trials=3, batch_size=64), [{"CPU": 64.0}], FIXED).slots == 3


HEAD = {"CPU": 0.0, "node:__internal_head__": 1.0}
AUTOSCALED = {
    "head_node_type": "head",
    "max_workers": 3,
    "available_node_types": {
        "head": {"resources": {"CPU": 0}},
        "small": {"resources": {"CPU": 8}, "max_workers": 9},
        "large": {"resources": {"CPU": 16, "GPU": 4}, "max_workers": 2},
    },
}


def test_an_empty_cluster_is_divided_as_it_can_grow() -> None:
    to_come = workers_of(AUTOSCALED)
    assert to_come == [{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}, {"CPU": 8}]
    allotment = divide(settings(), [HEAD], to_come)
    assert (allotment.slots, allotment.capacity, allotment.resources_per_worker["GPU"]) == (8, 0, 1)
    assert "8 slots of 1 worker with 1 CPU and 1 GPU each (room for 0 now" in str(allotment)
    assert divide(settings(), [HEAD, {"CPU": 16.0, "GPU": 4.0}], to_come).capacity == 4


def test_a_head_with_too_little_memory_for_its_part_of_the_slots_is_refused() -> None:
    nodes: list[dict[str, float]] = [{"node:__internal_head__": 1.0, "memory": 8.0 * 2**30}, {"CPU": 128.0}]
    with pytest.raises(ClusterError, match=r"128 slots need [\d.]+ GiB of the head's memory.* 8.0 GiB") as refused:
        divide(settings(trials=500), nodes, FIXED)
    fit = int(re.search(r"--slots (\d+)", str(refused.value))[1])  # type: ignore[index]
    assert divide(settings(trials=500, slots=fit), nodes, FIXED).head_memory <= 8 * 2**30
    with pytest.raises(ClusterError):
        divide(settings(trials=500, slots=fit + 1), nodes, FIXED)


@pytest.mark.parametrize(
    ("values", "nodes", "says"),
    [
        ({"slots": 3}, LAPTOP, "3 slots of 1 worker do not fit"),
        ({"workers": 4}, LAPTOP, "1 slot of 4 workers do not fit"),
        ({"cpus_per_worker": 3}, [{"CPU": 2.0}, {"CPU": 2.0}], "It has 2 nodes: 2 CPU and 0 GPU; 2 CPU and 0 GPU"),
        ({"gpus_per_worker": 1}, LAPTOP, "a worker needs 1 CPU and 1 GPU on one node"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_there_is(values: Any, nodes: Any, says: str) -> None:
    with pytest.raises(ClusterError, match=says):
        divide(settings(**values), nodes, FIXED)


def test_more_final_workers_than_fit_are_refused() -> None:
    with pytest.raises(ClusterError, match="--final-workers 4 is not possible: the cluster holds 2 workers"):
        divide_for_retraining(settings(final_workers=4), LAPTOP, FIXED)


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.25, 0.3, 0.4, 0.5, 0.6, 1.0, 2.0]),
)
def test_what_is_allotted_can_be_placed(nodes: list[tuple[int, int]], gpus: float) -> None:
    resources = [{"CPU": float(cpus), "GPU": float(g)} for cpus, g in nodes]
    try:
        allotment = divide(settings(gpus_per_worker=gpus), resources, FIXED)
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
