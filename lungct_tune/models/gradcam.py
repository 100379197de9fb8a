"""Computes Grad-CAM maps, which show where in an image a network finds evidence for a class."""

from __future__ import annotations

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor

from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50

_BATCH = 16


def grad_cam(
    model: TruncatedResNet50, images_NHW: np.ndarray, classes_NK: np.ndarray, normalisation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Grad-CAM maps (Selvaraju et al., ICCV 2017) of the features that the head pools.

    Args:
        images_NHW: uint8 grey.
        classes_NK: the classes to explain in each image, as indices.
        normalisation: a name in `preprocessing.NORMALISATIONS`.

    Returns:
        Maps (N, K, h, w) at the resolution of the features, each from 0 to 1 (all 0 if there is no evidence for the
        class), and the probabilities (N, C) of the same forward pass.
    """
    model.eval()
    pool = model.get_submodule("head.pool")
    method = LayerGradCam(model.head, pool)
    maps, probabilities = [], []
    for start in range(0, len(images_NHW), _BATCH):
        batch = slice(start, start + _BATCH)
        pooled: list[Tensor] = []
        hook = pool.register_forward_pre_hook(lambda _, inputs, pooled=pooled: pooled.append(inputs[0]))
        with torch.no_grad():
            grey_N1HW = as_grey(torch.from_numpy(np.ascontiguousarray(images_NHW[batch])))
            probabilities.append(forward(model, grey_N1HW, normalisation).softmax(dim=1).numpy())
        hook.remove()
        of_classes = [
            method.attribute(pooled[0], target_N, attribute_to_layer_input=True, relu_attributions=True)
            for target_N in torch.as_tensor(classes_NK[batch], dtype=torch.int64).T
        ]
        maps_NKhw = torch.cat(of_classes, dim=1).detach().numpy()
        maps.append(maps_NKhw / np.maximum(maps_NKhw.max(axis=(2, 3), keepdims=True), 1e-12))
    return np.concatenate(maps), np.concatenate(probabilities)
