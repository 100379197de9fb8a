"""Measures the speed of the training pipeline beside a bare training loop, and what freezing and precision gain.

    python benchmarks/pipeline_share.py

There are four measurements for each truncation depth: an epoch of `lungct_tune.training` on random uint8 images
(shuffled, augmented, normalised, with clipping and learning-rate schedule), a bare loop of forward,
backward and optimizer step on one ready random batch of the same shape and in the same precision, the same epoch with
the whole backbone frozen, and the same epoch in float32. They take turns, so that other load on the machine affects
them equally; the result is their medians. The aim is a share of at least 0.95. It takes about 5 minutes on 2 CPU cores.
On a GPU, add `--steps 50`.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.models.preprocessing import training_precision_for
from lungct_tune.models.truncated_resnet import TruncatedResNet50
from lungct_tune.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    parser = argparse.ArgumentParser(description="The training pipeline's speed beside a bare loop's.")
    parser.add_argument("--cuts", type=int, nargs="+", default=[10, 20, 22, 49], help="truncation depths")
    parser.add_argument("--px", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=16, help="images of a step")
    parser.add_argument("--steps", type=int, default=2, help="steps of an epoch")
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each kind, after one to warm up")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    print(f"{args.px} px, batch {args.batch}, {args.steps} steps, median of {args.repeats}; {device}; images/s")
    print(" cut   bare  pipeline  share  all frozen  speed-up  float32  slower")
    for cut in args.cuts:
        shape = args.px, args.batch, args.steps
        epochs = [
            bare_loop(cut, *shape, device),
            pipeline(cut, 0.0, *shape, args.repeats + 1, device),
            pipeline(cut, 1.0, *shape, args.repeats + 1, device),
            pipeline(cut, 0.0, *shape, args.repeats + 1, device, precision=torch.float32),
        ]
        bare, whole, frozen, float32 = (args.batch * args.steps / s for s in median_seconds(epochs, args.repeats))
        print(
            f"{cut:4} {bare:6.1f} {whole:9.1f} {whole / bare:6.2f} {frozen:11.1f} {frozen / whole:9.1f} {float32:8.1f} "
            f"{whole / float32:7.1f}",
            flush=True,
        )


def median_seconds(epochs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each kind of epoch. The kinds take turns; the first round only warms up."""
    rounds = [[seconds(epoch) for epoch in epochs] for _ in range(repeats + 1)]
    return [median(times) for times in zip(*rounds[1:], strict=True)]


def seconds(epoch: Callable[[], object]) -> float:
    start = perf_counter()
    epoch()
    return perf_counter() - start


def pipeline(
    cut: int,
    frozen_share: float,
    px: int,
    batch: int,
    steps: int,
    epochs: int,
    device: torch.device,
    *,
    graphed: bool = True,
    precision: torch.dtype | None = None,
) -> Callable[[], object]:
    """An epoch of the real training, with the published augmentation.

    Args:
        graphed: on a GPU, run steps as CUDA graphs.
        precision: what the backbone computes in, if it is not what the program chooses.
    """
    n = batch * steps
    trainer = Trainer(
        Hyperparameters(truncation_depth=cut, frozen_share=frozen_share),
        images_NHW=torch.randint(256, (n, px, px), dtype=torch.uint8, device=device),
        labels_N=torch.arange(n) % 4,
        train_indices=range(n),
        classes=4,
        epochs=epochs,
        batch_size=batch,
        seed=0,
        normalisation="imagenet",
        backbone_state=None,
        device=device,
    )
    trainer.precision = precision or trainer.precision
    if not graphed:
        trainer._step = trainer._train_step
    return trainer.train_epoch


def bare_loop(cut: int, px: int, batch: int, steps: int, device: torch.device) -> Callable[[], object]:
    """The same number of steps of forward, backward and optimizer, on one ready batch."""
    model = TruncatedResNet50(cut).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images_NCHW = torch.randn(batch, 3, px, px, device=device).to(memory_format=torch.channels_last)
    labels_N = torch.arange(batch, device=device) % 4
    precision = training_precision_for(device)

    def epoch() -> float:
        for _ in range(steps):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                loss = F.cross_entropy(model(images_NCHW), labels_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()  # waits for the GPU

    return epoch


if __name__ == "__main__":
    main()
