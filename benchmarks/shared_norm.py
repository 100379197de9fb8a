"""What batch norm over the workers of a group costs on CPUs: now, and by all-reduces that autograd derives.

    python benchmarks/shared_norm.py [--depth 22] [--epochs 8]

Two processes share the batches of one training. Its epochs take turns: one with `SharedBatchNorm`, one with the way
before. Prints the medians, and how many times as fast an epoch is now.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.multiprocessing.spawn import spawn

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.training.shared_norm import SharedBatchNorm
from lungct_tune.training.trainer import Trainer

WORKERS, STEPS = 2, 6
SIZES = ((32, 8), (48, 32), (128, 32))  # pixels, batch size


class Before(SharedBatchNorm):
    """Mean and variance by an all-reduce each, and autograd's two in the backward pass."""

    def forward(self, features_NC: Tensor) -> Tensor:
        if not self.training:
            return super().forward(features_NC)
        dtype, features_NC = features_NC.dtype, features_NC.float()
        others = [0, *range(2, features_NC.ndim)]
        mean_C = all_reduce(features_NC.mean(others, keepdim=True).contiguous()) / WORKERS
        centred_NC = features_NC - mean_C
        variance_C = all_reduce(centred_NC.square().mean(others, keepdim=True).contiguous()) / WORKERS
        scale_C = self.weight.view(mean_C.shape) * torch.rsqrt(variance_C + self.eps)
        return torch.addcmul(self.bias.view(mean_C.shape), centred_NC, scale_C).to(dtype)


def work(rank: int, rendezvous: str, depth: int, epochs: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    for size, batch in SIZES:
        seconds = measured(size, batch, depth, epochs)
        if rank == 0:
            now, before = (median(seconds[kind]) for kind in (SharedBatchNorm, Before))
            ratios = sorted(b / n for b, n in zip(seconds[Before], seconds[SharedBatchNorm], strict=True))
            faster = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {size} | {batch} | {1000 * before:.0f} ms | {1000 * now:.0f} ms | {faster} |", flush=True)
    dist.destroy_process_group()


def measured(size: int, batch: int, depth: int, epochs: int) -> dict[type, list[float]]:
    """Seconds of a step, of each kind of norm, for each pair of epochs."""
    random, images = np.random.default_rng(0), STEPS * batch
    trainer = Trainer(
        Hyperparameters(truncation_depth=depth),
        images_NHW=torch.from_numpy(random.integers(0, 255, (images, size, size), np.uint8)),
        labels_N=torch.from_numpy(random.integers(0, 4, images)),
        train_indices=range(images),
        classes=4,
        epochs=2 * epochs + 1,
        batch_size=batch,
        seed=0,
        normalisation="unit",
        backbone_state=None,
        device="cpu",
    )
    norms = [module for module in trainer.model.modules() if isinstance(module, SharedBatchNorm)]
    trainer.train_epoch()
    seconds: dict[type, list[float]] = {SharedBatchNorm: [], Before: []}
    for epoch in range(2 * epochs):
        kind = (SharedBatchNorm, Before)[epoch % 2]
        for norm in norms:
            norm.__class__ = kind
        dist.barrier()
        began = time.perf_counter()
        trainer.train_epoch()
        seconds[kind].append((time.perf_counter() - began) / STEPS)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=22)
    parser.add_argument("--epochs", type=int, default=8, help="of each kind")
    asked = parser.parse_args()
    print("| pixels | batch | a step, before | now | times as fast |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(f"{folder}/rendezvous", asked.depth, asked.epochs), nprocs=WORKERS)


if __name__ == "__main__":
    main()
