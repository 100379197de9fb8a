"""Flips, rotates and zooms a batch of grey images on their device, with other random values for each image.

The values are drawn separately, by a generator on the CPU. So they are the same on every device, and for any number of
workers that share the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """Random flips, rotations and zooms; 0.4 gives the published notebook's ranges (±0.2 turns, ±20 %, half flipped).

    Raises:
        ValueError: the strength is not in 0 to 1.
    """

    strength: float
    """s, from 0 (exactly the identity) to 1. Rotation is uniform in ±s/2 turns, magnification in 1 ± s/2. The
    probability of a horizontal flip is 1.25 s, but at most one half, which it reaches at the published strength."""

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"augmentation strength is {self.strength}; allowed are 0 to 1")

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Draws `n` affine matrices (n, 2, 3), float32 on the CPU, that map output to input positions in -1 to 1."""
        turn_N, zoom_N, flip_N = torch.rand(3, n, generator=generator)
        angle_N = (turn_N - 0.5) * self.strength * 2 * math.pi
        scale_N = 1 / (1 + (zoom_N - 0.5) * self.strength)
        mirror_N = torch.where(flip_N < min(0.5, 1.25 * self.strength), -1.0, 1.0)
        cos_N, sin_N, zero_N = angle_N.cos() * scale_N, angle_N.sin() * scale_N, torch.zeros(n)
        top_N3 = torch.stack([mirror_N * cos_N, -mirror_N * sin_N, zero_N], dim=1)
        bottom_N3 = torch.stack([sin_N, cos_N, zero_N], dim=1)
        return torch.stack([top_N3, bottom_N3], dim=1)

    def apply(self, images_N1HW: Tensor, matrices_N23: Tensor) -> Tensor:
        """Transforms each square float image (N, 1, H, W) by its matrix, on the same device; outside is black (0)."""
        if self.strength == 0:  # sampling with the identity would round
            return images_N1HW
        grid_NHW2 = F.affine_grid(matrices_N23, list(images_N1HW.shape), align_corners=False)
        return F.grid_sample(images_N1HW, grid_NHW2, mode="bilinear", padding_mode="zeros", align_corners=False)
