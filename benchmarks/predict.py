"""Measures how many images a second `predict` classifies, beside a bare loop, and with Ray Data on a cluster.

    python benchmarks/predict.py

A bundle with random weights classifies copies of drawn slices (512 x 512 pixels, PNG) in these ways: the model alone in
a loop over ready batches on one thread, the same with all threads, the command's own loop (reading, decoding, hashing,
likeness and distance included) with all threads, and `predict --address` on a cluster: Ray Data with a worker for each
CPU, once with the start of its workers, and again. One cluster is this machine as a single node. The other one is two
nodes with half of its CPUs each, as processes on this machine (`ray.cluster_utils`). `--address` measures a running
cluster instead of these two. It takes about 3 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import safetensors.torch
import torch

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.settings import validate
from lungct_tune.data import make_phantoms, read_images
from lungct_tune.data.seen_images import list_learned
from lungct_tune.evaluation.bundle_files import describe_model
from lungct_tune.evaluation.classifier import BATCH, Classifier
from lungct_tune.evaluation.prediction import classify_in_parts
from lungct_tune.evaluation.training_features import TrainingFeatures
from lungct_tune.experiment.bundle import CONFIG, FEATURES, LEARNED, MODEL, as_json, write_bundle
from lungct_tune.experiment.folder import Experiment
from lungct_tune.models.features import pooled_features
from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second of predict.")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--address", help="of a running Ray cluster; without it two are started here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        classifier, sources = prepare(Path(scratch), args.depth, args.px, args.images)
        print(f"depth {args.depth}, {args.px} px, {args.images} images, {os.cpu_count()} CPUs; images/s", flush=True)
        threads = torch.get_num_threads()
        for title, n in (("bare loop, 1 thread", 1), (f"bare loop, {threads} threads", threads)):
            torch.set_num_threads(n)
            report(title, args.images, bare_loop(classifier, args.images))
        report("predict", args.images, timed(lambda: list(classify_in_parts(classifier, sources))))
        classifier.model.cpu()
        if args.address:
            on_cluster("that cluster", args.address, classifier, sources)
            return
        for nodes in (1, 2):
            with started(nodes) as address:
                on_cluster(f"{nodes} node{'s' * (nodes > 1)}", address, classifier, sources)


def prepare(folder: Path, depth: int, px: int, n: int) -> tuple[Classifier, list[str]]:
    """A bundle, and files to classify."""
    root = make_phantoms(folder, seed=0, patients=40, size=512)
    images = read_images(root, px, cache=folder / "cache", progress=False)
    model, rows = TruncatedResNet50(depth), np.arange(len(images.table))
    features_ND = pooled_features(model, torch.tensor(np.array(images.images_NHW)), rows, "imagenet")
    settings = validate({"name": "one", "image_size": px, "normalisation": "imagenet"})
    configuration = Hyperparameters(truncation_depth=depth)
    files = {
        MODEL: safetensors.torch.save({name: value.contiguous() for name, value in model.state_dict().items()}),
        CONFIG: as_json(describe_model(settings, images, configuration, 1, None).model_dump()),
        LEARNED: list_learned(images, rows),
        FEATURES: TrainingFeatures.fit(features_ND, images.table["group"].to_numpy(), 1.0).as_bytes(),
    }
    write_bundle(Experiment.at(str(folder), "one"), files)
    paths = [root / path for path in images.table["path"]]
    copies = [folder / "copies" / f"{i}.png" for i in range(n)]
    (folder / "copies").mkdir()
    for i, copy in enumerate(copies):
        shutil.copy(paths[i % len(paths)], copy)
    return Classifier.load(folder / "one" / "best"), [str(copy) for copy in copies]


def bare_loop(classifier: Classifier, n: int) -> float:
    """Seconds of the model alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = classifier.model.to(device).eval()
    images_NHW = torch.randint(256, (BATCH, classifier.image_size, classifier.image_size), dtype=torch.uint8)

    def loop() -> None:
        with torch.inference_mode():
            for _ in range(n // BATCH):
                forward(model, as_grey(images_NHW.to(device)), "imagenet").softmax(dim=1).cpu()

    forward(model, as_grey(images_NHW.to(device)), "imagenet")  # the first batch takes longer
    return timed(loop)


@contextmanager
def started(nodes: int) -> Iterator[str]:
    """Starts a cluster whose nodes share the CPUs of this machine; yields its address."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # as `map_on_cluster` does, which joins too late here
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    cpus = max(1, (os.cpu_count() or 1) // nodes)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=cpus)
        yield cluster.address
    finally:
        cluster.shutdown()


def on_cluster(title: str, address: str, classifier: Classifier, sources: list[str]) -> None:
    from lungct_tune.tuning.batch_inference import map_on_cluster
    from lungct_tune.tuning.cluster import joined

    with joined(address, False, "benchmark"):
        for which in ("with its start", "again"):
            seconds = timed(lambda: list(map_on_cluster(address, classifier.classify_files, sources)))
            report(f"Ray Data on {title}, {which}", len(sources), seconds)


def timed(run: object) -> float:
    start = perf_counter()
    run()  # type: ignore[operator]
    return perf_counter() - start


def report(title: str, n: int, seconds: float) -> None:
    print(f"{title:36} {n / seconds:7.1f}   ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
