"""One training of one configuration: its epochs, its predictions and its state, in plain PyTorch.

What predicts, and what is kept, is the average of the weights over about the last epoch (`WeightAverage`).

Runs alone (in a notebook) or on all workers of a torch.distributed process group, each with its share of every batch.
All random numbers follow from the seed and the number of the epoch, so a checkpoint needs no random state. On CPUs a
training by one or two workers that was interrupted and continued gives the same result as an uninterrupted one. With
more, its figures differ in their last digits: DistributedDataParallel arranges the gradients anew after its first step,
and so adds those of the workers in another order. On GPUs it has the same batches and augmentations, but some kernels
of cuDNN and PyTorch add in an order that changes from run to run. There figures differ in their last digits too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.models import preprocessing
from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.pretrained import load_backbone
from lungct_tune.models.truncated_resnet import TruncatedResNet50
from lungct_tune.training.augmentation import Augmentation
from lungct_tune.training.batches import on_device
from lungct_tune.training.graphed_step import GraphedStep
from lungct_tune.training.shared_norm import share_norms
from lungct_tune.training.weight_average import WeightAverage

LABEL_SMOOTHING = 0.1
GRADIENT_NORM = 1.0
"""Largest norm of the gradient over all parameters; longer gradients are clipped to it."""
IMAGES_FOR_NORMS = (64, 256, 4096)
"""Batch-norm statistics are estimated from so many training images: roughly, after an epoch, and after the last one."""
WARM_UP_SHARE = 0.05
"""Share of all steps in which the learning rates rise to their peak. After it they fall along a cosine."""


class NotFiniteLoss(ArithmeticError):
    """A loss or gradient was infinite or not a number; the message names the epoch and the step."""


class Trainer:
    """One training of one configuration on this worker, together with all workers of the process group.

    Every worker calls the constructor and every method at the same time, with the same arguments. The trainer seeds
    torch's global generators at the start and again at every epoch.

    Args:
        configuration: the hyperparameters to train with.
        images_NHW: all images, uint8 grey, square; on `device`, or on the CPU (also memory-mapped). From the CPU, each
            batch is moved to `device`.
        labels_N: the class of each image, int64.
        train_indices: indices of the training images.
        classes: number of classes.
        epochs: length of the learning-rate schedule, and the largest number of epochs.
        batch_size: images of one step over all workers together, at most all training images. In each epoch, images
            that do not fill a batch are left out.
        seed: the seed of all random numbers; not negative.
        normalisation: a name in `NORMALISATIONS`.
        backbone_state: pretrained weights from `read_weights`; None starts from random weights.
        device: where to train.
        alone: train on this worker only, even if it is in a process group.

    Raises:
        ValueError: the batch cannot be shared evenly among the workers, or gives a worker fewer than two images.
        WeightsError: the weights do not fit.
    """

    def __init__(
        self,
        configuration: Hyperparameters,
        *,
        images_NHW: Tensor,
        labels_N: Tensor,
        train_indices: Tensor | np.ndarray | Sequence[int],
        classes: int,
        epochs: int,
        batch_size: int,
        seed: int,
        normalisation: str,
        backbone_state: Mapping[str, Tensor] | None,
        device: torch.device | str,
        alone: bool = False,
    ) -> None:
        self.device = torch.device(device)
        together = dist.is_initialized() and not alone
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.images_NHW = images_NHW
        self.labels_N = labels_N.to(self.device)
        self.train_indices = torch.as_tensor(train_indices, dtype=torch.int64)
        self.share = _share(batch_size, len(self.train_indices), self.world)
        self.steps = len(self.train_indices) // (self.share * self.world)
        self.epochs = epochs
        self.epoch = 0
        """Finished epochs."""
        self.seed = seed
        self.normalisation = normalisation
        self.augmentation = Augmentation.of(configuration)
        self.classes = classes

        torch.backends.cudnn.benchmark = True  # all steps have the same shapes
        torch.manual_seed(seed)
        model = TruncatedResNet50(
            configuration.truncation_depth,
            configuration.frozen_depth,
            configuration.dropout,
            classes,
            mirrored=configuration.mirrored,
            initialise=backbone_state is None,
        )
        if backbone_state is not None:
            load_backbone(model, backbone_state)
        model = model.to(self.device).to(memory_format=torch.channels_last)
        averaged = copy.deepcopy(model)
        self.model, self.network = _in_group(model, self.device, self.world)
        self.average = WeightAverage(averaged, self.model, self.steps)
        self._norms_of = (-1, 0)
        """The epoch for whose averaged weights the batch-norm statistics were estimated."""
        self.precision = preprocessing.training_precision_for(self.device)
        """What the backbone computes in while it is trained."""
        # not in a group, whose workers would have to capture NCCL; not with a scaler, which reads from the GPU
        self._graphed = self.device.type == "cuda" and self.world == 1 and self.precision != torch.float16
        self.optimizer = _optimizer(self.model, configuration, capturable=self._graphed)
        self._step = GraphedStep(self._train_step) if self._graphed else self._train_step
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        """Scales the loss, so that small gradients are not 0 in float16; does nothing in other precisions."""

    def train_epoch(self) -> float:
        """Trains one epoch, and returns its mean loss over all workers.

        Raises:
            NotFiniteLoss: a loss or gradient is not finite; raised on all workers at the end of the epoch.
            RuntimeError: all epochs of the schedule are done.
        """
        if self.epoch == self.epochs:
            raise RuntimeError(f"all {self.epochs} epochs of this training are done")
        torch.manual_seed(_mix(self.seed, self.epoch, 1 + self.rank))  # dropout differs between workers
        indices_SN, matrices_SN23 = self._plan_epoch()
        labels_SN = self.labels_N[indices_SN.to(self.device)]
        self.network.train()
        health = []  # stays on the device: reading a loss would wait for all work that is queued there
        for step, images_NHW in enumerate(on_device(self.images_NHW, indices_SN, self.device)):
            earlier = self.epoch * self.steps + step
            self._set_learning_rates((earlier + 0.5) / (self.epochs * self.steps))
            self.average.begin_step(earlier)
            health.append(self._step(images_NHW, labels_SN[step], matrices_SN23[step]))
        health_S2 = torch.stack(health)
        if self.world > 1:
            dist.all_reduce(health_S2)
        health_S2 = health_S2.cpu() / self.world
        self._check(health_S2)
        self.epoch += 1
        return health_S2[:, 0].mean().item()

    @torch.inference_mode()
    def probabilities(
        self,
        indices: Tensor | np.ndarray | Sequence[int],
        images_NHW: Tensor | None = None,
        *,
        rough: bool = False,
    ) -> np.ndarray:
        """Class probabilities of these images, float32 (len(indices), classes), in their order, on every worker.

        Exactly one worker computes each image. The probabilities are those of the averaged weights.

        Args:
            indices: of the images.
            images_NHW: other images than those of the training.
            rough: before the last epoch, do not average with the mirror images, and estimate the batch-norm statistics
                from 64 images instead of 256 (docs/benchmarks.md, "The pipeline's share").
        """
        self._estimate_norms(rough)
        self.average.model.mirrored = self.model.mirrored and not (rough and self.epoch < self.epochs)
        images_NHW = self.images_NHW if images_NHW is None else images_NHW
        rows = torch.as_tensor(indices, dtype=torch.int64, device=images_NHW.device)
        mine = rows[self.rank :: self.world]
        longest = math.ceil(len(rows) / self.world)
        probabilities_NC = torch.zeros(longest, self.classes, device=self.device)
        start, batches = 0, mine.split(self.share) if len(mine) else ()
        for batch_nHW in on_device(images_NHW, batches, self.device):
            batch = slice(start, start + len(batch_nHW))
            probabilities_NC[batch] = forward(self.average.model, as_grey(batch_nHW), self.normalisation).softmax(dim=1)
            start = batch.stop
        everyones = [probabilities_NC]
        if self.world > 1:
            everyones = [torch.empty_like(probabilities_NC) for _ in range(self.world)]
            dist.all_gather(everyones, probabilities_NC)
        return torch.stack(everyones, dim=1).flatten(0, 1)[: len(rows)].cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        """The state that a training needs to continue, the same on every worker and for any number of workers.

        It has the model, the averaged weights, the optimizer, the scaler and the number of finished epochs. Learning
        rates and random numbers follow from these. As in torch, the tensors are not copies: save them before the next
        epoch.
        """
        return {
            "model": self.model.state_dict(),
            "averaged": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict` of a training with the same configuration, data and seed."""
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state.get("averaged", state["model"]))  # version 0.1 has no average
        self._norms_of = (-1, 0)
        # the groups follow from the configuration and the device
        own_groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own_groups})
        if self._graphed:
            self._step = GraphedStep(self._train_step)  # the optimizer's state lies elsewhere now
        if state.get("scaler"):  # it is empty in other precisions: the state may be of another kind of GPU
            self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]

    def model_state(self) -> dict[str, Tensor]:
        """A copy of the averaged weights as a `TruncatedResNet50`'s state, contiguous on the CPU."""
        self._estimate_norms()
        return {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in self.average.model.state_dict().items()
        }

    def _estimate_norms(self, rough: bool = False) -> None:
        """Estimates the batch-norm statistics for the averaged weights, unless they are those of this epoch.

        Every worker does it with the same images, so the result is the same for any number of workers.
        """
        few, many, at_the_end = IMAGES_FOR_NORMS
        most = at_the_end if self.epoch == self.epochs else few if rough else many
        if self._norms_of >= (self.epoch, most):
            return
        generator = torch.Generator().manual_seed(_mix(self.seed, 0, 0, 0))
        order, batch = torch.randperm(len(self.train_indices), generator=generator), self.share * self.world
        batches = max(1, min(most, len(order)) // batch)
        rows_BN = self.train_indices[order[: batches * batch]].view(batches, batch)
        images = on_device(self.images_NHW, rows_BN.to(self.images_NHW.device), self.device)
        self.average.estimate_norms(images, self.normalisation)
        self._norms_of = self.epoch, most

    def _plan_epoch(self) -> tuple[Tensor, Tensor]:
        """This worker's images (S, n) and augmentation matrices (S, n, 2, 3) for every step of the epoch.

        All workers draw whole batches and take their share, so the batches do not depend on the number of workers. They
        are drawn and moved to the device once per epoch, so no step waits for a transfer.
        """
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch, 0))
        batch = self.share * self.world
        order = torch.randperm(len(self.train_indices), generator=generator)[: self.steps * batch]
        matrices_M23 = self.augmentation.draw(len(order), generator)
        mine = slice(self.rank, None, self.world)
        indices_SN = self.train_indices[order].view(self.steps, batch)[:, mine]
        matrices_SN23 = matrices_M23.view(self.steps, batch, 2, 3)[:, mine]
        return indices_SN.to(self.images_NHW.device), matrices_SN23.to(self.device)

    def _train_step(self, images_NHW: Tensor, labels_N: Tensor, matrices_N23: Tensor) -> Tensor:
        """Trains one step on this worker's share of a batch; returns loss and gradient norm (2,), on the device."""
        grey_N1HW = self.augmentation.apply(as_grey(images_NHW), matrices_N23)
        logits_NC = forward(self.network, grey_N1HW, self.normalisation, self.precision)
        loss = F.cross_entropy(logits_NC, labels_N, label_smoothing=LABEL_SMOOTHING)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = clip_grad_norm_(learning, GRADIENT_NORM)
        self.scaler.step(self.optimizer)  # not if gradients have overflowed
        self.scaler.update()
        self.average.update()
        return torch.stack([loss.detach(), norm])

    def _set_learning_rates(self, progress: float) -> None:
        for group in self.optimizer.param_groups:
            learning_rate = group["peak_lr"] * schedule(progress)
            if self._graphed:
                group["lr"].fill_(learning_rate)  # the graph reads it there
            else:
                group["lr"] = learning_rate

    def _check(self, health_S2: Tensor) -> None:
        finite_S2 = health_S2.isfinite()
        # The scaler skips a step whose gradients overflow in float16, and halves the scale. Below 1 it is no longer the
        # scale that makes them overflow.
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            finite_S2 = finite_S2[:, :1]
        broken_S = ~finite_S2.all(dim=1)
        if broken_S.any():
            step = int(broken_S.int().argmax())
            loss, norm = health_S2[step].tolist()
            raise NotFiniteLoss(
                f"loss {loss:g}, gradient norm {norm:g} in epoch {self.epoch + 1}, step {step + 1} of {self.steps}; "
                "use lower learning rates, or check the initial weights"
            )


