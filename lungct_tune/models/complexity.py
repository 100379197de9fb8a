"""Counts the parameters and floating-point operations of a truncated network, by stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from lungct_tune.models.truncated_resnet import TruncatedResNet50

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")


@dataclass(frozen=True)
class ModelProfile:
    """The cost of a truncated network, for each of the `STAGES` that it has."""

    parameters: dict[str, int]
    flops: dict[str, int]
    """Floating-point operations for one image; a multiplication and an addition count as two."""

    @property
    def totals(self) -> tuple[int, int]:
        """Parameters and floating-point operations of all stages."""
        return sum(self.parameters.values()), sum(self.flops.values())


@cache
def model_profile(truncation_depth: int, classes: int, image_size: int) -> ModelProfile:
    """Counts parameters and operations on the meta device, without computing (torch.utils.flop_counter)."""
    model = TruncatedResNet50(truncation_depth, classes=classes).to("meta").eval()
    images_NCHW = torch.empty(1, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images_NCHW)
    parameters, flops = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, 0)
    for name, parameter in model.named_parameters():
        parameters[_stage(name)] += parameter.numel()
    for name, module in model.named_modules():
        if not list(module.children()):
            flops[_stage(name)] += sum(counter.get_flop_counts().get(f"TruncatedResNet50.{name}", {}).values())
    present = [stage for stage in STAGES if parameters[stage]]
    return ModelProfile({stage: parameters[stage] for stage in present}, {stage: flops[stage] for stage in present})


def _stage(name: str) -> str:
    """The stage of a module or parameter of a `TruncatedResNet50`: "backbone.layer2.3.conv1" is in "layer2"."""
    top, _, rest = name.partition(".")
    part = rest.partition(".")[0]
    return "head" if top == "head" else part if part in STAGES else "stem"
