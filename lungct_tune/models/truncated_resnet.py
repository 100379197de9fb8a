"""ResNet50 truncated after one of its 49 ReLUs, with a small head on top: the network that a trial trains.

The published model keeps "20 of the 50 activation layers" of ResNet50. Here they are counted in the order in which the
graph runs them (1 in the stem, 3 in each of 16 bottleneck blocks). So the depth is one integer to search over.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor, fx, nn
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

ACTIVATIONS = 49
"""ReLUs in ResNet50. The 50th activation of the published count is the softmax."""

HEAD_WIDTHS = (256, 128)
"""Units of the two hidden dense layers. The publication names three dense layers but not their widths."""


class TruncatedResNet50(nn.Module):
    """ResNet50 up to its k-th ReLU, then pooling, batch normalisation and three dense layers.

    `backbone` has only the layers that the k-th ReLU depends on; the other layers are neither stored nor computed. The
    keys of its state are torchvision's. Its initial weights are random, as in torchvision's ResNet, and come from
    torch's global generator. `lungct_tune.models.pretrained.load_backbone` loads pretrained weights.

    The layers that the f-th ReLU depends on are frozen. They need no gradients, autograd stores none of their
    activations, and their batch normalisation uses its loaded statistics, unchanged, even in training.

    Args:
        truncation_depth: k, 1 to 49.
        frozen_depth: f, 0 (all layers are trained) to k (only the head is trained).
        dropout: probability of dropping a unit between the dense layers, 0 to below 1.
        classes: number of outputs.

    Raises:
        ValueError: k or f is out of range.
    """

    def __init__(self, truncation_depth: int, frozen_depth: int = 0, dropout: float = 0.5, classes: int = 4):
        super().__init__()
        if not 0 <= frozen_depth <= truncation_depth:
            raise ValueError(
                f"frozen depth is {frozen_depth}; allowed are 0 to the truncation depth {truncation_depth}"
            )
        self.backbone = truncate(truncation_depth).to_empty(device="cpu")
        _initialise(self.backbone)
        channels = [m for m in self.backbone.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features
        self.head = _head(channels, dropout, classes)

        frozen = layers_before(self.backbone, frozen_depth) if frozen_depth else []
        self.frozen = [f"backbone.{layer}" for layer in frozen]
        """Names of the modules that stay in eval mode and get no gradients."""
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        self.train()

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, classes), float32, of normalised float images (N, 3, H, W).

        Under autocast only the backbone is computed in lower precision. The head costs next to nothing, and logits of
        eight significant bits would often be equal.
        """
        features_NCHW = self.backbone(images_NCHW)["features"]
        is_lower = features_NCHW.dtype != torch.float32
        with torch.autocast(features_NCHW.device.type, enabled=False) if is_lower else nullcontext():
            logits_NC: Tensor = self.head(features_NCHW)
        return logits_NC

    def train(self, mode: bool = True) -> TruncatedResNet50:
        """Like `nn.Module.train`, but frozen layers stay in eval mode."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self


def truncate(truncation_depth: int) -> fx.GraphModule:
    """ResNet50 up to its k-th ReLU, on the meta device; its output is {"features": (N, C, h, w)}.

    Building and tracing 25 million parameters takes a second; on the meta device it takes a tenth of that.

    Raises:
        ValueError: the depth is not in 1 to 49.
    """
    if not 1 <= truncation_depth <= ACTIVATIONS:
        raise ValueError(f"truncation depth is {truncation_depth}; ResNet50 can be cut at 1 to {ACTIVATIONS}")
    with torch.device("meta"):
        network = resnet50()
    node = activation_nodes()[truncation_depth - 1]
    backbone: fx.GraphModule = create_feature_extractor(network, {node: "features"})
    return backbone


@cache
def activation_nodes() -> tuple[str, ...]:
    """Names of the 49 ReLUs of ResNet50 in the order they run, as torchvision's graph nodes ("layer1.0.relu_2")."""
    with torch.device("meta"):
        _, nodes = get_graph_node_names(resnet50())
    return tuple(node for node in nodes if node.split(".")[-1].startswith("relu"))


def layers_before(backbone: fx.GraphModule, activation: int) -> list[str]:
    """Names of the modules that the n-th ReLU (from 1) of a truncated network depends on, with itself, in order."""
    calls = [node for node in backbone.graph.nodes if node.op == "call_module"]
    relus = [node for node in calls if isinstance(backbone.get_submodule(node.target), nn.ReLU)]
    needed = {relus[activation - 1]}
    for node in reversed(backbone.graph.nodes):  # a graph lists inputs before nodes, so one pass is enough
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node.target for node in calls if node in needed]


def _initialise(backbone: nn.Module) -> None:
    """Initialises the layers as `torchvision.models.resnet.ResNet.__init__` does."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


class ToFloat32(nn.Module):
    """Turns its input into float32."""

    def forward(self, pooled_NC: Tensor) -> Tensor:
        return pooled_NC.float()


def _head(channels: int, dropout: float, classes: int) -> nn.Sequential:
    wide, narrow = HEAD_WIDTHS
    return nn.Sequential(
        OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            float32=ToFloat32(),
            norm=nn.BatchNorm1d(channels),
            dense1=nn.Linear(channels, wide),
            relu1=nn.ReLU(inplace=True),
            dropout1=nn.Dropout(dropout),
            dense2=nn.Linear(wide, narrow),
            relu2=nn.ReLU(inplace=True),
            dropout2=nn.Dropout(dropout),
            logits=nn.Linear(narrow, classes),
        )
    )
