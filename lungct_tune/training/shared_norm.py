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
        normalised_NC: Tensor = _SharedNorm.apply(features_NC, self.weight, self.bias, self)
        return normalised_NC


class _SharedNorm(torch.autograd.Function):
    """Batch normalisation by PyTorch's CPU kernels, with one message between the workers in each direction.

    Two all-reduces each, which autograd could derive, take several times as long, and so do the formulas in Python.
    """

    @staticmethod
    def forward(ctx: Any, features_NC: Tensor, weight_C: Tensor, bias_C: Tensor, norm: SharedBatchNorm) -> Tensor:
        """With momentum 0, so the running statistics stay as they are."""
        own_C = torch.batch_norm_update_stats(features_NC, norm.running_mean, norm.running_var, momentum=0.0)
        means_WC, variances_WC = _of_each_worker(*own_C)
        mean_C = means_WC.mean(0)
        variance_C = (variances_WC + (means_WC - mean_C).square()).mean(0)
        ctx.save_for_backward(features_NC, weight_C, mean_C, variance_C)
        ctx.eps = norm.eps
        return F.batch_norm(features_NC, mean_C, variance_C, weight_C, bias_C, training=False, eps=norm.eps)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_NC: Tensor) -> tuple[Tensor | None, ...]:
        """Ioffe and Szegedy, Batch Normalization (2015), section 3, with means over the batches of all workers."""
        features_NC, weight_C, mean_C, variance_C = ctx.saved_tensors
        direct_NC, weight_gradient_C, bias_gradient_C = torch.ops.aten.native_batch_norm_backward(
            *(gradient_NC, features_NC, weight_C, mean_C, variance_C, None, None, False, ctx.eps, [True, True, True])
        )  # as if mean and variance were constants
        of_weight_WC, of_bias_WC = _of_each_worker(weight_gradient_C, bias_gradient_C)
        scale_C = -weight_C * torch.rsqrt(variance_C + ctx.eps) / (features_NC.numel() // len(weight_C))
        slope_C, offset_C = scale_C * of_weight_WC.mean(0), scale_C * of_bias_WC.mean(0)
        through_NC = F.batch_norm(features_NC, mean_C, variance_C, slope_C, offset_C, training=False, eps=ctx.eps)
        return direct_NC + through_NC, weight_gradient_C, bias_gradient_C, None


def _of_each_worker(*own_C: Tensor) -> Tensor:
    """Several figures of each channel, of each worker: (figures, workers, C). The same on all workers."""
    own = torch.stack(own_C)
    found = own.new_empty(dist.get_world_size() * len(own), own.shape[1])
    dist.all_gather_into_tensor(found, own)
    return found.view(-1, *own.shape).transpose(0, 1)
