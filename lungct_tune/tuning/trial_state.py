"""The states from which trials continue: copied between two epochs, and written by a thread while training goes on.

A state of an epoch consists of one file for each worker that trains models of its own. It counts only if all of them
are there, so workers never continue from different epochs. `torch.distributed.checkpoint.async_save` works the same
way, but it writes a folder through fsspec, without checksums, and every load needs a model to load into.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lungct_tune.experiment.folder import MOST_STATE_BYTES, Experiment, state_file, trial_folder
from lungct_tune.tuning.collectives import of_first, rank_and_world

if TYPE_CHECKING:
    import torch

DIGEST_BYTES = 32
"""A state starts with the sha256 of its other bytes, because torch loads many damaged files without an error."""


def saved_epochs(experiment: Experiment, number: int, files: int) -> list[int]:
    """The epochs of which a trial has a state of so many files, the newest first.

    Raises:
        StorageError: the storage refuses.
    """
    found = experiment.files(trial_folder(number))
    epochs = {int(match[1]) for path in found if (match := re.search(r"/state-(\d+)(?:-\d+)?\.pt$", path))}
    whole = [epoch for epoch in epochs if all(state_file(number, epoch, rank) in found for rank in range(files))]
    return sorted(whole, reverse=True)


def read_state(experiment: Experiment, file: str, *, each_alone: bool = False) -> dict[str, Any] | None:
    """The state in a file, on the CPU; None if there is no such file or it is damaged.

    Workers that train one model together get it from the first of them. If each read the storage, one of them might
    find another state than the others, and data-parallel training goes wrong without an error then.

    Args:
        each_alone: whether this worker trains models of its own.

    Raises:
        StorageError: the storage refuses.
    """
    import torch

    if each_alone:
        kept = _read_bytes(experiment, file)
    else:
        kept = of_first(_read_bytes(experiment, file) if rank_and_world()[0] == 0 else b"")
    if not kept:
        return None
    content = io.BytesIO(memoryview(kept)[DIGEST_BYTES:])
    state: dict[str, Any] = torch.load(content, weights_only=True, map_location="cpu")
    return state


def _read_bytes(experiment: Experiment, file: str) -> bytes:
    """A state's bytes; none if there is no such file or it is damaged."""
    kept = experiment.read(file, MOST_STATE_BYTES) or b""
    content = memoryview(kept)[DIGEST_BYTES:]
    return kept if kept[:DIGEST_BYTES] == hashlib.sha256(content).digest() else b""


def to_bytes(state: Mapping[str, Any]) -> memoryview:
    """The form of a state on storage."""
    import torch

    stream = io.BytesIO(bytes(DIGEST_BYTES))
    stream.seek(DIGEST_BYTES)
    torch.save(state, stream)
    whole = stream.getbuffer()
    whole[:DIGEST_BYTES] = hashlib.sha256(whole[DIGEST_BYTES:]).digest()
    return whole


class StateWriter:
    """Writes the states of one training on one worker, one at a time, in a thread.

    Args:
        file: the file of the state of an epoch. It may be the same for all epochs.
        epoch: of a state that is there already; 0 if there is none.

    Attributes:
        bytes: written so far.
        waited_s: how long training waited for copies so far.
    """

    def __init__(self, experiment: Experiment, file: Callable[[int], str], epoch: int = 0) -> None:
        self._experiment, self._file = experiment, file
        self._written = [epoch] if epoch else []
        self._copy: Any = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._is_dropped = False
        self.bytes, self.waited_s = 0, 0.0

    @property
    def is_idle(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    @property
    def newest(self) -> int:
        """The epoch of the newest state that has been written; 0 if there is none."""
        return self._written[-1] if self._written else 0

    def start(self, epoch: int, state: Mapping[str, Any], complete: int = 0) -> None:
        """Copies the state to memory of the host, and starts to write the copy. The writer must be idle.

        Args:
            complete: the epoch of the newest state that all workers have written. Older ones are deleted.
        """
        import torch

        began = time.perf_counter()
        self._copy = _copy_to_host(state, self._copy)
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None  # training on CPUs makes no CUDA context
        if copied:
            copied.record()
        self._thread = threading.Thread(target=self._write, args=(epoch, self._copy, copied, complete), daemon=True)
        self._thread.start()
        self.waited_s += time.perf_counter() - began

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def drop(self) -> None:
        """Notes that the trial has ended: a state that is still being written is deleted once it is there."""
        self._is_dropped = True

    def take_error(self) -> Exception | None:
        """Why the last state could not be written; None if it was, or if this has been told already."""
        error, self._error = self._error, None
        return error

    def _write(self, epoch: int, state: Any, copied: torch.cuda.Event | None, complete: int) -> None:
        try:
            if copied:
                copied.synchronize()
            content = to_bytes(state)
            self._experiment.write(self._file(epoch), content)
            self.bytes += len(content)
            self._written.append(epoch)
            if self._is_dropped:  # after the driver has deleted the others
                self._experiment.delete(self._file(epoch))
            while self._written[0] < complete:
                self._experiment.delete(self._file(self._written[0]))
                del self._written[0]
        except Exception as error:  # not only of the storage: memory may be short, too. Nobody else would see it
            self._error = error


def _copy_to_host(value: Any, into: Any) -> Any:
    """A copy of nested dicts and lists whose tensors are on the CPU, from a GPU in pinned memory.

    Args:
        into: an earlier copy of the same structure, whose memory is used again; None if there is none.
    """
    import torch

    if isinstance(value, torch.Tensor):
        if into is None:
            into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return into.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _copy_to_host(item, (into or {}).get(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy_to_host(item, into[i] if into and i < len(into) else None) for i, item in enumerate(value)]
    return value
