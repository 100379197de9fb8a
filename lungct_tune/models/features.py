"""Records what the backbone finds in an image: its features, pooled over the image, before the head uses them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lungct_tune.models.ensemble import Model, members_of
from lungct_tune.models.preprocessing import as_grey, forward

_BATCH = 32


@contextmanager
def recorded_features(model: Model) -> Iterator[Callable[[], Tensor]]:
    """Yields a function for the `with` block: the pooled features (N, channels), float32, of the last forward pass.

    Of the calling thread's last one: threads may compute with the same model. An ensemble's are those of its first
    member.
    """
    last = threading.local()
    hook = (
        members_of(model)[0]
        .get_submodule("head.float32")
        .register_forward_hook(lambda _, inputs, pooled_ND: setattr(last, "pooled_ND", pooled_ND.detach()))
    )
    with hook:
        yield lambda: last.pooled_ND


def feature_channels(model: Model) -> int:
    """How many pooled features a model has."""
    return members_of(model)[0].backbone.channels


@torch.inference_mode()
def pooled_features(model: Model, images_NHW: Tensor, rows: np.ndarray, normalisation: str) -> np.ndarray:
    """The pooled features of some images, float32 (len(rows), channels), computed on the model's device.

    Args:
        images_NHW: uint8 grey, on any device.
        rows: of the images.
        normalisation: a name in `preprocessing.NORMALISATIONS`.
    """
    device = next(model.parameters()).device
    model.eval()
    features = []
    with recorded_features(model) as last:
        for some in torch.as_tensor(rows, device=images_NHW.device).split(_BATCH):
            forward(model, as_grey(images_NHW[some].to(device)), normalisation)
            features.append(last())
    return torch.cat(features).cpu().numpy()
