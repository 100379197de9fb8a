"""Records what the backbone finds in an image: its features, pooled over the image, before the head uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50

_BATCH = 32


@contextmanager
def recorded_features(model: TruncatedResNet50) -> Iterator[list[Tensor]]:
    """Collects the pooled features (N, channels), float32, of each forward pass inside the `with` block."""
    features: list[Tensor] = []
    hook = model.get_submodule("head.float32").register_forward_hook(
        lambda _, inputs, pooled_ND: features.append(pooled_ND.detach())
    )
    try:
        yield features
    finally:
        hook.remove()


@torch.inference_mode()
def pooled_features(model: TruncatedResNet50, images_NHW: Tensor, rows: np.ndarray, normalisation: str) -> np.ndarray:
    """The pooled features of some images, float32 (len(rows), channels), computed on the model's device.

    Args:
        images_NHW: uint8 grey, on any device.
        rows: of the images.
        normalisation: a name in `preprocessing.NORMALISATIONS`.
    """
    device = next(model.parameters()).device
    model.eval()
    with recorded_features(model) as features:
        for some in torch.as_tensor(rows, device=images_NHW.device).split(_BATCH):
            forward(model, as_grey(images_NHW[some].to(device)), normalisation)
    return torch.cat(features).cpu().numpy()
