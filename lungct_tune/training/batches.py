"""Brings batches of images to the device, also of images that do not fit there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

AHEAD = 2
"""Batches that are gathered while the device works on an earlier one."""


def on_device(images_NHW: Tensor, batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yields the images of each batch on the device, uint8 (n, H, W).

    Args:
        images_NHW: all images, on the device or on the CPU, there also memory-mapped.
        batches: the indices of each batch, on the device of the images.
    """
    if images_NHW.device.type == device.type:
        for indices_n in batches:
            yield images_NHW[indices_n]
    else:
        for images_nHW in gathered_ahead(images_NHW, batches, pinned=device.type == "cuda"):
            yield images_nHW.to(device, non_blocking=True)


def gathered_ahead(images_NHW: Tensor, batches: Iterable[Tensor], *, pinned: bool) -> Iterator[Tensor]:
    """Yields the images of each batch on the CPU. A thread gathers the next batches in the meantime.

    Args:
        pinned: gather into page-locked memory, from which a GPU copies while the CPU goes on. PyTorch does not reuse
            that memory before the copy has ended (https://docs.pytorch.org, "CUDA semantics", pinned memory).
    """

    def gather(indices_n: Tensor) -> Tensor:
        out_nHW = torch.empty(len(indices_n), *images_NHW.shape[1:], dtype=images_NHW.dtype, pin_memory=pinned)
        return torch.index_select(images_NHW, 0, indices_n, out=out_nHW)

    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="gather") as thread:
        for indices_n in batches:
            waiting.append(thread.submit(gather, indices_n))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
