"""What a network is made of, and where in an image it looks: what the report needs torch for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lungct_tune.model import CutResNet
from lungct_tune.training import as_grey, forward

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")

_BATCH = 16


@dataclass(frozen=True)
class Anatomy:
    """What a cut network costs, by stage (those of `STAGES` that it has)."""

    parameters: dict[str, int]
    flops: dict[str, int]
    """Floating-point operations of one image; a multiplication and an addition are two."""
    features: tuple[int, int]
    """What the head pools: channels, and width in pixels."""


@cache
def anatomy(truncation_depth: int, classes: int, image_size: int) -> Anatomy:
    """Counts parameters and arithmetic without doing any (torch.utils.flop_counter, on the meta device)."""
    model = CutResNet(truncation_depth, classes=classes).to("meta").eval()
    images_NCHW = torch.empty(1, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images_NCHW)
    features_NCHW = model.backbone(images_NCHW)["features"]
    parameters, flops = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, 0)
    for name, parameter in model.named_parameters():
        parameters[_stage(name)] += parameter.numel()
    for name, module in model.named_modules():
        if not list(module.children()):
            flops[_stage(name)] += sum(counter.get_flop_counts().get(f"CutResNet.{name}", {}).values())
    there = [stage for stage in STAGES if parameters[stage]]
    return Anatomy(
        {stage: parameters[stage] for stage in there},
        {stage: flops[stage] for stage in there},
        (features_NCHW.shape[1], features_NCHW.shape[3]),
    )


def _stage(name: str) -> str:
    """The stage of a module or parameter of a `CutResNet`: "backbone.layer2.3.conv1" is in "layer2"."""
    room, _, rest = name.partition(".")
    part = rest.partition(".")[0]
    return "head" if room == "head" else part if part in STAGES else "stem"


def look(
    model: CutResNet, images_NHW: np.ndarray, classes_NK: np.ndarray, normalisation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Where a network sees what speaks for a class: Grad-CAM (Selvaraju et al., ICCV 2017) on what the head pools.

    Args:
        images_NHW: uint8 grey.
        classes_NK: the classes to look for in each image, as indices.
        normalisation: a name in `training.NORMALISATIONS`.

    Returns:
        Maps (N, K, h, w) at the resolution of the features, each from 0 to 1 (all 0 where nothing speaks for the
        class), and the probabilities (N, C) of the same pass.
    """
    model.eval()
    pool = model.get_submodule("head.pool")
    method = LayerGradCam(model.head, pool)
    maps, probabilities = [], []
    for start in range(0, len(images_NHW), _BATCH):
        batch = slice(start, start + _BATCH)
        pooled: list[Tensor] = []
        listening = pool.register_forward_pre_hook(lambda _, inputs, pooled=pooled: pooled.append(inputs[0]))
        with torch.no_grad():
            grey_N1HW = as_grey(torch.from_numpy(np.ascontiguousarray(images_NHW[batch])))
            probabilities.append(forward(model, grey_N1HW, normalisation).softmax(dim=1).numpy())
        listening.remove()
        of_classes = [
            method.attribute(pooled[0], target_N, attribute_to_layer_input=True, relu_attributions=True)
            for target_N in torch.as_tensor(classes_NK[batch], dtype=torch.int64).T
        ]
        maps_NKhw = torch.cat(of_classes, dim=1).detach().numpy()
        maps.append(maps_NKhw / np.maximum(maps_NKhw.max(axis=(2, 3), keepdims=True), 1e-12))
    return np.concatenate(maps), np.concatenate(probabilities)
