"""Whether models are worse on images that look less like their training images.

    python benchmarks/likeness.py --data DIR [--results benchmarks/recipe.jsonl]

It takes the trainings of benchmarks/recipe.py from their file. Each image was predicted by the model of the folds that
it is not in. Its likeness is the correlation with the most similar image of these folds, at 32 by 32 pixels, as in
`by_likeness` of a bundle's metrics.json. The table has the balanced accuracy on both halves of each class.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from recipe import FOLDS, Results, in_clusters
from recipe_rows import REFERENCE, ROWS, Recipe

from lungct_tune.auditing.shortcuts import most_similar
from lungct_tune.data.dataset import ImageSet, read_images
from lungct_tune.data.split import fold_images
from lungct_tune.evaluation.metrics import evaluate_predictions

CLUSTERS = 60
"""For the folds of images that look unlike each other; see benchmarks/recipe.py."""


def row(images: ImageSet, recipe: Recipe, results: Results, seed: int) -> str:
    """The figures of a training; "" if the file does not have it."""
    if (judged := results.get(recipe, seed)) is None:
        return ""
    labels_N, groups_N = (images.table[column].to_numpy() for column in ("label", "group"))
    classes, everything = len(images.classes), np.arange(len(labels_N))
    # which wrong class was predicted was not kept, and does not matter
    predicted_N = np.where(judged.right_N(len(labels_N)) == 1, labels_N, (labels_N + 1) % classes)
    fold_N, similarity_N = fold_images(images, everything, FOLDS, seed), np.zeros(len(labels_N))
    for fold in range(FOLDS):
        held, known = np.flatnonzero(fold_N == fold), np.flatnonzero(fold_N != fold)
        similarity_N[held] = most_similar(images, held, known)[0]
    test = evaluate_predictions(
        labels_N, np.eye(classes)[predicted_N], images.classes, groups_N, similarity_N=similarity_N
    )
    assert test.by_likeness is not None
    least, most = test.by_likeness.least, test.by_likeness.most
    (low, high), (worst, best) = (half.balanced_accuracy.ci95 or (0, 0) for half in (least, most))
    return (
        f"{test.balanced_accuracy.value:.3f} | {least.balanced_accuracy.value:.3f} ({low:.3f} to {high:.3f}) "
        f"| {most.balanced_accuracy.value:.3f} ({worst:.3f} to {best:.3f}) "
        f"| {least.similarity:.2f}, {most.similarity:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "recipe.jsonl")
    asked = parser.parse_args()
    images, results = read_images(asked.data, REFERENCE.size), Results(asked.results)
    print("| recipe | folds | seed | all images | least similar half | most similar half | median similarity of each |")
    print("|---" * 7 + "|")
    for clusters, folds, of in (
        (0, "similar slices", images),
        (CLUSTERS, "unlike images", in_clusters(images, CLUSTERS)),
    ):
        for name in ("f89f17a", "default", "default + 24 epochs"):
            for seed in (0, 1):
                if figures := row(of, replace(ROWS[name], clusters=clusters), results, seed):
                    print(f"| {name} | {folds} | {seed} | {figures} |")


if __name__ == "__main__":
    main()
