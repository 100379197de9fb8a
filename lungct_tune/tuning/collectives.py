"""Values that the workers of a group give each other through torch.distributed. A worker alone keeps its own."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """The number of this worker, from 0, and how many there are."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(mine: T) -> list[T]:
    """The values of all workers, by rank."""
    import torch.distributed as dist

    _, world = rank_and_world()
    if world == 1:
        return [mine]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, mine)
    return gathered


def of_first(value: T) -> T:
    """The first worker's value, on all workers."""
    import torch.distributed as dist

    sent = [value]
    if rank_and_world()[1] > 1:
        dist.broadcast_object_list(sent, src=0)
    return sent[0]
