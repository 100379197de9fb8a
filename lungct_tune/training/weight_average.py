"""The model that is evaluated and kept: averaged weights, with batch-norm statistics estimated for them.

The weights after a single step depend on the batch that came last, and differ from epoch to epoch while the learning
rate is high. Their exponential moving average does not (https://docs.pytorch.org/docs/stable/optim.html, "Weight
Averaging"). Running statistics lag behind weights that change, and do not fit averaged weights at all. So they are
estimated anew before each evaluation, as torch.optim.swa_utils.update_bn does. That function also resets the statistics
of frozen layers, so it is not used here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50


class WeightAverage:
    """The exponential moving average of the learning weights of a model.

    Args:
        averaged: a copy of the model, which gets the averaged weights.
        model: the model that learns, on the same device.
        horizon: over about how many steps the average reaches back. Before, it is the mean of all steps.
    """

    def __init__(self, averaged: TruncatedResNet50, model: TruncatedResNet50, horizon: int) -> None:
        self.model = averaged
        self._horizon = horizon
        self._averaged: list[Tensor] = []
        self._newest: list[Tensor] = []
        for average, newest in zip(averaged.parameters(), model.parameters(), strict=True):
            if newest.requires_grad:
                self._averaged.append(average)
                self._newest.append(newest)
            average.requires_grad_(False)
        self._share = torch.ones((), device=self._newest[0].device)

    def begin_step(self, step: int) -> None:
        """Sets the share of the step's result in the average.

        Args:
            step: the number of earlier steps.
        """
        self._share.fill_(1 / min(step + 1, self._horizon))

    @torch.no_grad()
    def update(self) -> None:
        """Adds the weights after a step. A CUDA graph can capture it, because the share is a tensor."""
        differences = torch._foreach_sub(self._newest, self._averaged)  # type: ignore[arg-type]
        torch._foreach_mul_(differences, self._share)
        torch._foreach_add_(self._averaged, differences)

    @torch.no_grad()
    def estimate_norms(self, batches: Iterable[Tensor], normalisation: str) -> None:
        """Sets the statistics of the batch norms that are not frozen to their means over these batches.

        Args:
            batches: uint8 images (n, H, W) on the device, each batch of the same size.
            normalisation: see `forward`.
        """
        self.model.train()
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm) and module.training]
        self.model.eval()  # dropout too
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        for earlier, images_NHW in enumerate(batches):
            for norm in norms:
                norm.momentum = 1 / (earlier + 1)  # the mean over the batches
            forward(self.model, as_grey(images_NHW), normalisation)
        self.model.eval()
