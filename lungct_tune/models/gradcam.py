"""Computes Grad-CAM maps, which show where in an image a network finds evidence for a class."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from lungct_tune.models.ensemble import Model, members_of
from lungct_tune.models.preprocessing import as_grey, forward

_BATCH = 16


def grad_cam(
    model: Model, images_NHW: np.ndarray, classes_NK: np.ndarray, normalisation: str, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Grad-CAM maps (Selvaraju et al., ICCV 2017) of the features that the head pools.

    An ensemble's map is the mean of its members' maps.

    Args:
        model: on any device, where the maps are computed.
        images_NHW: uint8 grey.
        classes_NK: the classes to explain in each image, as indices.
        normalisation: a name in `preprocessing.NORMALISATIONS`.
        scale: the evidence that becomes 1, see `evidence_scale`; more than that becomes 1 too.

    Returns:
        Maps (N, K, h, w) at the resolution of the features, each from 0 to 1 (all 0 if there is no evidence for the
        class), and the probabilities (N, C) of the same forward pass.
    """
    maps_NKhw, probabilities_NC = _evidence(model, images_NHW, classes_NK, normalisation)
    return np.minimum(maps_NKhw / scale, 1), probabilities_NC


def evidence_scale(model: Model, images_NHW: np.ndarray, labels_N: np.ndarray, normalisation: str) -> float:
    """A scale for the maps of all images: the most evidence for its true class that one of these images has.

    Args:
        model, images_NHW, normalisation: as for `grad_cam`.
        labels_N: the true classes, as indices.
    """
    maps_N1hw, _ = _evidence(model, images_NHW, labels_N[:, None], normalisation)
    return max(float(maps_N1hw.max()), 1e-12)


def _evidence(
    model: Model, images_NHW: np.ndarray, classes_NK: np.ndarray, normalisation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Maps (N, K, h, w) that are not scaled, and the probabilities (N, C)."""
    model.eval()
    heads = [member.head for member in members_of(model)]
    device = next(model.parameters()).device
    maps, probabilities = [], []
    for start in range(0, len(images_NHW), _BATCH):
        batch = slice(start, start + _BATCH)
        pooled: list[Tensor] = []
        with torch.no_grad(), ExitStack() as hooks:
            for head in heads:
                hook = head.get_submodule("pool").register_forward_pre_hook(
                    lambda _, inputs, pooled=pooled: pooled.append(inputs[0])
                )
                hooks.enter_context(hook)
            grey_N1HW = as_grey(torch.from_numpy(np.ascontiguousarray(images_NHW[batch])).to(device))
            probabilities.append(forward(model, grey_N1HW, normalisation).softmax(dim=1).cpu().numpy())
        targets_KN = torch.as_tensor(classes_NK[batch], dtype=torch.int64, device=device).T
        of_members = [
            _maps(head, features_NCHW.float(), targets_KN) for head, features_NCHW in zip(heads, pooled, strict=True)
        ]
        maps.append(torch.stack(of_members).mean(dim=0).cpu().numpy())
    return np.concatenate(maps), np.concatenate(probabilities)


def _maps(head: nn.Sequential, features_NCHW: Tensor, targets_KN: Tensor) -> Tensor:
    """Maps (N, K, h, w) of one network."""
    method = LayerGradCam(head, head.get_submodule("pool"))
    of_classes = [
        method.attribute(features_NCHW, target_N, attribute_to_layer_input=True, relu_attributions=True)
        for target_N in targets_KN
    ]
    return torch.cat(of_classes, dim=1).detach()
