"""Compares two ways to train two folds on two workers: one fold per worker, or both workers on one fold at a time.

python benchmarks/folds.py [--depth 20] [--size 64] [--repeats 3]

The workers are processes of a Gloo group with one thread each, as in a slot. The two ways take turns; the result is
their medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import spawn

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.training.trainer import Trainer

WORKERS, IMAGES, BATCH = 2, 160, 16


def worker(rank: int, asked: argparse.Namespace, timings: multiprocessing.SimpleQueue[tuple[str, float]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    random = np.random.default_rng(0)
    images_NHW = torch.from_numpy(random.integers(0, 256, (IMAGES, asked.size, asked.size), dtype=np.uint8))

    def training(alone: bool) -> Trainer:
        return Trainer(
            Hyperparameters(truncation_depth=asked.depth),
            images_NHW=images_NHW,
            labels_N=torch.from_numpy(random.integers(0, 4, IMAGES)),
            train_indices=range(IMAGES),
            classes=4,
            epochs=asked.repeats + 1,
            batch_size=BATCH,
            seed=0,
            normalisation="unit",
            backbone_state=None,
            device="cpu",
            alone=alone,
        )

    own, both = training(alone=True), [training(alone=False) for _ in range(WORKERS)]
    for repeat in range(asked.repeats + 1):
        for way, trainings in (("alone", [own]), ("together", both)):
            dist.barrier()
            began = time.perf_counter()
            for one in trainings:
                one.train_epoch()
            dist.barrier()
            if rank == 0 and repeat:  # the first epoch warms up
                timings.put((way, time.perf_counter() - began))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29507"}
    timings: multiprocessing.SimpleQueue[tuple[str, float]] = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(worker, args=(asked, timings), nprocs=WORKERS)
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    while not timings.empty():
        way, took = timings.get()
        seconds[way].append(took)
    alone, together = (statistics.median(seconds[way]) for way in ("alone", "together"))
    print(f"an epoch of two folds, depth {asked.depth}, {IMAGES} images of {asked.size} pixels, batch {BATCH}:")
    print(f"  a fold a worker          {alone:.2f} s")
    print(f"  one after another, both  {together:.2f} s  ({together / alone:.2f} times as long)")


if __name__ == "__main__":
    main()
