"""Whether the winner's validation metric holds for images that its search never saw: nested cross-validation.

    python benchmarks/nested.py --data chest-ctscan --storage nested -- --image-size 64 --trials 6 --epochs 16

The images are divided into 5 parts, without dividing a group. For each part a search runs on the other four with
--folds 5, and its final model is evaluated on this part. So every image is a test image once, and the test result of
all five is less uncertain than that of one split. Every search gets the arguments after `--`. One that has ended in
the storage is not run again, and one that was stopped is continued.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import sem, t

from lungct_tune.data.dataset import read_images
from lungct_tune.data.split import fold_images
from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.experiment.predictions import Predictions, read_predictions
from lungct_tune.experiment.trial import BASELINE
from lungct_tune.search import main as search
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.retrain import PREDICTIONS

PARTS = 5


def searched(folder: Path, data: str, split: pd.DataFrame, arguments: list[str]) -> Path:
    """The bundle of a search with this split. `folder` is that of the search."""
    if (folder / "best" / "metrics.json").exists():
        return folder / "best"
    storage = ["--storage", str(folder.parent)]
    if (folder / "settings.yaml").exists():
        failed = search(["--resume", folder.name, *storage])
    else:
        file = folder.parent / f"{folder.name}.csv"
        split.to_csv(file, index=False)
        own = ["--name", folder.name, "--data", data, "--split-file", str(file), "--folds", str(PARTS)]
        failed = search([*storage, *own, "--compare-baseline", *arguments])
    if failed:
        raise SystemExit(f"the search in {folder} failed")
    return folder / "best"


def published_predictions(bundle: Path, winner: Predictions) -> np.ndarray:
    """The classes that the retrained published configuration predicts for the test images, (N,)."""
    files = list(bundle.parent.glob(f"final/trial_{BASELINE:04d}_*/{PREDICTIONS}"))
    return np.asarray(np.load(files[0]).argmax(axis=1)) if files else winner.predicted_N


def figures(tested: Sequence[Predictions], published: Sequence[np.ndarray]) -> str:
    """Balanced accuracy on these test images, and what it is above the published configuration's, as two cells."""
    labels_N, probabilities_NC, groups_N = (
        np.concatenate([getattr(part, name) for part in tested])
        for name in ("labels_N", "probabilities_NC", "groups_N")
    )
    test = evaluate_predictions(
        labels_N,
        probabilities_NC,
        tested[0].classes,
        groups_N,
        references={"published": ("published", np.concatenate(published))},
    )
    return " | ".join(
        f"{figure.value:{sign}.3f} ({figure.ci95[0]:{sign}.3f} to {figure.ci95[1]:{sign}.3f})"
        for figure, sign in ((test.balanced_accuracy, ""), (test.references["published"].balanced_difference, "+"))
        if figure is not None and figure.ci95 is not None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--storage", type=Path, required=True, help="folder for the searches")
    parser.add_argument("more", nargs="*", help="for every search")
    asked = parser.parse_args()
    asked.storage.mkdir(parents=True, exist_ok=True)
    images = read_images(Path(asked.data), 64)
    part_N = fold_images(images, np.arange(len(images.table)), PARTS, seed=0)
    print("| part | depth | validation | test | minus published, on test |\n|---|---|---|---|---|")
    validation, tested, published, above = [], [], [], []
    for part in range(PARTS):
        rest = np.where(part_N == (part + 1) % PARTS, "valid", "train")  # with folds, these two are one
        split = images.table[["path"]].assign(split=np.where(part_N == part, "test", rest))
        bundle = searched(asked.storage / f"part-{part}", asked.data, split, asked.more)
        metrics = json.loads((bundle / "metrics.json").read_text())
        classes = json.loads((bundle / "config.json").read_text())["classes"]
        tested.append(read_predictions((bundle / "predictions.csv").read_bytes(), classes))
        published.append(published_predictions(bundle, tested[-1]))
        validation.append(metrics["best_trial"][OBJECTIVE])
        above.append(metrics["test"][OBJECTIVE]["value"] - validation[-1])
        print(
            f"| {part} | {metrics['best_trial']['truncation_depth']} | {validation[-1]:.3f} "
            f"| {figures([tested[-1]], [published[-1]])} |",
            flush=True,
        )
    print(f"| all | | {statistics.mean(validation):.3f} | {figures(tested, published)} |")
    low, high = t.interval(0.95, PARTS - 1, np.mean(above), sem(above))
    print(f"\ntest is {np.mean(above):+.3f} above validation ({low:+.3f} to {high:+.3f}, Student's t over the parts)")


if __name__ == "__main__":
    main()
