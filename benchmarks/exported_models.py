"""Measures how many images a second an exported model classifies: ONNX in onnxruntime, and PyTorch's two ways.

    python benchmarks/exported_models.py

Networks with random weights, cut at three depths, classify random images of 224 pixels on the CPU: as PyTorch runs the
bundle's model (eager), as a loaded .pt2 file of torch.export, and as an ONNX file in onnxruntime. For each depth,
number of threads and batch size the three take turns, `--repeats` times, so that other work on the machine meets all of
them; the table has the medians. With one thread an image counts by its CPU time, which other work hardly changes; with
more threads by wall time, so that nothing else may run. It takes about 3 minutes on 2 idle CPU cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np
import onnxruntime
import torch

from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.evaluation.exported import INPUT, Graph, export_onnx, export_torch
from lungct_tune.experiment.bundle import CHECKSUMS
from lungct_tune.experiment.model_config import ModelConfig
from lungct_tune.models.truncated_resnet import TruncatedResNet50

BATCHES = (1, 8, 32)
IMAGES = 8
"""Images of a measurement, at least."""

Run = Callable[[np.ndarray], object]


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second of exported models.")
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 22, 49])
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.px} px, {os.cpu_count()} CPUs, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    print(f"{'depth':>5} {'threads':>7} {'batch':>5} {'eager':>8} {'export':>8} {'onnx':>8}   images/s", flush=True)
    for depth in args.depths:
        with tempfile.TemporaryDirectory() as folder:
            classifier = untrained(Path(folder), depth, args.px)
            onnx, program = export_onnx(classifier).content, export_torch(classifier).run
        for threads in args.threads:
            torch.set_num_threads(threads)
            clock = process_time if threads == 1 else perf_counter
            runs = [eager(classifier), program, in_onnxruntime(onnx, threads)]
            for run in runs:
                run(random_images(2, args.px))  # the first call takes longer
            for batch in BATCHES:
                images_NHW = random_images(batch, args.px)
                turns = [[images_per_second(run, images_NHW, clock) for run in runs] for _ in range(args.repeats)]
                medians = [f"{median(of_one):8.1f}" for of_one in zip(*turns, strict=True)]
                print(f"{depth:5} {threads:7} {batch:5} {' '.join(medians)}", flush=True)


def untrained(folder: Path, depth: int, px: int) -> Classifier:
    """A model with random weights, and as much of a bundle as its export reads."""
    (folder / CHECKSUMS).write_bytes(b"")
    content = {
        "model": {"truncation_depth": depth, "dropout": 0.5},
        "classes": ["adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma"],
        "preprocessing": {"image_size": px},
        "calibration": None,
        "training": {"configuration": {}, "epochs": 1},
        "versions": {},
        "settings": {"name": "untrained", "normalisation": "imagenet", "trials": 1},
    }
    config = ModelConfig.model_validate(content)
    return Classifier(folder, TruncatedResNet50(depth), config, None, None, "cpu")


def random_images(n: int, px: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, px, px), dtype=np.uint8)


def eager(classifier: Classifier) -> Run:
    graph = Graph(classifier)

    def run(images_NHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(graph(torch.from_numpy(images_NHW)).numpy())

    return run


def in_onnxruntime(content: bytes, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images_NHW: session.run(None, {INPUT: images_NHW})


def images_per_second(run: Run, images_NHW: np.ndarray, clock: Callable[[], float]) -> float:
    calls = max(1, IMAGES // len(images_NHW))
    start = clock()
    for _ in range(calls):
        run(images_NHW)
    return calls * len(images_NHW) / (clock() - start)


if __name__ == "__main__":
    main()
