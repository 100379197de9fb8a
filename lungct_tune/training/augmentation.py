"""Rotates, zooms, shifts and flips a batch of grey images on their device, with other random values for each image.

The values are drawn separately, by a generator on the CPU. So they are the same on every device, and for any number of
workers that share the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lungct_tune.config.hyperparameters import Hyperparameters


@dataclass(frozen=True)
class Augmentation:
    """Random rotation, zoom, shift and flip of grey images; see the fields of the same names of `Hyperparameters`."""

    rotation: float
    zoom: float
    shift: float
    flip: float

    @classmethod
    def of(cls, configuration: Hyperparameters) -> Self:
        c = configuration.resolved
        assert c.rotation is not None and c.zoom is not None and c.shift is not None and c.flip is not None
        return cls(c.rotation, c.zoom, c.shift, c.flip)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draws `n` affine matrices (n, 2, 3), float32 on the CPU, that map output to input positions in -1 to 1."""
        turn_N, zoom_N, flip_N, right_N, down_N = torch.rand(5, n, generator=generator)
        angle_N = (2 * turn_N - 1) * math.radians(self.rotation)
        scale_N = 1 / (1 + (2 * zoom_N - 1) * self.zoom)
        mirror_N = torch.where(flip_N < self.flip, -1.0, 1.0)
        right_N, down_N = ((2 * drawn_N - 1) * 2 * self.shift for drawn_N in (right_N, down_N))
        cos_N, sin_N = angle_N.cos() * scale_N, angle_N.sin() * scale_N
        top_N3 = torch.stack([mirror_N * cos_N, -mirror_N * sin_N, right_N], dim=1)
        bottom_N3 = torch.stack([sin_N, cos_N, down_N], dim=1)
        return torch.stack([top_N3, bottom_N3], dim=1)

    def apply(self, images_N1HW: Tensor, matrices_N23: Tensor) -> Tensor:
        """Transforms each square float image (N, 1, H, W) by its matrix, on the same device; outside is black (0)."""
        if self == NONE:  # sampling with the identity would round
            return images_N1HW
        grid_NHW2 = F.affine_grid(matrices_N23, list(images_N1HW.shape), align_corners=False)
        return F.grid_sample(images_N1HW, grid_NHW2, mode="bilinear", padding_mode="zeros", align_corners=False)


NONE = Augmentation(0.0, 0.0, 0.0, 0.0)
