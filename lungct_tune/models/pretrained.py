"""Reads pretrained weights and loads them into the backbone. Raises an error if they do not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lungct_tune.errors import UserError
from lungct_tune.models.truncated_resnet import ACTIVATIONS, TruncatedResNet50, truncate

_PREFIXES = re.compile(r"^((module|backbone|model)\.)+")
_NAMED_MISFITS = 5


class WeightsError(UserError):
    """Weights cannot be read, or do not fit; the message says why and what to do."""


def read_weights(source: str) -> dict[str, Tensor]:
    """Reads the pretrained tensors to the CPU, by torchvision's key names, without the classifier `fc`.

    Args:
        source: "imagenet" for torchvision's ResNet50 (IMAGENET1K_V2, from torch's hub cache or downloaded into
            it), else the path of a `.safetensors` or a torch file. A torch file has the tensors, or a dict with the
            tensors under "state_dict" or "model". The prefixes "module.", "backbone." and "model." are dropped.

    Raises:
        WeightsError: there is no such file, no network, or no tensor that can be read without running code in the file.
    """
    try:
        content = _download() if source == "imagenet" else _read(Path(source))
    except Exception as error:  # decoders and sockets raise many kinds of errors
        raise WeightsError(_complaint(f"weights {source!r}: {type(error).__name__}: {error}")) from error
    tensors = {_PREFIXES.sub("", key): value for key, value in content.items() if isinstance(value, Tensor)}
    state = {key: value for key, value in tensors.items() if not key.startswith("fc.")}
    if not state:
        raise WeightsError(_complaint(f"weights {source!r}: has no tensors of a backbone"))
    return state


def read_covering(source: str, depth: int) -> dict[str, Tensor]:
    """Reads weights as `read_weights` does, and checks before any worker starts that they cover depth `depth`.

    Raises:
        WeightsError: the weights cannot be read, or cover less.
    """
    state = read_weights(source)
    if (covered := covered_depth(state)) < depth:
        raise WeightsError(
            f"weights {source!r} cover truncation depths up to {covered}, and the search space goes to {depth}. "
            "Reduce truncation_depth in it and in its fixed_trials (search_spaces/shallow.yaml ends at 22), give "
            "weights of the whole network, or start from random weights with --weights none"
        )
    return state


def covered_depth(state: Mapping[str, Tensor]) -> int:
    """The largest truncation depth for which `state` has every tensor in the right shape; 0 if there is none."""
    depths = range(1, ACTIVATIONS + 1)
    return sum(not _misfits(truncate(depth).state_dict(), state) for depth in depths)


def load_backbone(model: TruncatedResNet50, state: Mapping[str, Tensor]) -> None:
    """Copies every tensor of the truncated network into `model.backbone`; tensors behind the cut are ignored.

    `num_batches_tracked` of batch normalisation may be missing, since neither training nor inference reads it here.

    Raises:
        WeightsError: a tensor of the truncated network is missing or has another shape; the model is unchanged.
    """
    kept = model.backbone.state_dict()
    misfits = _misfits(kept, state)
    if misfits:
        named = ", ".join(f"{key} ({why})" for key, why in list(misfits.items())[:_NAMED_MISFITS])
        more = f" and {len(misfits) - _NAMED_MISFITS} more" if len(misfits) > _NAMED_MISFITS else ""
        covered = covered_depth(state)
        raise WeightsError(
            _complaint(
                f"the weights do not fit {len(misfits)} of the truncated network's {len(kept)} tensors: {named}{more}. "
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


def _imagenet() -> Any:
    from torchvision.models import ResNet50_Weights  # not above: it takes 2 s, and no worker needs it

    return ResNet50_Weights.IMAGENET1K_V2


def _download() -> dict[str, Any]:
    return dict(_imagenet().get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True))


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        content = content.get(wrapper, content)
    return dict(content)


def _complaint(what: str) -> str:
    """The message for an error: `what` is wrong, and three ways to fix it."""
    url = _imagenet().url
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    return (
        f"{what}\nThree ways to fix this: (1) save {url} as {cached} ; "
        "(2) give --weights FILE, a .pth or .safetensors with torchvision's key names, for at least the layers of the "
        "truncated network; (3) start from random weights with --weights none."
    )
