"""Pretrained weights for the backbone: found, read and loaded, or refused with a reason; never silently random."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import ResNet50_Weights

from lungct_tune.errors import UserError
from lungct_tune.models.truncated_resnet import ACTIVATIONS, TruncatedResNet50, layers_before, truncate

_IMAGENET = ResNet50_Weights.IMAGENET1K_V2
_PREFIXES = re.compile(r"^((module|backbone|model)\.)+")
_NAMED_MISFITS = 5


class WeightsError(UserError):
    """Weights could not be had, or do not fit; the message says why and what can be done."""


def read_weights(source: str) -> dict[str, Tensor]:
    """The pretrained tensors on the CPU, by torchvision's key names, without the classifier `fc`.

    Args:
        source: "imagenet" for torchvision's ResNet50 (IMAGENET1K_V2, from torch's hub cache or downloaded into
            it), else the path of a `.safetensors` or a torch file. A torch file may hold the tensors themselves
            or a dict with them under "state_dict" or "model". The prefixes "module.", "backbone." and "model."
            are dropped.

    Raises:
        WeightsError: no such file, no network, or nothing in it that can be read without running its code.
    """
    try:
        content = _download() if source == "imagenet" else _read(Path(source))
    except Exception as error:  # a broken file or network fails in every way that decoders and sockets know
        raise WeightsError(_complaint(f"weights {source!r}: {type(error).__name__}: {error}")) from error
    tensors = {_PREFIXES.sub("", key): value for key, value in content.items() if isinstance(value, Tensor)}
    state = {key: value for key, value in tensors.items() if not key.startswith("fc.")}
    if not state:
        raise WeightsError(_complaint(f"weights {source!r}: holds no tensors of a backbone"))
    return state


def read_covering(source: str, depth: int) -> dict[str, Tensor]:
    """`read_weights`, refused unless they reach to truncation depth `depth`: known before any worker starts.

    Raises:
        WeightsError: they cannot be had, or cover less.
    """
    state = read_weights(source)
    if (covered := covered_depth(state)) < depth:
        raise WeightsError(
            f"weights {source!r} cover truncation depths up to {covered}, and the search space goes to {depth}. "
            "Narrow truncation_depth in it (search_spaces/shallow.yaml ends at 22; mind its fixed_trials), give "
            "weights of the whole network, or start from random ones with --weights none"
        )
    return state


def covered_depth(state: Mapping[str, Tensor]) -> int:
    """The deepest truncation depth for which `state` has every tensor in its right shape; 0 if there is none."""
    backbone = truncate(ACTIVATIONS)
    lacking = {key.rpartition(".")[0] for key in _misfits(backbone.state_dict(), state)}
    depths = range(1, ACTIVATIONS + 1)
    return sum(lacking.isdisjoint(layers_before(backbone, depth)) for depth in depths)


def load_backbone(model: TruncatedResNet50, state: Mapping[str, Tensor]) -> None:
    """Copy into `model.backbone` every tensor that the cut keeps; those behind the cut are ignored.

    Batch normalisation's `num_batches_tracked`, which inference and training here never read, may be missing.

    Raises:
        WeightsError: a tensor that the cut keeps is missing or has another shape; the model is untouched.
    """
    kept = model.backbone.state_dict()
    misfits = _misfits(kept, state)
    if misfits:
        named = ", ".join(f"{key} ({why})" for key, why in list(misfits.items())[:_NAMED_MISFITS])
        more = f" and {len(misfits) - _NAMED_MISFITS} more" if len(misfits) > _NAMED_MISFITS else ""
        covered = covered_depth(state)
        raise WeightsError(
            _complaint(
                f"the weights do not fit {len(misfits)} of the {len(kept)} tensors that the cut keeps: {named}{more}. "
                f"They cover truncation depths up to {covered}."
            )
        )
    model.backbone.load_state_dict({key: state[key] for key in kept if key in state}, strict=False)


def _misfits(kept: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """The keys of `kept` that `state` cannot fill, each with the reason."""
    return {
        key: "missing" if key not in state else f"shape {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in kept.items()
        if not key.endswith("num_batches_tracked") and (key not in state or state[key].shape != tensor.shape)
    }


def _download() -> dict[str, Any]:
    return dict(_IMAGENET.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True))


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        content = content.get(wrapper, content)
    return dict(content)


def _complaint(what: str) -> str:
    """`what` went wrong, and the three ways out."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(_IMAGENET.url).name)
    return (
        f"{what}\nWays out: (1) save {_IMAGENET.url} as {cached} ; "
        "(2) --weights FILE, a .pth or .safetensors with torchvision's key names for at least the layers that the "
        "cut keeps; (3) --weights none starts from random weights."
    )
