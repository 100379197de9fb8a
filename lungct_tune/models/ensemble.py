"""Several networks of one configuration as one: those of a trial's folds, with averaged calibrated probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lungct_tune.models.truncated_resnet import TruncatedResNet50


class Ensemble(nn.Module):
    """Networks whose calibrated probabilities are averaged (Lakshminarayanan et al., NeurIPS 2017).

    Its logits are those of a single network to all that uses them: softmax(logits / temperature) is the mean of the
    members' softmax(logits / temperature). The keys of its state are `members.0.backbone.conv1.weight` and so on.

    Args:
        members: networks with the same classes.
        temperature: of the calibration, the same for all members.
    """

    def __init__(self, members: Sequence[TruncatedResNet50], temperature: float) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperature = temperature

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, classes), float32, of normalised float images (N, 3, H, W)."""
        logits_MNC = torch.stack([member(images_NCHW) for member in self.members])
        log_sums_NC = (logits_MNC / self.temperature).log_softmax(dim=2).logsumexp(dim=0)
        return self.temperature * (log_sums_NC - math.log(len(self.members)))


Model = TruncatedResNet50 | Ensemble
"""What a bundle may have."""


def members_of(model: Model) -> list[TruncatedResNet50]:
    """The networks of a model: its members, or itself."""
    return list(cast(Iterable[TruncatedResNet50], model.members)) if isinstance(model, Ensemble) else [model]


def joined_states(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state of an ensemble from those of its members."""
    return {f"members.{k}.{name}": tensor for k, state in enumerate(states) for name, tensor in state.items()}
