"""What each part of the training recipe is worth on real images, in grouped cross-validation.

python benchmarks/recipe.py --data DIR --weights FILE --results FILE.jsonl [--only ROW …] [--seeds 0 1] [--size 64]
  [--epochs 12] [--clusters 0] [--device cpu]

Each row of the table is one change, made to the reference, to the reference with mild augmentation, or to the default
of the program. Every model is evaluated on the fold that it was not trained on. All figures are means over the seeds.
In the balanced accuracy and in the mean recall of the three cancers, each group of similar slices counts as one image.
The difference to the reference is paired by image, with a 95 % cluster-bootstrap interval; the rows "default + …" are
compared with the default. Negative log-likelihood and calibration error count each image.
The figures of each training are kept in the results file, so an interrupted run goes on, and rows can be added.

The folds do not divide a group of similar slices. Two slices of one patient that look different can still be in two
folds. With --clusters the images are in so few groups that models are evaluated on images unlike their training images.

The reference is the recipe of commit f89f17a. The loop here is independent of `lungct_tune.training.trainer`, so that
the reference stays what it was while the program's own recipe changes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from recipe_rows import JUDGED, REFERENCE, ROWS, Recipe
from sklearn.cluster import AgglomerativeClustering
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from lungct_tune.data.dataset import ImageSet, read_images
from lungct_tune.data.decode import open_image
from lungct_tune.data.grey import read_grey
from lungct_tune.data.groups import join_groups, unit_vectors
from lungct_tune.data.split import fold_images
from lungct_tune.evaluation.bootstrap import ClusterBootstrap, group_weights
from lungct_tune.evaluation.metrics import NORMAL
from lungct_tune.models.preprocessing import as_grey, forward, training_precision_for
from lungct_tune.models.pretrained import load_backbone, read_weights
from lungct_tune.models.truncated_resnet import TruncatedResNet50
from lungct_tune.training.trainer import schedule

FOLDS, BINS = 4, 15


def square(path: Path, size: int, geometry: str) -> np.ndarray:
    """A grey image of a file, uint8 (size, size)."""
    grey = read_grey(open_image(path)).image
    if geometry == "squash":
        return np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR))
    if geometry == "body":
        bright_HW = np.asarray(grey) > 40
        rows, columns = np.flatnonzero(bright_HW.mean(axis=1) > 0.05), np.flatnonzero(bright_HW.mean(axis=0) > 0.05)
        if len(rows) and len(columns):
            grey = grey.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    scale = size / max(grey.size)
    small = grey.resize([max(1, round(side * scale)) for side in grey.size], Image.Resampling.BILINEAR)
    padded = Image.new("L", (size, size))
    padded.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return np.asarray(padded)


def augmented(grey_N1HW: Tensor, recipe: Recipe, generator: Generator) -> Tensor:
    """A batch of grey images (N, 1, H, W), 0 to 1, each turned, zoomed, flipped and shifted by values of its own."""
    turn, zoom, flip, right, down = torch.rand(5, len(grey_N1HW), generator=generator).to(grey_N1HW.device)
    angle = (2 * turn - 1) * math.radians(recipe.rotation)
    scale = 1 / (1 + (2 * zoom - 1) * recipe.zoom)
    mirror = torch.where(flip < recipe.flip, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    right, down = (2 * right - 1) * 2 * recipe.shift, (2 * down - 1) * 2 * recipe.shift
    matrices_N23 = torch.stack(
        [torch.stack([mirror * cos, -mirror * sin, right], dim=1), torch.stack([sin, cos, down], dim=1)], dim=1
    )
    grid = F.affine_grid(matrices_N23, list(grey_N1HW.shape), align_corners=False)
    grey_N1HW = F.grid_sample(grey_N1HW, grid, padding_mode="zeros", align_corners=False)
    if recipe.intensity:
        changes = (2 * torch.rand(3, len(grey_N1HW), 1, 1, 1, generator=generator) - 1) * recipe.intensity
        gamma, gain, offset = changes.to(grey_N1HW.device)
        grey_N1HW = (grey_N1HW.clamp(min=1e-6) ** gamma.exp() * gain.exp() + offset / 3).clamp(0, 1)
    if recipe.noise:
        grey_N1HW = grey_N1HW + recipe.noise * torch.randn_like(grey_N1HW)
    return grey_N1HW


def loss_of(logits_NC: Tensor, target_NC: Tensor, counts_C: Tensor, recipe: Recipe) -> Tensor:
    """The mean loss of a batch, for targets (N, C) that are shares of the classes."""
    smooth_NC = target_NC * (1 - recipe.smoothing) + recipe.smoothing / target_NC.shape[1]
    weights_C = counts_C.sum() / (counts_C * len(counts_C)) if recipe.weighted else torch.ones_like(counts_C)
    return (-logits_NC.log_softmax(dim=1) * smooth_NC * weights_C).sum(dim=1).mean()


def stages(model: TruncatedResNet50) -> Iterator[tuple[int, nn.Parameter]]:
    """The backbone's parameters, with how many stages lie behind each."""
    names = [name.split(".")[0] for name, _ in model.backbone.named_parameters()]
    order = list(dict.fromkeys(name if name.startswith("layer") else "stem" for name in names))
    for name, (_, parameter) in zip(names, model.backbone.named_parameters(), strict=True):
        yield len(order) - 1 - order.index(name if name.startswith("layer") else "stem"), parameter