def schedule(progress: float) -> float:
    """Share of the peak learning rate at `progress` (0 to 1) of all steps: a linear warm-up, then half a cosine."""
    if progress < WARM_UP_SHARE:
        return progress / WARM_UP_SHARE
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)))


def _share(batch_size: int, images: int, world: int) -> int:
    """Images of one step on one worker."""
    if batch_size % world:
        raise ValueError(f"batch size {batch_size} cannot be shared by {world} workers; take a multiple of {world}")
    share = min(batch_size, images) // world
    if share < 2:
        raise ValueError(
            f"batch size {batch_size}, {images} training images and {world} workers give {share} images per worker; "
            "batch normalisation needs at least 2"
        )
    return share


def _in_group(model: TruncatedResNet50, device: torch.device, world: int) -> tuple[TruncatedResNet50, nn.Module]:
    """The model that learns, and the module to call: the model itself or its data-parallel wrapper."""
    if world == 1:
        return model, model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    else:  # SyncBatchNorm needs a GPU
        share_norms(model)
    devices = [device] if device.type == "cuda" else None
    return model, DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def _optimizer(model: TruncatedResNet50, configuration: Hyperparameters, *, capturable: bool) -> torch.optim.AdamW:
    """AdamW with separate learning rates for backbone and head; no weight decay for biases and norms (vectors).

    Args:
        capturable: keep the learning rates on the GPU, where a CUDA graph reads them.
    """
    groups = []
    for part, peak_lr in ((model.backbone, configuration.backbone_lr), (model.head, configuration.head_lr)):
        learning = [p for p in part.parameters() if p.requires_grad]
        matrices, vectors = [p for p in learning if p.ndim > 1], [p for p in learning if p.ndim == 1]
        groups.append({"params": matrices, "peak_lr": peak_lr, "weight_decay": configuration.weight_decay})
        groups.append({"params": vectors, "peak_lr": peak_lr, "weight_decay": 0.0})
    if capturable:
        device = next(model.parameters()).device
        groups = [{**group, "lr": torch.zeros((), device=device)} for group in groups]
    return torch.optim.AdamW(groups, fused=True, capturable=capturable)


def _mix(*numbers: int) -> int:
    """Mixes several numbers into one seed; similar numbers give unrelated seeds (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
