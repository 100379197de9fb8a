"""The cut of ResNet50: where it lies, what it keeps, that it computes what the whole network computes there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from lungct_tune.models.pretrained import load_backbone
from lungct_tune.models.truncated_resnet import (
    ACTIVATIONS,
    ToFloat32,
    TruncatedResNet50,
    activation_nodes,
    layers_before,
    truncate,
)

DEPTHS = range(1, ACTIVATIONS + 1)


def block_features(width: int, blocks: int, size: int, size_before: int) -> list[tuple[int, int]]:
    """(channels, size) of a stage's ReLUs, as design.md's table has them: the stride is in the 3x3 convolution."""
    first = [(width, size_before), (width, size), (4 * width, size)]
    return first + [(width, size), (width, size), (4 * width, size)] * (blocks - 1)


TABLE = [
    (64, 112),
    *block_features(64, 3, 56, 56),
    *block_features(128, 4, 28, 56),
    *block_features(256, 6, 14, 28),
    *block_features(512, 3, 7, 14),
]


@pytest.fixture(scope="module")
def whole() -> nn.Module:
    """torchvision's ResNet50 with statistics as if trained, so that every activation has something to show."""
    torch.manual_seed(0)
    network = resnet50().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def test_names_the_activations_as_the_design_counts_them() -> None:
    nodes = activation_nodes()
    assert len(nodes) == ACTIVATIONS == len(TABLE)
    assert nodes[:4] == ("relu", "layer1.0.relu", "layer1.0.relu_1", "layer1.0.relu_2")
    assert (nodes[9], nodes[10], nodes[19], nodes[21]) == (
        "layer1.2.relu_2",
        "layer2.0.relu",
        "layer2.3.relu",
        "layer2.3.relu_2",
    )
    assert nodes[22].startswith("layer3.0") and nodes[40].startswith("layer4.0") and nodes[48] == "layer4.2.relu_2"


def test_every_cut_has_the_shape_of_the_table_and_no_more_parameters_than_the_next() -> None:
    parameters = []
    for depth in DEPTHS:
        backbone = truncate(depth)
        features = backbone(torch.empty(2, 3, 224, 224, device="meta"))
        channels, size = TABLE[depth - 1]
        assert features.shape == (2, channels, size, size), depth
        parameters.append(sum(p.numel() for p in backbone.parameters()))
    assert parameters == sorted(set(parameters))
    assert parameters[-1] == sum(p.numel() for p in resnet50().parameters()) - 2048 * 1000 - 1000


def test_nothing_behind_the_cut_remains() -> None:
    for depth in DEPTHS:
        backbone = truncate(depth)
        with FlopCounterMode(display=False) as counter:
            backbone(torch.empty(2, 3, 64, 64, device="meta"))
        ran = {name.removeprefix("Backbone.") for name in counter.get_flop_counts()}
        convolutions = {name for name, layer in backbone.named_modules() if isinstance(layer, nn.Conv2d)}
        assert convolutions == ran & convolutions, "layers behind the cut"
        assert {key.rpartition(".")[0] for key in backbone.state_dict()} == set(layers_before(depth))
    assert not any(key.startswith(("layer2.3.conv2", "layer3", "fc")) for key in truncate(20).state_dict())


def test_every_cut_computes_what_the_whole_network_computes_there(whole: nn.Module) -> None:
    images_NCHW = torch.randn(2, 3, 64, 64)
    every = create_feature_extractor(whole, list(activation_nodes())).eval()
    for module in every.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # else a ReLU inside a block could overwrite what is compared
    with torch.inference_mode():
        expected = every(images_NCHW)
        for depth, node in enumerate(activation_nodes(), start=1):
            model = TruncatedResNet50(depth, initialise=False).eval()
            load_backbone(model, whole.state_dict())
            torch.testing.assert_close(model.backbone(images_NCHW), expected[node], msg=node)


def test_the_activations_are_those_that_torchvision_traces() -> None:
    with torch.device("meta"):
        nodes, _ = get_graph_node_names(resnet50())
    assert activation_nodes() == tuple(node for node in nodes if node.split(".")[-1].startswith("relu"))


