"""Runs a training step as a CUDA graph: one launch instead of several hundred.

With small batches a GPU waits for its kernels to be launched. A graph that was captured once is launched as a whole
(https://docs.pytorch.org/docs/stable/notes/cuda.html, "Whole-network capture").
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from weakref import WeakSet

import torch
from torch import Tensor

WARM_UP_STEPS = 3
"""Calls before the capture. In them cuDNN chooses its algorithms, and the optimizer makes its state."""

_captured: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
"""The graphs of this process. They use the same memory, because one runs after the other (as the folds of a trial)."""


class GraphedStep:
    """A function of tensors on a GPU, for calls that all have the same shapes.

    The first calls run the function as it is, on a side stream. The next captures it, and from then on it is replayed
    on copies of the arguments. The tensors that the function reads and writes besides, such as weights, must stay where
    they are.
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step = step
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """A copy of what the function returns.

        Raises:
            torch.OutOfMemoryError: the function or its graph needs more memory than the GPU has.
        """
        self._calls += 1
        if self._calls <= WARM_UP_STEPS:
            return self._on_side_stream(inputs)
        if self._graph is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            graph, stream = torch.cuda.CUDAGraph(), _side_stream(inputs[0].device)
            pool = next((other.pool() for other in _captured), None)
            # other threads may use the GPU meanwhile: they gather batches and write states
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._output = self._step(*self._inputs)
            self._graph = graph
            _captured.add(graph)
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._output.clone()

    def _on_side_stream(self, inputs: tuple[Tensor, ...]) -> Tensor:
        device = inputs[0].device
        usual, side = torch.cuda.current_stream(device), _side_stream(device)
        side.wait_stream(usual)
        with torch.cuda.stream(side):
            output = self._step(*inputs)
        usual.wait_stream(side)
        return output


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all steps of a process: cuBLAS keeps up to 32 MiB for every stream that it was used on."""
    return torch.cuda.Stream(device)
