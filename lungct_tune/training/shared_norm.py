"""Batch norm over the whole batch of a group of workers on CPUs, where torch's SyncBatchNorm does not run.

If each worker normalised by its own share of the batch, the number of workers would change what is learned: with 8
workers and batch 32, a share is 4 images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
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
        normalised_NC: Tensor = _SharedNorm.apply(features_NC, self.weight, self.bias, self.eps)
        return normalised_NC


class _SharedNorm(torch.autograd.Function):
    """Batch normalisation with one message between the workers in each direction.

    Two all-reduces each, which autograd could derive, take four times as long: most of a step on small images.
    """

    @staticmethod
    def forward(ctx: Any, features_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
        own_variance_C, own_mean_C = torch.var_mean(features_NC.float(), _all_but_channels(features_NC), correction=0)
        variances_WC, means_WC = _of_each_worker(own_variance_C, own_mean_C)
        mean_C = means_WC.mean(0)
        variance_C = (variances_WC + (means_WC - mean_C).square()).mean(0)
        ctx.save_for_backward(features_NC, weight_C, mean_C, torch.rsqrt(variance_C + eps))
        return F.batch_norm(features_NC, mean_C, variance_C, weight_C, bias_C, training=False, eps=eps)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_NC: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Ioffe and Szegedy, Batch Normalization (2015), section 3, with means over the batches of all workers."""
        features_NC, weight_C, mean_C, scale_C = ctx.saved_tensors
        shape = [1, -1, *[1] * (features_NC.ndim - 2)]
        others = _all_but_channels(features_NC)
        standard_NC = (features_NC.float() - mean_C.view(shape)) * scale_C.view(shape)
        bias_gradient_C = gradient_NC.float().sum(others)
        weight_gradient_C = (gradient_NC * standard_NC).sum(others)
        sums_2WC = _of_each_worker(bias_gradient_C, weight_gradient_C)
        values = features_NC.numel() // features_NC.shape[1]
        offset_C, slope_C = (sums_WC.mean(0).view(shape) / values for sums_WC in sums_2WC)
        features_gradient_NC = (gradient_NC - offset_C - standard_NC * slope_C) * (weight_C * scale_C).view(shape)
        return features_gradient_NC.to(features_NC.dtype), weight_gradient_C, bias_gradient_C, None


def _all_but_channels(features_NC: Tensor) -> list[int]:
    return [0, *range(2, features_NC.ndim)]


def _of_each_worker(*own_C: Tensor) -> Tensor:
    """Several figures of each channel, of each worker: (figures, workers, C). The same on all workers."""
    own = torch.stack(own_C)
    found = own.new_empty(dist.get_world_size() * len(own), own.shape[1])
    dist.all_gather_into_tensor(found, own)
    return found.view(-1, *own.shape).transpose(0, 1)
