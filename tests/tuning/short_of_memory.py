"""A slot on a Ray of its own that lets its workers have little memory. test_out_of_memory.py runs it as a script.

It prints a line for each trial: how it ended and why, and what the user is told.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from trials import order, slot_plan

from lungct_tune.tuning.mailbox import opened_mailbox
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.slot_actor import SlotActor

if TYPE_CHECKING:
    import torch

FREE = get_system_memory() - get_used_memory()
"""Half of it may be taken. A worker takes at most nine tenths, if nobody kills it."""

PIECE = 2**27


def main(folder: Path, phantoms: Path) -> None:
    class Scripted(SharedDataset):
        """In each start of a worker, the next file in a folder says what happens to it."""

        def images_on(self, device: torch.device) -> torch.Tensor:
            happens = next(iter(sorted((folder / "script").iterdir())), None)
            if happens is not None:
                name = happens.read_text()
                happens.unlink()
                self._fill_the_memory() if name == "node" else self._fill_the_gpu()
            return super().images_on(device)

        def _fill_the_memory(self) -> None:
            kept = []
            while len(kept) * PIECE < 0.9 * FREE:
                kept.append(np.ones(PIECE, np.uint8))
                time.sleep(0.1)
            raise AssertionError("Ray's memory monitor kills nobody")

        def _fill_the_gpu(self) -> None:
            import torch

            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError:
                raise RuntimeError("the capture of the CUDA graph has failed")  # noqa: B904  # as torch raises it

    plan = slot_plan(folder, phantoms, epochs=2)
    (folder / "script").mkdir()
    with opened_mailbox("one") as mailbox:
        slot = SlotActor(replace(plan, dataset=Scripted(**vars(plan.dataset)), mailbox=mailbox))
        for number, script in enumerate((["node"], ["node", "node"], ["gpu"], [])):
            for start, happens in enumerate(script):
                (folder / "script" / str(start)).write_text(happens)
            report: Any = ray.get(slot.run(order(number)))
            while not report.is_last:
                report = ray.get(slot.run(order(number)))
            assert not list((folder / "script").iterdir())
            print(f"trial {number}: {report.outcome.value}: {report.reason}", *ray.get(mailbox.exchange.remote(set())))
        slot.end()


if __name__ == "__main__":
    os.environ |= {
        "RAY_memory_usage_threshold": f"{1 - FREE / 2 / get_system_memory():.4f}",
        "RAY_memory_monitor_refresh_ms": "1000",  # memory of what it has killed is free when it looks again
        "RAY_min_memory_free_bytes": "-1",  # otherwise the threshold is at least total memory less this
    }
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
