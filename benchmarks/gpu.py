"""Measures how much of a GPU the program uses: the training loop, several trials on one GPU, and a whole search.

    python benchmarks/gpu.py                                     everything, under ten minutes on an H100
    python benchmarks/gpu.py --data DIR --weights FILE           the search on these images and weights
    python benchmarks/gpu.py --device cpu --quick                tiny sizes, to try the script itself

It needs no network: without --data the search draws phantoms, and starts from random weights. Each part prints its
table when it is done:

- loop: images a second of a bare loop (forward, backward and optimizer step on one batch that is ready on the GPU), of
  an epoch of `lungct_tune.training` whose steps are launched kernel by kernel, and of one whose steps are CUDA graphs,
  as they are in use; the last two also as shares of the first. They take turns; medians.
- slots: images a second of 1, 2 and 4 processes that train on the same GPU at the same time, as slots with
  `--gpus-per-worker 0.25` do. Start NVIDIA MPS before, and it measures that.
- validation: milliseconds of an epoch of 480 images, of estimating the batch-norm statistics, and of predicting 100.
- folds: memory that PyTorch reserves for one model, and for the five models of a trial with folds.
- search: a whole search as a user starts it; its time, the share of the slots' time that was inside epochs, and the
  seconds between two epochs of a trial that were in neither training nor validation.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.multiprocessing as mp
from pipeline_share import bare_loop, median_seconds, pipeline

from lungct_tune.config.settings import SPACES
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.results import read_results
from lungct_tune.models.preprocessing import precision_for

if TYPE_CHECKING:
    from lungct_tune.experiment.trial import TrialRecord
    from lungct_tune.training.trainer import Trainer

PARTS = ("loop", "slots", "validation", "folds", "search")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    depths: tuple[int, ...] = (10, 20, 22, 49)
    batches: tuple[int, ...] = (32, 128, 256)
    px: int = 224
    images: int = 1280
    """Images of an epoch of the loop."""
    repeats: int = 3
    together: tuple[int, ...] = (1, 2, 4)
    """Processes on one GPU."""
    slots_s: float = 2.0
    """Seconds for which each number of processes trains at each depth."""
    trials: int = 64
    epochs: int = 30
    slots: int = 4
    search_px: int = 224


QUICK = Sizes((1, 5), (8, 16), 32, 32, 1, (1, 2), 0.5, 4, 3, 2, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", help="images for the search (phantoms)")
    parser.add_argument("--weights", help="weights for the search (random)")
    chosen = parser.parse_args()
    device, sizes = torch.device(chosen.device), QUICK if chosen.quick else Sizes()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}; torch {torch.__version__}, {precision_for(device)}", flush=True)
    began = time.perf_counter()
    if "loop" in chosen.parts:
        measure_loop(sizes, device)
    if "slots" in chosen.parts:
        measure_slots(sizes, device)
    if "validation" in chosen.parts:
        measure_validation(sizes, device)
    if "folds" in chosen.parts and device.type == "cuda":
        measure_folds(sizes, device)
    if "search" in chosen.parts:
        measure_search(sizes, device, chosen.data, chosen.weights)
    print(f"all of it: {time.perf_counter() - began:.0f} s")


def measure_loop(sizes: Sizes, device: torch.device) -> None:
    print(f"\nThe loop: {sizes.px} pixels, images a second, median of {sizes.repeats}")
    print("| depth | batch | bare loop | no graph | share | pipeline | share |\n|---|---|---|---|---|---|---|")
    for depth in sizes.depths:
        for batch in sizes.batches:
            steps = max(2, sizes.images // batch)
            epochs = [
                bare_loop(depth, sizes.px, batch, steps, device),
                pipeline(depth, 0.0, sizes.px, batch, steps, sizes.repeats + 1, device, graphed=False),
                pipeline(depth, 0.0, sizes.px, batch, steps, sizes.repeats + 1, device),
            ]
            bare, eager, ours = (batch * steps / seconds for seconds in median_seconds(epochs, sizes.repeats))
            shares = f"{eager:.0f} | {eager / bare:.2f} | {ours:.0f} | {ours / bare:.2f}"
            print(f"| {depth} | {batch} | {bare:.0f} | {shares} |", flush=True)
            del epochs
            free_memory(device)


def free_memory(device: torch.device) -> None:
    gc.collect()  # a trainer is a reference cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_slots(sizes: Sizes, device: torch.device) -> None:
    batch = sizes.batches[0]
    print(f"\nSeveral slots on one device: {sizes.px} pixels, batch {batch}, images a second of all together")
    print("| depth | " + " | ".join(f"{n} at once" for n in sizes.together) + " |")
    print("|---" * (1 + len(sizes.together)) + "|")
    speeds = {n: speeds_together(n, batch, sizes, device) for n in sizes.together}
    for depth in sizes.depths:
        print(f"| {depth} | " + " | ".join(f"{speeds[n][depth]:.0f}" for n in sizes.together) + " |", flush=True)


def speeds_together(processes: int, batch: int, sizes: Sizes, device: torch.device) -> dict[int, float]:
    """Images a second of so many processes together, by depth."""
    context = mp.get_context("spawn")  # CUDA does not survive a fork
    barrier, results = context.Barrier(processes), context.Queue()
    arguments = (batch, sizes, str(device), barrier, results)
    running = [context.Process(target=train_beside_others, args=arguments) for _ in range(processes)]
    for process in running:
        process.start()
    everyones = [results.get(timeout=600) for _ in running]
    for process in running:
        process.join()
    return {depth: sum(one[depth] for one in everyones) for depth in sizes.depths}


def train_beside_others(batch: int, sizes: Sizes, device: str, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)  # as in a slot with one CPU
    steps = max(2, sizes.images // batch // 8)
    speeds = {}
    for depth in sizes.depths:
        epoch = pipeline(depth, 0.0, sizes.px, batch, steps, 1_000_000, torch.device(device))
        epoch()  # to warm up
        barrier.wait(timeout=600)
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < sizes.slots_s:
            epoch()
            images += batch * steps
        speeds[depth] = images / (time.perf_counter() - began)
    results.put(speeds)


def measure_validation(sizes: Sizes, device: torch.device) -> None:
    batch, epochs = sizes.batches[0], sizes.repeats + 1
    print(f"\nTraining and validation: {sizes.px} pixels, batch {batch}, milliseconds, median of {sizes.repeats}")
    print("| depth | training | norms | predicting |\n|---|---|---|---|")
    for depth in sizes.depths:
        train = pipeline(depth, 0.0, sizes.px, batch, 480 // batch, epochs, device)
        trainer: Trainer = train.__self__  # type: ignore[attr-defined]
        rounds = []
        for _ in range(epochs):  # norms are estimated for the first prediction after an epoch
            moments = [time.perf_counter()]
            for part in (train, partial(trainer.probabilities, range(1)), partial(trainer.probabilities, range(100))):
                part()
                moments.append(time.perf_counter())
            rounds.append(np.diff(moments))
        train_s, norms_s, predict_s = np.median(rounds[1:], axis=0)
        print(f"| {depth} | {1e3 * train_s:.0f} | {1e3 * norms_s:.0f} | {1e3 * predict_s:.0f} |", flush=True)
        del train, trainer, part
        free_memory(device)


def measure_folds(sizes: Sizes, device: torch.device) -> None:
    print(f"\nMemory that is reserved, in GiB: {sizes.px} pixels")
    print("| depth | batch | one model | five folds |\n|---|---|---|---|")
    for depth, batch in product(sizes.depths[-2:], sizes.batches[:2]):
        reserved = []
        for folds in (1, 5):
            free_memory(device)
            before = torch.cuda.memory_reserved(device)
            epochs = [pipeline(depth, 0.0, sizes.px, batch, 5, 2, device) for _ in range(folds)]
            for epoch in epochs * 2:
                epoch()
            free_memory(device)
            reserved.append((torch.cuda.memory_reserved(device) - before) / 2**30)
            del epoch, epochs
        print(f"| {depth} | {batch} | {reserved[0]:.1f} | {reserved[1]:.1f} |", flush=True)


def measure_search(sizes: Sizes, device: torch.device, data: str | None, weights: str | None) -> None:
    gpus = 1 / sizes.slots if device.type == "cuda" else 0
    print(f"\nA search: {sizes.trials} trials of at most {sizes.epochs} epochs, {sizes.slots} slots", flush=True)
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-m", "lungct_tune.search", "--storage", storage, "--name", "benchmark"]
        command += ["--trials", str(sizes.trials), "--epochs", str(sizes.epochs), "--image-size", str(sizes.search_px)]
        command += ["--slots", str(sizes.slots), "--gpus-per-worker", str(gpus), "--weights", weights or "none"]
        if data:
            command += ["--data", data]
        if weights:
            command += ["--space", str(SPACES / "shallow.yaml"), "--normalisation", "unit"]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wall_s = time.perf_counter() - began
        if done.returncode != 0:
            sys.exit(f"the search ended with {done.returncode}:\n{done.stdout}")
        found = read_results(Experiment.at(storage, "benchmark"))
    inside_s = sum(trial.seconds for trial in found.trials)
    epochs = sum(len(trial.history) for trial in found.trials)
    between = gaps(found.trials)
    print("| | |\n|---|---|")
    print(f"| from command to bundle | {wall_s:.0f} s |")
    print(f"| the search alone | {found.study['wall_s']:.0f} s |")
    print(f"| trials, epochs | {found.done}, {epochs} |")
    print(f"| share of the slots' time inside epochs | {inside_s / found.study['slot_s']:.2f} |")
    print(f"| median epoch, with validation | {np.median(epoch_seconds(found.trials)):.3f} s |")
    if between:
        middle, most = np.percentile(between, [50, 95])
        print(
            f"| between two epochs of a trial: median, 95th percentile | {1e3 * middle:.0f} ms, {1e3 * most:.0f} ms |"
        )


def epoch_seconds(trials: list[TrialRecord]) -> list[float]:
    return [epoch.train_s + epoch.valid_s for trial in trials for epoch in trial.history]


def gaps(trials: list[TrialRecord]) -> list[float]:
    """Seconds from the end of an epoch to the start of the next one of the same trial."""
    return [
        after.at - before.at - after.train_s - after.valid_s
        for trial in trials
        for before, after in pairwise(trial.history)
        if before.at is not None and after.at is not None
    ]


if __name__ == "__main__":
    main()
