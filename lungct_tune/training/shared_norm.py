"""Batch norm over the whole batch of a group of workers on CPUs, where torch's SyncBatchNorm does not run.

If each worker normalised by its own share of the batch, the number of workers would change what is learned: with 8
workers and batch 32, a share is 4 images.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


def share_norms(model: nn.Module) -> None:
    """Makes each batch norm of a model a `SharedBatchNorm`, with the same weights and names."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SharedBatchNorm


class SharedBatchNorm(_BatchNorm):
    """Normalises by mean and variance over all workers, which have equal shares of the batch.

    It keeps no running statistics in training: `WeightAverage` estimates those that are used. In evaluation, and where
    it is frozen, it is a usual batch norm.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from two on will do."""

    def forward(self, features_NC: Tensor) -> Tensor:
        """Features of the same shape and dtype, (N, C) or (N, C, H, W)."""
        if not self.training:
            return super().forward(features_NC)
        dtype, features_NC = features_NC.dtype, features_NC.float()  # bfloat16 is too coarse for means and variances
        others = [0, *range(2, features_NC.ndim)]  # all dimensions but the channels
        mean_C = _mean_over_workers(features_NC.mean(others, keepdim=True))
        centred_NC = features_NC - mean_C
        variance_C = _mean_over_workers(centred_NC.square().mean(others, keepdim=True))
        scale_C = self.weight.view(mean_C.shape) * torch.rsqrt(variance_C + self.eps)
        return torch.addcmul(self.bias.view(mean_C.shape), centred_NC, scale_C).to(dtype)


def _mean_over_workers(mine: Tensor) -> Tensor:
    """The mean over the workers. Gradients flow back to all of them."""
    total: Tensor = all_reduce(mine.contiguous())
    return total / dist.get_world_size()