def test_a_worker_does_not_import_torchvision() -> None:
    """It takes 2 s of CPU, most of it for torch._dynamo, in each of a search's workers."""
    workers = "lungct_tune.tuning.workers, lungct_tune.training.trainer, lungct_tune.tuning.retrain"
    heavy = "torchvision", "torch._dynamo", "optuna", "matplotlib", "sklearn"
    code = f"import sys, {workers}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_random_backbone_starts_as_torchvisions_does_and_follows_the_global_seed() -> None:
    torch.manual_seed(1)
    model = TruncatedResNet50(22)
    torch.manual_seed(1)
    again = TruncatedResNet50(22).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    fresh = resnet50().state_dict()
    for key, value in model.backbone.state_dict().items():
        if value.ndim > 1:
            assert value.std().item() == pytest.approx(fresh[key].std().item(), rel=0.1), key
        else:
            assert torch.equal(value, fresh[key]), key


def test_the_head_is_pooling_norm_and_three_dense_layers_with_dropout() -> None:
    model = TruncatedResNet50(20, dropout=0.3, classes=5)
    kinds = [type(layer) for layer in model.head]
    dense, between = nn.Linear, [nn.ReLU, nn.Dropout]
    assert kinds == [
        nn.AdaptiveAvgPool2d,
        nn.Flatten,
        ToFloat32,
        nn.BatchNorm1d,
        dense,
        *between,
        dense,
        *between,
        dense,
    ]
    assert {layer.p for layer in model.head if isinstance(layer, nn.Dropout)} == {0.3}
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_an_image_and_its_mirror_image_have_the_same_logits_and_features() -> None:
    torch.manual_seed(0)
    single, images_NCHW = TruncatedResNet50(6), torch.randn(3, 3, 32, 32)
    single(images_NCHW)  # statistics that are not those of the start
    mirrored = TruncatedResNet50(6, mirrored=True)
    mirrored.load_state_dict(single.state_dict())
    pooled: list[Tensor] = []
    mirrored.head.get_submodule("pool").register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    with torch.no_grad():
        torch.testing.assert_close(mirrored.eval()(images_NCHW), mirrored(images_NCHW.flip(3)))
        torch.testing.assert_close(pooled[0], pooled[1].flip(3), msg="maps of the features would not fit the image")
        assert not torch.allclose(single.eval()(images_NCHW), single(images_NCHW.flip(3)), rtol=0.01)
        mirrored.head.get_submodule("norm").train()
        mirrored(images_NCHW)
    torch.testing.assert_close(pooled[2], single.backbone(images_NCHW), msg="norms would not fit single images")


@pytest.mark.parametrize(("depth", "frozen"), [(0, 0), (50, 0), (20, -1), (20, 21)])
def test_refuses_depths_that_do_not_exist(depth: int, frozen: int) -> None:
    with pytest.raises(ValueError, match="depth is"):
        TruncatedResNet50(depth, frozen)


def test_freezing_inside_a_block_takes_only_what_the_activation_depends_on() -> None:
    model = TruncatedResNet50(22, frozen_depth=11)  # the first ReLU of layer2.0; its shortcut is not before it
    learning = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("conv1", "bn1", "layer1", "layer2.0.conv1", "layer2.0.bn1")) for name in learning)
    assert {"layer2.0.conv2.weight", "layer2.0.bn2.bias", "layer2.0.downsample.0.weight"} <= learning
    norms = {name: norm for name, norm in model.train().named_modules() if isinstance(norm, nn.BatchNorm2d)}
    assert not norms["backbone.layer2.0.bn1"].training and norms["backbone.layer2.0.downsample.1"].training


@pytest.mark.parametrize("frozen", [1, 10, 11, 20])
def test_autograd_keeps_nothing_of_frozen_layers(frozen: int) -> None:
    assert saved_for_backward(TruncatedResNet50(frozen, frozen_depth=frozen).backbone) == []
    model = TruncatedResNet50(20, frozen_depth=frozen)
    saved = saved_for_backward(model)
    frozen_weights = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert frozen_weights.isdisjoint(tensor.data_ptr() for tensor in saved)
    assert len(saved) < len(saved_for_backward(TruncatedResNet50(20, frozen_depth=frozen - 1)))


def saved_for_backward(network: nn.Module) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(2, 3, 64, 64))
    return saved
