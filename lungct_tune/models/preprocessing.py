"""Turns 8-bit grey images into the network's input, in the same way in training and afterwards."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation of each channel, for grey values scaled to 0 to 1, by name."""


def as_grey(images_NHW: Tensor) -> Tensor:
    """uint8 images (N, H, W) as float (N, 1, H, W), 0 to 1."""
    return images_NHW.unsqueeze(1) / 255


@cache
def precision_for(device: torch.device) -> torch.dtype:
    """What the backbone computes in: bfloat16 on GPUs that have it (since Ampere), else float16; float32 on CPUs.

    The head, the loss and the weights are float32 everywhere. float16 needs a gradient scaler in training.
    """
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def training_precision_for(device: torch.device) -> torch.dtype:
    """What the backbone computes in while it is trained: as `precision_for`, but bfloat16 on CPUs that compute in it.

    There a step takes half the time (docs/benchmarks.md, "The pipeline's share"). What predicts stays in float32 on
    CPUs, so that a model's figures do not depend on the processor.
    """
    if device.type != "cpu":
        return precision_for(device)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older PyTorch has it not
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def forward(network: nn.Module, grey_N1HW: Tensor, normalisation: str, precision: torch.dtype | None = None) -> Tensor:
    """Logits (N, classes), float32, of grey images (N, 1, H, W) from 0 to 1.

    Repeats the image in three channels (channels-last), and normalises them as `normalisation` names in
    `NORMALISATIONS`.

    Args:
        precision: what the backbone computes in; by default `precision_for` the device.
    """
    means, deviations = NORMALISATIONS[normalisation]
    channels = [(grey_N1HW[:, 0] - mean) / std for mean, std in zip(means, deviations, strict=True)]
    images_NCHW = torch.stack(channels, dim=-1).permute(0, 3, 1, 2)
    precision = precision or precision_for(grey_N1HW.device)
    with torch.autocast(grey_N1HW.device.type, precision, enabled=precision != torch.float32):
        logits_NC: Tensor = network(images_NCHW)
    return logits_NC
