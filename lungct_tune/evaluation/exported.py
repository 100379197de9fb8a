"""Writes a bundle's model as one graph, from grey pixels to calibrated probabilities, and compares the two."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lungct_tune.data.decode import RESIZING
from lungct_tune.data.inputs import Unreadable
from lungct_tune.errors import UserError
from lungct_tune.evaluation.classifier import BATCH, Classifier
from lungct_tune.experiment.bundle import CHECKSUMS, PREDICTIONS
from lungct_tune.experiment.predictions import read_predictions
from lungct_tune.models.preprocessing import as_grey, forward

OPSET = 18
"""Of ONNX: what the exporter writes without converting."""

TOLERANCE = 1e-4
"""The largest allowed difference of a probability."""

RANDOM = 32
"""Random images to compare on where the test images are not at hand."""

INPUT, OUTPUT = "images", "probabilities"


class Graph(nn.Module):
    """A bundle's model with its normalisation and its temperature.

    Maps grey images, uint8 (N, H, W), to calibrated probabilities, float32 (N, classes).
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model = classifier.model.cpu().eval()
        self.normalisation = classifier.config.settings.normalisation
        self.temperature = classifier.temperature
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits_NC = forward(self.model, as_grey(images), self.normalisation)
        return (logits_NC / self.temperature).softmax(dim=1)


@dataclass(frozen=True)
class Exported:
    """A written graph."""

    content: bytes
    run: Callable[[np.ndarray], np.ndarray]
    """Runs it as its users do: uint8 (N, H, W) to probabilities (N, classes)."""


def about(classifier: Classifier) -> dict[str, str]:
    """What the file says of itself."""
    checksums = (classifier.folder / CHECKSUMS).read_bytes()
    return {
        "classes": json.dumps(classifier.classes),
        "image_size": str(classifier.image_size),
        "window": ",".join(f"{value:g}" for value in classifier.window or ()) or "each DICOM file's own",
        "input": f"{INPUT}: uint8 grey (N, {classifier.image_size}, {classifier.image_size}), 0 black to 255 white",
        "resizing": RESIZING,
        "output": f"{OUTPUT}: calibrated, float32 (N, {len(classifier.classes)}), in the order of classes",
        "temperature": str(classifier.temperature),
        "threshold": str(classifier.threshold),
        "threshold_means": "an image counts as cancer if the probabilities of all cancers together are above it",
        "bundle_sha256": hashlib.sha256(checksums).hexdigest(),
        "licence": "research software; no output is a diagnosis",
    }


def export_torch(classifier: Classifier) -> Exported:
    """The graph as a .pt2 file of torch.export, which PyTorch loads without this package.

    `torch.export.load(FILE, extra_files={"about.json": ""})` reads it and what it says of itself.
    """
    shapes = ({0: torch.export.Dim("N")},)
    program = torch.export.export(Graph(classifier), (_example(classifier),), dynamic_shapes=shapes)
    written = io.BytesIO()
    torch.export.save(program, written, extra_files={"about.json": json.dumps(about(classifier))})
    module = torch.export.load(io.BytesIO(written.getvalue())).module()

    def run(images_NHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(torch.tensor(images_NHW)).numpy())

    return Exported(written.getvalue(), run)


def export_onnx(classifier: Classifier) -> Exported:
    """The graph as an ONNX file.

    Raises:
        UserError: onnx, onnxscript or onnxruntime are missing.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing; install it with: pip install 'lungct-tune[onnx]'") from error

    program = torch.onnx.export(
        Graph(classifier),
        (_example(classifier),),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, about(classifier))
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images_NHW: np.ndarray) -> np.ndarray:
        return np.asarray(session.run([OUTPUT], {INPUT: images_NHW})[0])

    return Exported(content, run)


def compare_with_bundle(
    exported: Exported, classifier: Classifier, images_NHW: np.ndarray, what: str
) -> dict[str, Any]:
    """Compares the graph's probabilities with the bundle's, for the file's .json.

    Args:
        classifier: on the CPU, where the graph is run too.
        images_NHW: of the bundle's size.
        what: which images these are, as text.
    """
    bundle_NC = classifier.classify(images_NHW).probabilities_NC
    graph_NC = _run_in_parts(exported, images_NHW, BATCH)  # all together they may not fit into memory
    one_by_one_NC = _run_in_parts(exported, images_NHW[:4], 1)
    difference = max(
        float(np.abs(graph_NC - bundle_NC).max()), float(np.abs(one_by_one_NC - bundle_NC[: len(one_by_one_NC)]).max())
    )
    changed = int((graph_NC.argmax(axis=1) != bundle_NC.argmax(axis=1)).sum())
    return {
        "images": len(images_NHW),
        "what": what,
        "largest_difference": difference,
        "allowed_difference": TOLERANCE,
        "changed_classes": changed,
        "same": bool(difference <= TOLERANCE and changed == 0),
    }


def _run_in_parts(exported: Exported, images_NHW: np.ndarray, at_once: int) -> np.ndarray:
    starts = range(0, len(images_NHW), at_once)
    return np.concatenate([exported.run(images_NHW[start : start + at_once]) for start in starts])


def images_to_compare(classifier: Classifier, data: Path | None) -> tuple[np.ndarray, str]:
    """Images to compare on: the bundle's test images if their folder is known, else random ones; and what they are.

    Args:
        data: the folder that the search had; None where it is not at hand.

    Raises:
        UserError: a test image is not in the folder, or cannot be read.
    """
    file, size = classifier.folder / PREDICTIONS, classifier.image_size
    if data is None or not file.exists():
        random_NHW = np.random.default_rng(0).integers(0, 256, (RANDOM, size, size), dtype=np.uint8)
        return random_NHW, f"{RANDOM} images of random grey values"
    paths = read_predictions(file.read_bytes(), classifier.classes).paths_N
    read = [classifier.read(str(data / path)) for path in paths]
    for path, image in zip(paths, read, strict=True):
        if isinstance(image, Unreadable):
            raise UserError(f"the test image {path} cannot be read in {data}: {image.reason}; correct --data")
    return classifier.stack(read), f"the {len(read)} test images of the bundle"


def _example(classifier: Classifier) -> Tensor:
    """Two images: a batch of one would be taken for a constant."""
    return torch.zeros(2, classifier.image_size, classifier.image_size, dtype=torch.uint8)
