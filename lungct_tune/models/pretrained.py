"""Reads pretrained weights and loads them into the backbone. Raises an error if they do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor

from lungct_tune.config.addresses import without_secrets
from lungct_tune.errors import UserError
from lungct_tune.files import open_file
from lungct_tune.models.truncated_resnet import ACTIVATIONS, TruncatedResNet50, truncate

MOST_BYTES = 1_500_000_000
"""Of a file of weights, unpacked. A ResNet50 has 100 MB; a checkpoint may have several networks and an optimiser."""

_MOST_TENSORS = 100_000
_LEVELS = 6  # of dictionaries inside dictionaries
_STEM = (7, 7)  # only the first convolution of a ResNet50 has kernels of this size
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Names of the children of nn.Sequential(*resnet50().children()), as in RadImageNet's files."""

_NAMED = 5  # keys that a message shows


class WeightsError(UserError):
    """Weights cannot be read, or do not fit; the message says why and what to do."""


def read_weights(source: str) -> dict[str, Tensor]:
    """Reads the pretrained tensors to the CPU, float32, by torchvision's key names, without the classifier `fc`.

    The backbone is found by its first convolution, whatever stands before `conv1.weight` in its key ("module.",
    "backbone.", "state_dict" around the tensors, ...). If there are several, as in checkpoints of contrastive
    learning, the first one is read. The names may also be the numbers of a `nn.Sequential` of ResNet50's children.

    Args:
        source: "imagenet" for torchvision's ResNet50 (IMAGENET1K_V2, from torch's hub cache or downloaded into
            it), else the path of a `.safetensors` or a torch file.

    Raises:
        WeightsError: there is no such file, no network, no backbone that can be read without running code in the
            file, or a tensor has other values than finite numbers.
    """
    try:
        tensors = dict(islice(_tensors(_download() if source == "imagenet" else _read(Path(source))), _MOST_TENSORS))
    except Exception as error:  # decoders and sockets raise many kinds of errors, and torch explains at length
        first = str(error).partition("\n")[0]
        raise WeightsError(
            _complaint(f"weights {without_secrets(source)!r}: {type(error).__name__}: {first}")
        ) from error
    wanted = truncate(ACTIVATIONS).state_dict()
    state = {name: tensor for name, tensor in _backbone(tensors).items() if name in wanted}
    if not state:
        found, names = (", ".join(list(keys)[:_NAMED]) or "none" for keys in (tensors, wanted))
        raise WeightsError(
            _complaint(f"weights {source!r}: has no tensors of a backbone. Its keys: {found}. Expected: {names}")
        )
    for name, tensor in state.items():
        if tensor.shape == wanted[name].shape and not name.endswith("num_batches_tracked"):
            if (fault := _fault(tensor)) is not None:
                raise WeightsError(_complaint(f"weights {source!r}: {name} {fault}"))
            state[name] = tensor.float()
    return state


def _tensors(content: Any, path: str = "", level: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors in dictionaries inside dictionaries, by their keys joined with dots."""
    if isinstance(content, Tensor):
        yield path, content
    elif isinstance(content, Mapping) and level < _LEVELS:
        for key, value in content.items():
            yield from _tensors(value, f"{path}.{key}" if path else str(key), level + 1)


def _backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the first ResNet50 among these, by torchvision's names; without one, nothing."""
    for stem, tensor in tensors.items():
        prefix, _, name = stem.removesuffix(".weight").rpartition(".")
        if stem.endswith(".weight") and name in ("conv1", "0") and tensor.ndim == 4 and tensor.shape[2:] == _STEM:
            start = f"{prefix}." if prefix else ""
            inside = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            if name == "conv1":
                return inside
            parts = {key: key.partition(".") for key in inside}
            return {f"{_NUMBERED.get(first, first)}.{rest}": inside[key] for key, (first, _, rest) in parts.items()}
    return {}


def _fault(tensor: Tensor) -> str | None:
    """Why a tensor cannot be weights; None if it can."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return "is sparse, quantized or without data; save it as a dense tensor"
    if not tensor.is_floating_point():
        return f"has the type {tensor.dtype}; save it as floating-point numbers"
    if not tensor.float().isfinite().all():
        return "has values that are not finite numbers"
    return None


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
        named = ", ".join(f"{key} ({why})" for key, why in list(misfits.items())[:_NAMED])
        more = f" and {len(misfits) - _NAMED} more" if len(misfits) > _NAMED else ""
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


def _read(path: Path) -> Any:
    with open_file(path, MOST_BYTES) as file:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_zipfile(file):
            with ZipFile(file) as archive:
                if (unpacked := sum(entry.file_size for entry in archive.infolist())) > MOST_BYTES:
                    raise OSError(f"{unpacked:,} bytes unpacked; at most {MOST_BYTES:,} are read")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise ValueError("it is no file of tensors that can be read without running code in it") from error


def _complaint(what: str) -> str:
    """The message for an error: `what` is wrong, and three ways to fix it."""
    url = _imagenet().url
    try:
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    except RuntimeError:  # this user has no home
        cached = Path("$TORCH_HOME", "hub", "checkpoints", Path(url).name)
    return (
        f"{what}\nThree ways to fix this: (1) save {url} as {cached} ; "
        "(2) give --weights FILE, a .pth or .safetensors of a ResNet50, for at least the layers of the "
        "truncated network; (3) start from random weights with --weights none."
    )
