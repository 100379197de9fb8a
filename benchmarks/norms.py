"""What batch-norm statistics from fewer images save, and how far the figures of validation change.

    python benchmarks/norms.py --data DIR --weights FILE [--size 64] [--depth 22] [--epochs 12]

After an epoch at which no trial can be stopped, `Trainer.probabilities(rough=True)` estimates them from 64 images
instead of 256. Epochs of one training take turns: a rough one, and one as before. Seconds are CPU seconds of a thread.
Then each epoch's balanced accuracy with statistics from several numbers of images is compared with that from 512.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.data.dataset import read_images
from lungct_tune.data.split import fold_images
from lungct_tune.models.pretrained import read_weights
from lungct_tune.training import trainer as training
from lungct_tune.training.objective import OBJECTIVE, validation_figures

NUMBERS = (64, 128, 256, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True, help="they must cover the depth")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--depth", type=int, default=22)
    parser.add_argument("--epochs", type=int, default=12, help="of each kind")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    images = read_images(asked.data, asked.size)
    labels_N = torch.tensor(images.table["label"].to_numpy())
    fold_N = fold_images(images, np.arange(len(labels_N)), 5, 0)
    valid = np.flatnonzero(fold_N == 0)
    trainer = training.Trainer(
        Hyperparameters(truncation_depth=asked.depth, rotation=15.0, zoom=0.1, shift=0.05),
        images_NHW=torch.from_numpy(images.images_NHW.copy()),
        labels_N=labels_N,
        train_indices=np.flatnonzero(fold_N != 0),
        classes=len(images.classes),
        epochs=2 * asked.epochs + 1,
        batch_size=32,
        seed=0,
        normalisation="unit",
        backbone_state=read_weights(asked.weights),
        device="cpu",
    )
    seconds: dict[bool, list[float]] = {True: [], False: []}
    scores_EK = []
    for epoch in range(2 * asked.epochs):
        rough, began = epoch % 2 == 0, time.process_time()
        trainer.train_epoch()
        trainer.probabilities(valid, rough=rough)
        seconds[rough].append(time.process_time() - began)
        scores_EK.append([score(trainer, valid, labels_N, number) for number in NUMBERS])
    ratios = np.array(seconds[False]) / np.array(seconds[True])
    print(
        f"an epoch: {np.median(seconds[False]):.2f} s, rough {np.median(seconds[True]):.2f} s; times faster "
        f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
    )
    differences_EK = np.array(scores_EK) - np.array(scores_EK)[:, -1:]
    for number, spread in zip(NUMBERS[:-1], differences_EK.std(axis=0), strict=False):
        print(f"balanced accuracy with {number} images: standard deviation {spread:.3f} from that with {NUMBERS[-1]}")


def score(trainer: training.Trainer, valid: np.ndarray, labels_N: torch.Tensor, number: int) -> float:
    """Balanced accuracy with statistics from so many images."""
    usual, training.IMAGES_FOR_NORMS = training.IMAGES_FOR_NORMS, (number, number, number)
    trainer._norms_of = (-1, 0)
    try:
        return validation_figures(labels_N[valid].numpy(), trainer.probabilities(valid))[OBJECTIVE]
    finally:
        training.IMAGES_FOR_NORMS = usual


if __name__ == "__main__":
    main()
