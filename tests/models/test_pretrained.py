"""Pretrained weights: read from whatever people have, or refused with a reason and ways to fix it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CT_WEIGHTS as REAL
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import ResNet50_Weights, resnet50

from lungct_tune.models.pretrained import WeightsError, covered_depth, load_backbone, read_weights
from lungct_tune.models.truncated_resnet import TruncatedResNet50


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Tensors of a whole ResNet50, `fc` and all."""
    torch.manual_seed(0)
    return resnet50().state_dict()


def without_layer3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(("layer3", "layer4", "fc"))}


def assert_ways_to_fix(error: pytest.ExceptionInfo[WeightsError]) -> None:
    message = str(error.value)
    assert all(way in message for way in ("resnet50-", "checkpoints", "--weights FILE", "--weights none")), message


def with_prefix(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda state: {prefix + key: value for key, value in state.items()}


def numbered(key: str) -> str:
    children = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7", "fc": "9"}
    first, _, rest = key.partition(".")
    return f"{children[first]}.{rest}"


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "plain": with_prefix(""),
    "encoder": with_prefix("encoder."),
    "distributed": with_prefix("module."),
    "wrapped": lambda state: {"model": with_prefix("module.model.backbone.")(state), "epoch": 3},
    "compiled": with_prefix("_orig_mod."),
    "compiled and distributed": with_prefix("module._orig_mod."),
    "Lightning": lambda state: {"epoch": 3, "state_dict": with_prefix("model.net.")(state), "optimizer_states": [1]},
    "MoCo": lambda state: {
        "state_dict": with_prefix("module.encoder_q.")(state)
        | {f"module.encoder_k.{key}": torch.zeros_like(value) for key, value in state.items()}
    },
    "RadImageNet": lambda state: {f"backbone.{numbered(key)}": value for key, value in state.items()},
    "nested": lambda state: {"checkpoint": {"model_state_dict": state}, "optimizer": {"state": {0: torch.ones(3)}}},
    "half precision": lambda state: {key: value.half() for key, value in state.items()},
    "parameters": lambda state: {
        key: torch.nn.Parameter(value, value.is_floating_point()) for key, value in state.items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_in_circulation_are_read(tmp_path: Path, state: dict[str, Tensor], layout: str) -> None:
    torch.save(LAYOUTS[layout](state), tmp_path / "x.pth")
    read = read_weights(str(tmp_path / "x.pth"))
    assert covered_depth(read) == 49 and not any("fc" in key for key in read)
    assert read["layer4.2.conv3.weight"].dtype == torch.float32
    torch.testing.assert_close(read["conv1.weight"], state["conv1.weight"], atol=1e-3, rtol=0)


def test_other_networks_are_refused_with_keys_found_beside_keys_wanted(tmp_path: Path) -> None:
    torch.save({f"blocks.{i}.weight": torch.zeros(3) for i in range(9)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"keys: blocks\.0\.weight, .*blocks\.4\.weight\. Expected: conv1\."):
        read_weights(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value * float("nan"), "bn1.weight has values that are not finite"),
        (lambda value: value / 0, "bn1.weight has values that are not finite"),
        (lambda value: value.double() * 1e300, "bn1.weight has values that are not finite"),
        (lambda value: value.to(torch.int8), r"bn1.weight has the type torch\.int8"),
        (lambda value: value > 0, r"bn1.weight has the type torch\.bool"),
        (lambda value: value.to(torch.complex64), r"bn1.weight has the type torch\.complex64"),
        (lambda value: value.to_sparse(), "bn1.weight is sparse"),
        (lambda value: value.to("meta"), "bn1.weight is sparse, quantized or without data"),
    ],
)
def test_what_cannot_be_weights_is_refused(
    tmp_path: Path, state: dict[str, Tensor], change: Callable[[Tensor], Tensor], message: str
) -> None:
    torch.save(state | {"bn1.weight": change(state["bn1.weight"])}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        read_weights(str(tmp_path / "x.pth"))


def test_no_pipe_no_device_and_no_giant_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with (tmp_path / "giant.pth").open("wb") as file:
        file.truncate(10**12)
    for path in (tmp_path / "pipe.pth", tmp_path / "giant.pth", Path("/dev/zero")):
        with pytest.raises(WeightsError, match=r"not a regular file|at most 1,500,000,000 are read"):
            read_weights(str(path))


def test_reads_safetensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({f"backbone.{key}": value for key, value in without_layer3(state).items()}, path)
    model = TruncatedResNet50(22)
    load_backbone(model, read_weights(str(path)))
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())


def test_imagenet_comes_from_torchs_hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]
) -> None:
    """The file stands in for torchvision's: the same name, place and keys, other values."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / Path(ResNet50_Weights.IMAGENET1K_V2.url).name
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    read = read_weights("imagenet")
    assert covered_depth(read) == 49
    assert not any(key.startswith("fc") for key in read)
    assert torch.equal(read["layer4.2.conv3.weight"], state["layer4.2.conv3.weight"])


def test_unreachable_imagenet_says_so_and_how_to_fix_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a port where nobody answers, on any machine
    with pytest.raises(WeightsError, match=r"imagenet.*URLError") as error:
        read_weights("imagenet")
    assert_ways_to_fix(error)
    assert str(tmp_path / "hub" / "checkpoints") in str(error.value)


class Malicious:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a weights file ran its code",))


def test_refuses_files_that_it_cannot_read_without_running_their_code(tmp_path: Path) -> None:
    contents = {
        "code.pth": {"conv1.weight": Malicious()},
        "tensor.pth": torch.zeros(3),
        "empty.pth": {"fc.bias": torch.zeros(3)},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"\x07 this is not a model")
    for name in (*contents, "noise.pth", "noise.safetensors", "missing.pth", "."):
        with pytest.raises(WeightsError, match=name) as error:
            read_weights(str(tmp_path / name))
        assert_ways_to_fix(error)


def test_a_partial_file_serves_the_cuts_that_it_covers(state: dict[str, Tensor]) -> None:
    partial = {key: value for key, value in without_layer3(state).items() if "num_batches_tracked" not in key}
    assert covered_depth(partial) == 22
    assert covered_depth(state) == 49
    assert covered_depth({key: value for key, value in state.items() if "layer2.0.downsample" not in key}) == 12
    assert covered_depth({}) == 0
    for depth in (10, 22):
        model = TruncatedResNet50(depth)
        load_backbone(model, partial)
        kept = {key: value for key, value in model.backbone.state_dict().items() if key in partial}
        assert kept and all(torch.equal(value, partial[key]) for key, value in kept.items())


def test_what_does_not_fit_is_named_and_nothing_is_loaded(state: dict[str, Tensor]) -> None:
    partial = without_layer3(state) | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
    model = TruncatedResNet50(26)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_backbone(model, partial)
    message = str(error.value)
    assert "conv1.weight (shape (64, 1, 7, 7) instead of (64, 3, 7, 7))" in message
    assert "layer3.0.conv1.weight (missing)" in message and "more" in message
    assert "up to 0" in message
    assert_ways_to_fix(error)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.skipif(not REAL.exists(), reason=f"the real weights are not at {REAL}")
def test_the_real_weights_fill_a_cut_at_22_with_no_key_left_over() -> None:
    real = read_weights(str(REAL))
    assert covered_depth(real) == 22
    model = TruncatedResNet50(22)
    assert real.keys() == model.backbone.state_dict().keys()
    load_backbone(model, real)
    assert all(torch.equal(value, real[key]) for key, value in model.backbone.state_dict().items())
    with pytest.raises(WeightsError, match="up to 22"):
        load_backbone(TruncatedResNet50(23), real)