def optimizer_of(model: TruncatedResNet50, recipe: Recipe) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = [
        {"params": [p], "peak": recipe.backbone_lr * recipe.decay_by_stage**behind, "backbone": True}
        for behind, p in stages(model)
    ] + [{"params": [p], "peak": recipe.head_lr, "backbone": False} for p in model.head.parameters()]
    groups = [group for group in groups if group["params"][0].requires_grad]
    for group in groups:
        group["weight_decay"] = recipe.weight_decay if group["params"][0].ndim > 1 else 0.0
    return torch.optim.AdamW(groups)


def train(
    recipe: Recipe, grey_N1HW: Tensor, labels_N: Tensor, train_N: np.ndarray, state: dict[str, Tensor], seed: int
) -> tuple[TruncatedResNet50, nn.Module]:
    """Trains a model; returns it and the average of its weights."""
    torch.manual_seed(seed)
    classes = int(labels_N.max()) + 1
    model = TruncatedResNet50(recipe.depth, recipe.frozen, recipe.dropout, classes, initialise=False)
    load_backbone(model, state)
    model = model.to(grey_N1HW.device).to(memory_format=torch.channels_last)
    optimizer, generator = optimizer_of(model, recipe), Generator().manual_seed(seed)
    averaged = AveragedModel(
        model, avg_fn=lambda mean, value, n: mean + (value - mean) / min(recipe.horizon, int(n) + 2)
    )
    counts_C = labels_N[train_N].bincount(minlength=classes).float()
    steps = len(train_N) // recipe.batch
    precision = torch.float32 if recipe.float32 else training_precision_for(grey_N1HW.device)
    model.train()
    for epoch in range(recipe.epochs):
        order = torch.from_numpy(train_N)[torch.randperm(len(train_N), generator=generator)]
        for step, rows in enumerate(order[: steps * recipe.batch].split(recipe.batch)):
            progress = (epoch * steps + step + 0.5) / (recipe.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(progress) * (progress >= recipe.probe or not group["backbone"])
            images = augmented(grey_N1HW[rows], recipe, generator)
            target_NC = F.one_hot(labels_N[rows], classes).float()
            if recipe.mixup:
                share = float(np.random.default_rng([seed, epoch, step]).beta(recipe.mixup, recipe.mixup))
                images = share * images + (1 - share) * images.flip(0)
                target_NC = share * target_NC + (1 - share) * target_NC.flip(0)
            loss = loss_of(forward(model, images, "unit", precision), target_NC, counts_C, recipe)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([group["params"][0] for group in optimizer.param_groups], 1.0)
            optimizer.step()
            averaged.update_parameters(model)
    return model, averaged.module


@torch.inference_mode()
def estimate_norms(model: nn.Module, grey_N1HW: Tensor) -> nn.Module:
    """A copy whose batch norms have the statistics of these images, each image with the same weight."""
    model = copy.deepcopy(model)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    model.train()
    learning = [norm for norm in norms if norm.training]
    for norm in learning:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    for images in grey_N1HW[: len(grey_N1HW) // 32 * 32].split(32):  # batches of equal size
        forward(model, images, "unit")
    return model


@torch.inference_mode()
def predicted(model: nn.Module, grey_N1HW: Tensor) -> np.ndarray:
    model.eval()
    return torch.cat([forward(model, images, "unit").softmax(dim=1) for images in grey_N1HW.split(128)]).cpu().numpy()


def out_of_fold(
    recipe: Recipe, images: ImageSet, state: dict[str, Tensor], seed: int, device: str
) -> tuple[dict[str, np.ndarray], float]:
    """Probabilities (N, C) for each way to judge, from the models that have not seen the image; and the CPU seconds."""
    paths = [images.root / path for path in images.table["path"]]
    pixels_NHW = np.stack([square(path, recipe.size, recipe.geometry) for path in paths])
    grey_N1HW = as_grey(torch.from_numpy(pixels_NHW).to(device))
    labels_N = torch.tensor(images.table["label"].to_numpy(), device=device)
    fold_N = fold_images(images, np.arange(len(labels_N)), FOLDS, seed)
    found = {judged: np.zeros((len(labels_N), len(images.classes))) for judged in JUDGED}
    began = time.process_time()
    for fold in range(FOLDS):
        train_N, held_N = np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)
        held = grey_N1HW[held_N]
        part_N = fold_images(images, train_N, recipe.models, seed) if recipe.models > 1 else np.ones_like(train_N)
        for part in range(recipe.models):
            used_N = train_N[part_N != part]
            model, averaged = train(recipe, grey_N1HW, labels_N, used_N, state, seed)
            averaged = estimate_norms(averaged, grey_N1HW[used_N])
            found["running"][held_N] += predicted(model, held) / recipe.models
            found["estimated"][held_N] += predicted(estimate_norms(model, grey_N1HW[used_N]), held) / recipe.models
            found["ema"][held_N] += predicted(averaged, held) / recipe.models
            found["ema flips"][held_N] += predicted(averaged, held.flip(3)) / recipe.models
    found["ema flips"] = (found["ema"] + found["ema flips"]) / 2
    return found, time.process_time() - began


def in_clusters(images: ImageSet, clusters: int) -> ImageSet:
    """The images in so few groups: similar ones are together, and their own groups are not divided."""
    linked = AgglomerativeClustering(clusters, metric="cosine", linkage="average")
    group_N = linked.fit_predict(unit_vectors(images.images_NHW))
    return replace(images, table=images.table.assign(group=join_groups(group_N, list(images.table["group"]))))


class Results:
    """The trainings of a file: one line of JSON each, with the figures and the right predictions of each judgement."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, dict[str, Any]] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            training = json.loads(line)
            self._known[training["key"]] = training

    def get(self, recipe: Recipe, seed: int) -> Judged | None:
        training = self._known.get(recipe.key(seed))
        return Judged(seconds=training["seconds"], **training[recipe.judged]) if training else None

    def with_and_without_flips(self, clusters: int) -> list[tuple[Judged, Judged]]:
        """All trainings in so many groups that are long enough, and have flips: with flips at test time and without."""
        long_enough = [
            training
            for key, training in self._known.items()
            if (of := {**asdict(REFERENCE), **json.loads(key)})["clusters"] == clusters
            and of["flip"]
            and of["epochs"] >= 24
        ]
        return [
            (Judged(seconds=0, **training["ema flips"]), Judged(seconds=0, **training["ema"]))
            for training in long_enough
        ]

    def add(self, recipe: Recipe, seed: int, judged: dict[str, Judged]) -> None:
        training: dict[str, Any] = {"key": recipe.key(seed)}
        for way, figures in judged.items():
            training[way] = asdict(figures)
            training["seconds"] = training[way].pop("seconds")
        self._known[training["key"]] = training
        with self._file.open("a") as out:
            out.write(json.dumps(training) + "\n")


@dataclass(frozen=True)
class Judged:
    """The figures of a training in one way to judge."""

    balanced_accuracy: float
    nll: float
    ece: float
    right: str
    """The bits of the images that are classified right, as hexadecimal digits."""
    seconds: float

    @classmethod
    def of(cls, labels_N: np.ndarray, probabilities_NC: np.ndarray, seconds: float) -> Judged:
        right_N, top_N = probabilities_NC.argmax(axis=1) == labels_N, probabilities_NC.max(axis=1)
        recall = np.mean([right_N[labels_N == label].mean() for label in np.unique(labels_N)])
        nll = -np.log(np.maximum(probabilities_NC[np.arange(len(labels_N)), labels_N], 1e-4)).mean()
        bin_N = np.minimum((top_N * BINS).astype(int), BINS - 1)  # of equal width
        ece = sum(abs((right_N - top_N)[bin_N == k].sum()) for k in range(BINS)) / len(labels_N)
        accuracy, nll, ece = (round(float(figure), 4) for figure in (recall, nll, ece))
        return cls(accuracy, nll, ece, np.packbits(right_N).tobytes().hex(), round(seconds, 1))

    def right_N(self, n: int) -> np.ndarray:
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.right), np.uint8), count=n).astype(float)


def weighted_mean(values_N: np.ndarray, weight_N: np.ndarray, counts_BN: np.ndarray) -> np.ndarray:
    """Means (B,) over B samples of N images, in which each image is so many times."""
    return np.asarray(counts_BN @ (weight_N * values_N) / (counts_BN @ weight_N))


class Table:
    """Balanced accuracies, and differences paired by image, in which each group of similar slices counts as one image.

    Without that, a few images decide: `normal` has 161 images, but they are only 26 groups, one of 36 images.

    Args:
        groups_N: what the folds do not divide; the bootstrap draws these.
    """

    def __init__(self, images: ImageSet, groups_N: np.ndarray) -> None:
        self._labels_N, normal = images.table["label"].to_numpy(), images.classes.index(NORMAL)
        once_N = group_weights(images.table["group"].to_numpy())
        self._weight_N = once_N / np.bincount(self._labels_N, once_N)[self._labels_N]
        self._cancers_N = self._weight_N * (self._labels_N != normal)
        self._bootstrap = ClusterBootstrap(groups_N)

    def print(self, rows: dict[str, Recipe], results: Results, seeds: list[int]) -> None:
        """Prints a row for each recipe of which the results have a training and one of what it is compared with."""
        figures = ("balanced accuracy", "difference, 95 %", "recall of cancers", "difference, 95 %")
        columns = ("recipe", "seeds", *figures, "NLL", "ECE", "time")
        print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for name, recipe in rows.items():
            reference = rows["default" if name.startswith("default + ") else "f89f17a"]
            found = [(results.get(recipe, seed), results.get(reference, seed)) for seed in seeds]
            if not (both := [(row, old) for row, old in found if row and old]):
                continue
            nll, ece = np.mean([(row.nll, row.ece) for row, _ in both], axis=0)
            seconds = both[0][0].seconds / both[0][1].seconds  # of one session: they depend on the number of threads
            all_classes, cancers = (self._figures(both, weight_N) for weight_N in (self._weight_N, self._cancers_N))
            print(f"| {name} | {len(both)} | {all_classes} | {cancers} | {nll:.3f} | {ece:.3f} | {seconds:.2f} |")

    def print_flips(self, both: list[tuple[Judged, Judged]]) -> None:
        """Prints what flips at test time are worth over all these trainings, each with them and without."""
        if both:
            lower = sum(flipped.nll < plain.nll for flipped, plain in both)
            print(f"\nflips at test time, {len(both)} trainings of at least 24 epochs: NLL is lower in {lower}")
            for what, weight_N in (("balanced accuracy", self._weight_N), ("recall of cancers", self._cancers_N)):
                print(f"{what}: {self._figures(both, weight_N)}")

    def _figures(self, both: list[tuple[Judged, Judged]], weight_N: np.ndarray) -> str:
        """The mean recall of the classes that have a weight, and what it is above that of the reference: two cells."""
        n = len(weight_N)
        right_N = np.mean([row.right_N(n) for row, _ in both], axis=0)
        better_N = right_N - np.mean([old.right_N(n) for _, old in both], axis=0)
        effective = self._bootstrap.effective(self._bootstrap.everything_N)
        gain = self._bootstrap.figure(partial(weighted_mean, better_N, weight_N), effective)
        interval = f"{gain.value:+.3f} ({gain.ci95[0]:+.3f} to {gain.ci95[1]:+.3f})" if gain.ci95 else ""
        return f"{np.average(right_N, weights=weight_N):.3f} | {interval}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True, help="they must cover the rows' depths")
    parser.add_argument("--results", type=Path, required=True, help="a file of JSON lines; it is continued")
    parser.add_argument("--only", nargs="*", default=list(ROWS), help="names of rows; none prints the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--size", type=int, default=REFERENCE.size, help="pixels, for every row that names none")
    parser.add_argument("--epochs", type=int, default=REFERENCE.epochs, help="the same")
    parser.add_argument("--clusters", type=int, default=0, help="groups for the folds; 0: of similar slices (0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    images, state = read_images(asked.data, REFERENCE.size), read_weights(asked.weights)
    folded = in_clusters(images, asked.clusters) if asked.clusters else images
    common = {"size": asked.size, "epochs": asked.epochs, "clusters": asked.clusters}
    rows = {
        name: replace(row, **{key: n for key, n in common.items() if getattr(row, key) == getattr(REFERENCE, key)})
        for name, row in ROWS.items()
    }
    results, labels_N = Results(asked.results), images.table["label"].to_numpy()
    for seed in asked.seeds:
        for name in asked.only:
            if results.get(rows[name], seed) is None:
                found, seconds = out_of_fold(rows[name], folded, state, seed, asked.device)
                judged = {way: Judged.of(labels_N, found_NC, seconds) for way, found_NC in found.items()}
                results.add(rows[name], seed, judged)
                print(f"{name}, seed {seed}: {judged[rows[name].judged]}", flush=True)
    table = Table(images, folded.table["group"].to_numpy())
    table.print(rows, results, asked.seeds)
    table.print_flips(results.with_and_without_flips(asked.clusters))


if __name__ == "__main__":
    main()
