"""ResNet50 truncated after one of its 49 ReLUs, with a small head on top: the network that a trial trains.

The published model keeps "20 of the 50 activation layers" of ResNet50. Here they are counted in the order in which the
network runs them (1 in the stem, 3 in each of 16 bottleneck blocks). So the depth is one integer to search over.

The layers are those of torchvision's ResNet50, and have its names (a test compares both at every depth). They are
written out here because importing torchvision takes 2 s of CPU in every worker, and cutting its network by tracing
takes 0.1 to 0.5 s for every trial.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext

import torch
from torch import Tensor, nn

STAGES = {"layer1": (64, 3), "layer2": (128, 4), "layer3": (256, 6), "layer4": (512, 3)}
"""The width and the number of the bottleneck blocks of each stage (He et al., CVPR 2016, table 1)."""

EXPANSION = 4
"""The output channels of a bottleneck block, relative to its width."""

ACTIVATIONS = 1 + 3 * sum(blocks for _, blocks in STAGES.values())
"""ReLUs in ResNet50: 49. The 50th activation of the published count is the softmax."""

HEAD_WIDTHS = (256, 128)
"""Units of the two hidden dense layers. The publication names three dense layers but not their widths."""


_WITH_WEIGHTS = (nn.Conv2d, nn.BatchNorm2d)


class TruncatedResNet50(nn.Module):
    """ResNet50 up to its k-th ReLU, then pooling, batch normalisation and three dense layers.

    `backbone` has only the layers that the k-th ReLU depends on; the other layers are neither stored nor computed. The
    keys of its state are torchvision's. Its initial weights are random, as in torchvision's ResNet, and come from
    torch's global generator. `lungct_tune.models.pretrained.load_backbone` loads pretrained weights.

    The layers that the f-th ReLU depends on are frozen. They need no gradients, autograd stores none of their
    activations, and their batch normalisation uses its loaded statistics, unchanged, even in training.

    If `mirrored`, the features in eval mode are the mean of those of the image and of its mirror image, turned back.
    So the two have the same logits, as far as rounding allows.

    Args:
        truncation_depth: k, 1 to 49.
        frozen_depth: f, 0 (all layers are trained) to k (only the head is trained).
        dropout: probability of dropping a unit between the dense layers, 0 to below 1.
        classes: number of outputs.
        mirrored: see above.
        initialise: whether to draw the backbone's initial weights. Without, they are undefined until weights are
            loaded; 24 million random numbers that are overwritten then would take 0.3 s.

    Raises:
        ValueError: k or f is out of range.
    """

    def __init__(
        self,
        truncation_depth: int,
        frozen_depth: int = 0,
        dropout: float = 0.5,
        classes: int = 4,
        *,
        mirrored: bool = False,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        self.mirrored = mirrored
        if not 0 <= frozen_depth <= truncation_depth:
            raise ValueError(
                f"frozen depth is {frozen_depth}; allowed are 0 to the truncation depth {truncation_depth}"
            )
        self.backbone = truncate(truncation_depth).to_empty(device="cpu")
        _initialise(self.backbone, random=initialise)
        self.head = _head(self.backbone.channels, dropout, classes)

        frozen = layers_before(frozen_depth) if frozen_depth else []
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
        if self.mirrored and not self.head.get_submodule("norm").training:  # its statistics are of single images
            both_NCHW, n = self.backbone(torch.cat([images_NCHW, images_NCHW.flip(3)])), images_NCHW.shape[0]
            features_NCHW = (both_NCHW[:n] + both_NCHW[n:].flip(3)) / 2
        else:
            features_NCHW = self.backbone(images_NCHW)
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


class Backbone(nn.Module):
    """ResNet50 up to its k-th ReLU. Maps images (N, 3, H, W) to features (N, channels, h, w).

    Raises:
        ValueError: k is not in 1 to 49.
    """

    def __init__(self, truncation_depth: int) -> None:
        super().__init__()
        if not 1 <= truncation_depth <= ACTIVATIONS:
            raise ValueError(f"truncation depth is {truncation_depth}; ResNet50 can be cut at 1 to {ACTIVATIONS}")
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.channels, left = 64, truncation_depth - 1
        if left:
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for stage, (width, blocks) in STAGES.items():
            stride = 1 if stage == "layer1" else 2  # the stem has already halved the image twice
            made: list[Bottleneck] = []
            while left > 0 and len(made) < blocks:
                made.append(Bottleneck(self.channels, width, 1 if made else stride, min(left, 3)))
                self.channels, left = made[-1].channels, left - 3
            if made:
                self.add_module(stage, nn.Sequential(*made))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features_NCHW: Tensor = images_NCHW
        for layer in self.children():  # in the order in which they were added
            features_NCHW = layer(features_NCHW)
        return features_NCHW


class Bottleneck(nn.Module):
    """torchvision's bottleneck block (stride in the 3x3 convolution) up to its first, second or third ReLU."""

    def __init__(self, channels: int, width: int, stride: int, activations: int) -> None:
        super().__init__()
        self.activations, self.channels = activations, width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        if activations > 1:
            self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
        if activations > 2:
            self.channels = EXPANSION * width
            self.conv3 = nn.Conv2d(width, self.channels, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(self.channels)
            self.downsample: nn.Module = nn.Identity()
            if channels != self.channels:
                conv = nn.Conv2d(channels, self.channels, 1, stride=stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(self.channels))

    def forward(self, before_NCHW: Tensor) -> Tensor:
        features_NCHW: Tensor = self.relu(self.bn1(self.conv1(before_NCHW)))
        if self.activations > 1:
            features_NCHW = self.relu(self.bn2(self.conv2(features_NCHW)))
        if self.activations > 2:
            features_NCHW = self.bn3(self.conv3(features_NCHW))
            features_NCHW += self.downsample(before_NCHW)
            features_NCHW = self.relu(features_NCHW)
        return features_NCHW


def truncate(truncation_depth: int) -> Backbone:
    """ResNet50 up to its k-th ReLU, on the meta device, so without weights.

    Raises:
        ValueError: the depth is not in 1 to 49.
    """
    with torch.device("meta"):
        return Backbone(truncation_depth)


def activation_nodes() -> tuple[str, ...]:
    """Names of the 49 ReLUs of ResNet50 in the order they run, as torchvision's graph nodes ("layer1.0.relu_2")."""
    in_block = ("relu", "relu_1", "relu_2")
    blocks = (f"{stage}.{block}" for stage, (_, blocks) in STAGES.items() for block in range(blocks))
    return ("relu", *(f"{block}.{relu}" for block in blocks for relu in in_block))


def layers_before(activation: int) -> list[str]:
    """Names of the layers with weights that the n-th ReLU (from 1) depends on, in order."""
    return [name for name, layer in truncate(activation).named_modules() if isinstance(layer, _WITH_WEIGHTS)]


def _initialise(backbone: Backbone, random: bool) -> None:
    """Initialises the layers as `torchvision.models.resnet.ResNet.__init__` does; without `random` only the norms."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and random:
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
