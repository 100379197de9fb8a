"""Several workers that train one model together: NCCL and SyncBatchNorm on GPUs, gloo on CPUs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from devices import CUDA
from toys import NO_CHANCE, SMALL, assert_same, training

SURE = replace(SMALL, dropout=0.0)


def enough(world: int) -> Any:
    """A parameter for as many GPUs."""
    missing = pytest.mark.skipif(torch.cuda.device_count() < world, reason=f"fewer than {world} CUDA GPUs")
    return pytest.param(("nccl", world), marks=[*CUDA.marks, missing], id=f"nccl-{world}")


@pytest.fixture(scope="module", params=[pytest.param(("gloo", 2), id="gloo-2"), enough(1), enough(2)])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each worker of a group says of its training."""
    backend, world = request.param
    folder = tmp_path_factory.mktemp("group")
    mp.spawn(work, args=(backend, world, folder), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def work(rank: int, backend: str, world: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, f"file://{folder}/rendezvous", rank=rank, world_size=world)
    frozen = training(NO_CHANCE, device=device)
    usual = training(SURE, device=device)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, rank)  # as folds do
    report = {
        "world": world,
        "device": device.type,
        "losses": [usual.train_epoch() for _ in range(2)],
        "frozen": frozen.train_epoch(),
        "probabilities": usual.probabilities(range(7)),
        "model": usual.model_state(),
        "norms": {type(m).__name__ for m in usual.model.modules() if "BatchNorm" in type(m).__name__},
        "gathered": gathered,
    }
    torch.save(report, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_workers_have_the_same_figures_and_end_with_the_same_model(reports: list[dict[str, Any]]) -> None:
    first = reports[0]
    for report in reports:
        assert report["losses"] == first["losses"] and report["gathered"] == list(range(first["world"]))
        np.testing.assert_array_equal(report["probabilities"], first["probabilities"])
        assert_same(report["model"], first["model"])


def test_a_group_of_gpus_normalises_over_the_whole_batch_and_learns_what_one_learns(
    reports: list[dict[str, Any]],
) -> None:
    report = reports[0]
    if report["device"] == "cuda":
        several = report["world"] > 1
        assert report["norms"] == ({"SyncBatchNorm"} if several else {"BatchNorm1d", "BatchNorm2d"})
        alone = training(SURE)
        assert report["losses"] == pytest.approx([alone.train_epoch() for _ in range(2)], rel=0.05)
    assert report["frozen"] == pytest.approx(training(NO_CHANCE).train_epoch(), rel=0.1)
