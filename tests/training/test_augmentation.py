"""Augmentation: nothing at 0, the published ranges at 0.4, the same for any number of workers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.training.augmentation import NONE, Augmentation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of(strength: float) -> Augmentation:
    return Augmentation.of(Hyperparameters(augmentation=strength))


def images(n: int, px: int) -> Tensor:
    return torch.rand(n, 1, px, px, generator=generator(1))


def test_strength_0_is_the_identity_exactly() -> None:
    images_N1HW = images(4, 37)
    augmentation = NONE
    matrices_N23 = augmentation.draw(4, generator())
    assert torch.equal(matrices_N23, torch.eye(2, 3).expand(4, 2, 3))
    assert torch.equal(augmentation.apply(images_N1HW, matrices_N23), images_N1HW)


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(strength=st.floats(0, 1), seed=st.integers(0, 2**32), n=st.integers(1, 5), px=st.integers(2, 24))
def test_keeps_shape_and_range_and_follows_its_seed(strength: float, seed: int, n: int, px: int) -> None:
    augmentation = of(strength)
    once, again = (augmentation.apply(images(n, px), augmentation.draw(n, generator(seed))) for _ in range(2))
    assert once.shape == (n, 1, px, px)
    assert once.dtype == torch.float32
    assert once.min() >= 0 and once.max() <= 1 + 1e-6
    assert torch.equal(once, again)


@settings(deadline=None)
@given(workers=st.integers(1, 4))
def test_workers_that_take_shares_of_a_batch_see_what_one_would_see(workers: int) -> None:
    augmentation = of(0.4)
    images_N1HW, matrices_N23 = images(12, 16), augmentation.draw(12, generator())
    together = augmentation.apply(images_N1HW, matrices_N23)
    for rank in range(workers):
        alone = augmentation.apply(images_N1HW[rank::workers], matrices_N23[rank::workers])
        assert torch.equal(alone, together[rank::workers])


@pytest.mark.parametrize(("strength", "flipped"), [(0.2, 0.25), (0.4, 0.5), (1.0, 0.5)])
def test_ranges_grow_with_the_strength_and_at_04_are_the_published_ones(strength: float, flipped: float) -> None:
    matrices_N22 = of(strength).draw(20_000, generator())[:, :, :2]
    determinant_N = torch.linalg.det(matrices_N22)
    magnification_N = determinant_N.abs().rsqrt()
    turn_N = torch.atan2(matrices_N22[:, 1, 0], matrices_N22[:, 1, 1]) / (2 * math.pi)
    assert (determinant_N < 0).float().mean().item() == pytest.approx(flipped, abs=0.02)
    for drawn_N, middle in ((magnification_N, 1.0), (turn_N, 0.0)):  # ±0.2 at strength 0.4
        assert drawn_N.min().item() == pytest.approx(middle - strength / 2, abs=0.01)
        assert drawn_N.max().item() == pytest.approx(middle + strength / 2, abs=0.01)
        assert drawn_N.mean().item() == pytest.approx(middle, abs=0.02)


def test_each_image_has_its_own_draw() -> None:
    augmentation = of(0.4)
    same_N1HW = images(1, 32).expand(6, 1, 32, 32)
    moved = augmentation.apply(same_N1HW, augmentation.draw(6, generator()))
    assert len({image.sum().item() for image in moved}) == 6


def test_outside_is_black_and_a_magnified_square_grows() -> None:
    square = torch.zeros(1, 1, 40, 40)
    square[..., 10:30, 10:30] = 1
    augmentation = of(1.0)
    larger, smaller = (torch.eye(2, 3)[None] / scale for scale in (1.5, 0.5))
    assert augmentation.apply(square, larger).sum().item() == pytest.approx(1.5**2 * 400, rel=0.05)
    assert augmentation.apply(torch.ones(1, 1, 40, 40), smaller)[..., 0, 0].item() == 0


def test_each_strength_can_be_set_alone() -> None:
    shifted = Augmentation.of(Hyperparameters(augmentation=0.0, shift=0.1)).draw(5000, generator())
    assert torch.equal(shifted[:, :, :2], torch.eye(2).expand(5000, 2, 2))
    assert shifted[:, :, 2].abs().max().item() == pytest.approx(0.2, abs=0.001)  # of a width of 2
    mild = Hyperparameters(rotation=15.0, flip=0.0)
    assert Augmentation.of(mild) == Augmentation(rotation=15.0, zoom=0.2, shift=0.0, flip=0.0)
    turn_N = torch.atan2(*Augmentation.of(mild).draw(5000, generator())[:, 1, :2].T).rad2deg()
    assert turn_N.abs().max().item() == pytest.approx(15, abs=0.1)
