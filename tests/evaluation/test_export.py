"""A bundle's model as a file for others: with the bundle's probabilities, for any number of images, at any depth."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from processes import run_here
from toys import model_config
from trained import THRESHOLD

from lungct_tune.data.inputs import ReadImage
from lungct_tune.evaluation.calibration import calibrated
from lungct_tune.evaluation.classifier import BATCH, Classifier
from lungct_tune.evaluation.exported import Exported, Graph, compare_with_bundle, export_onnx
from lungct_tune.export import main
from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50

run = partial(run_here, main)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_the_file_gives_the_bundles_probabilities_without_the_bundle(
    kind: str, bundle: Path, phantoms: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    status, said, complained = run(bundle, "--to", kind, "--out", out, "--data", phantoms)
    assert status == 0, complained
    n = len([*phantoms.glob("test/*/*.png")])
    assert f"on the {n} test images of the bundle" in said
    beside = json.loads((tmp_path / "model.json").read_text())
    assert beside["compared"]["same"] and beside["compared"]["images"] == n
    images_NHW = np.random.default_rng(1).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    expected_NC = Classifier.load(bundle).classify(images_NHW).probabilities_NC
    if kind == "onnx":
        session = onnxruntime.InferenceSession(out.read_bytes())
        probabilities_NC = session.run(["probabilities"], {"images": images_NHW})[0]
        about = {prop.key: prop.value for prop in onnx.load(str(out)).metadata_props}
    else:
        extra = {"about.json": ""}
        module = torch.export.load(io.BytesIO(out.read_bytes()), extra_files=extra).module()
        probabilities_NC, about = module(torch.tensor(images_NHW)).detach().numpy(), json.loads(extra["about.json"])
    np.testing.assert_allclose(probabilities_NC, expected_NC, atol=1e-5)
    assert json.loads(about["classes"])[2] == "normal" and about["image_size"] == "32"
    assert float(about["threshold"]) == THRESHOLD and about == beside["about"]
    image = min(phantoms.glob("test/*/*.png"))
    as_told = Image.open(image).convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    read = Classifier.load(bundle).read(str(image))
    assert isinstance(read, ReadImage) and (np.asarray(as_told) == read.image_HW).all()
    assert "Pillow's BILINEAR" in about["resizing"]
    assert run(bundle, "--to", kind, "--out", out)[0] == 2, "it is not written over"


def at_depth(depth: int) -> Classifier:
    """What the exporter asks of a bundle, with random weights whose running statistics are not those of the start."""
    torch.manual_seed(depth)
    model = TruncatedResNet50(depth)
    for _ in range(3):
        forward(model, torch.rand(8, 1, 32, 32), "imagenet")
    return Classifier(Path(), model.eval(), model_config(depth), None, None, "cpu")


@pytest.mark.parametrize("depth", [1, 10, *(pytest.param(k, marks=pytest.mark.long) for k in range(2, 50) if k != 10)])
def test_every_depth_exports(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungct_tune.evaluation.exported.about", lambda classifier: {})
    classifier = at_depth(depth)
    images_NHW = np.random.default_rng(depth).integers(0, 256, (6, 32, 32), dtype=np.uint8)
    compared = compare_with_bundle(export_onnx(classifier), classifier, images_NHW, "noise")
    assert compared["same"], compared


def test_a_graph_that_differs_is_not_written(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(classifier: Classifier) -> Exported:
        return Exported(b"graph", lambda images_NHW: np.full((len(images_NHW), 4), 0.25))

    monkeypatch.setattr("lungct_tune.evaluation.exported.export_torch", wrong)
    status, _, complained = run(bundle, "--to", "torch", "--out", tmp_path / "model.pt2")
    assert status == 2 and "does not give the bundle's probabilities" in complained
    assert not list(tmp_path.iterdir())


def test_many_images_are_compared_some_at_a_time() -> None:
    classifier, together = at_depth(1), []
    images_NHW = np.random.default_rng(0).integers(0, 256, (2 * BATCH + 3, 32, 32), dtype=np.uint8)

    def run_graph(some_NHW: np.ndarray) -> np.ndarray:
        together.append(len(some_NHW))
        return classifier.classify(some_NHW).probabilities_NC

    compared = compare_with_bundle(Exported(b"graph", run_graph), classifier, images_NHW, "noise")
    assert compared["same"] and compared["images"] == len(images_NHW) == sum(together) - 4, "4 once more, alone"
    assert max(together) == BATCH


def test_the_graph_divides_logits_by_the_temperature() -> None:
    classifier = at_depth(4)
    scaled = SimpleNamespace(model=classifier.model, config=classifier.config, temperature=2.5)
    images = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        plain_NC = forward(classifier.model, as_grey(images), "imagenet").softmax(dim=1).numpy()
        np.testing.assert_allclose(Graph(scaled)(images).numpy(), calibrated(plain_NC, 2.5), atol=1e-6)


def test_what_cannot_be_is_refused_before_the_graph_is_made(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungct_tune.evaluation.exported.images_to_compare", lambda *_: pytest.fail("it has begun"))
    status, _, complained = run(bundle, "--to", "onnx", "--out", tmp_path / "none" / "x.onnx")
    assert status == 2 and f"there is no folder {tmp_path}/none; make it first" in complained
    (tmp_path / "y.onnx.json").touch()
    status, _, complained = run(bundle, "--to", "onnx", "--out", tmp_path / "y.onnx")
    assert status == 2 and "y.onnx.json is there already" in complained


def test_who_stops_it_while_it_writes_finds_neither_file(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def stopped_at_the_second_file(path: Path, content: bytes) -> int:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", stopped_at_the_second_file)
    status, _, complained = run(bundle, "--to", "torch", "--out", tmp_path / "lung.pt2")
    assert status == 130 and "Nothing was written" in complained and not list(tmp_path.iterdir())


def test_a_test_image_that_is_elsewhere_is_named_with_the_reason(bundle: Path, tmp_path: Path) -> None:
    status, _, complained = run(bundle, "--to", "onnx", "--out", tmp_path / "x.onnx", "--data", tmp_path)
    assert status == 2 and f"cannot be read in {tmp_path}: No such file or directory; correct --data" in complained
