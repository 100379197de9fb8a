"""Measures how fast this machine trains and predicts at a few depths, in processes of its own, and keeps the result.

`python -m lungct_tune.training.pace JSON` measures in this process and prints the result as JSON. `measured_pace`
starts as many of these processes as will work side by side in a search, since they share memory and caches. A process
of its own also gives a GPU's memory back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Self, TypeVar

from lungct_tune.data.cache import default_cache
from lungct_tune.files import replace_file

if TYPE_CHECKING:
    from lungct_tune.training.trainer import Trainer

T = TypeVar("T")

KNOTS = (10, 22, 40)
"""The last depths of ResNet50's first three stages. Between them the time of a step is nearly linear in the depth."""

STEPS = 3
"""Steps of the short epoch that is timed, after others that are not: they set up the kernels."""

MOST_S = 120.0
"""How long the measuring may take."""

CPU_FLOPS = 4e10
"""Operations a second that a slow CPU core does."""

IMAGE_FLOPS = 8.2e9
"""Operations of the whole ResNet50 for one image of 224 pixels. They grow with the area, and nearly evenly with the
depth."""

SPIN_TIMEOUT_S = 20.0

STEP_S = 1.0
"""Aim for the length of a measured step on a CPU. Where a whole one would be longer, it has fewer images."""


@dataclass(frozen=True)
class Pace:
    """The speed of one worker, measured at a few depths. Other depths are interpolated.

    Where a worker has one thread of a CPU, these are seconds of that CPU. Other work there changes them little.
    """

    device: str
    """Its name: "CPU" or the GPU's, such as "NVIDIA L4"."""
    start_s: float
    """CPU seconds of a process until its first training has run."""
    build_s: float
    """Seconds to build the trainer of the deepest network."""
    images: int
    """Images of a step on one worker."""
    depths: tuple[int, ...]
    """Ascending."""
    step_s: tuple[float, ...]
    """Seconds of a training step at each of the depths, with no frozen layer."""
    predict_s: tuple[float, ...]
    """Seconds to predict one image at each of the depths."""

    def step(self, depth: int, frozen: int = 0) -> float:
        """Seconds of a training step. Frozen layers need no backward pass and no optimizer."""
        least = self.images * self.predict(depth)
        saved = self._between(self.step_s, frozen) - self.images * self.predict(frozen) if frozen else 0.0
        return max(least, self._between(self.step_s, depth) - max(0.0, saved))

    def predict(self, depth: int) -> float:
        """Seconds to predict one image."""
        return self._between(self.predict_s, depth)

    def _between(self, seconds: Sequence[float], depth: int) -> float:
        """Linear between the measured depths, and outside of them along the nearest two, never below 0."""
        points = list(zip(self.depths, seconds, strict=True))
        if len(points) == 1:
            return seconds[0] * (depth + 1) / (self.depths[0] + 1)
        (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if depth <= pair[1][0]), (points[-2], points[-1]))
        return max(y0 / (x0 + 1), y0 + (y1 - y0) * (depth - x0) / (x1 - x0))

    @classmethod
    def mean(cls, paces: Sequence[Self]) -> Self:
        """The mean of processes that measured the same at the same time."""
        first = paces[0]
        return cls(
            device=first.device,
            start_s=fmean(pace.start_s for pace in paces),
            build_s=fmean(pace.build_s for pace in paces),
            images=first.images,
            depths=first.depths,
            step_s=tuple(map(fmean, zip(*(pace.step_s for pace in paces), strict=True))),
            predict_s=tuple(map(fmean, zip(*(pace.predict_s for pace in paces), strict=True))),
        )


@dataclass(frozen=True)
class PaceOrder:
    """What to measure. The cache has one entry for each of these, and for each version of torch."""

    image_size: int
    images: int
    """Images of a step on one worker."""
    depths: tuple[int, ...]
    threads: int
    """CPU threads of a worker."""
    gpu: bool
    beside: int
    """Workers that work at the same time on this machine."""
    device: str
    """The name of the device: an entry of another machine's with the same home folder is not used."""

    @property
    def file(self) -> Path:
        """The entry in the user's cache."""
        key = json.dumps([asdict(self), version("torch"), 3])
        return default_cache() / f"pace-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


SPIN = """
import os, sys, time
os.nice(int(os.environ.get("RAY_worker_niceness", 15)))
began = time.perf_counter()
while time.process_time() < 0.3:
    pass
print((time.perf_counter() - began) / 0.3)
"""
"""A program that keeps a CPU busy at the priority of Ray's workers, and prints how much longer that took."""


def measured_slowdown(processes: int) -> float:
    """How many times longer so many processes take because other work shares their CPUs: 1 on a quiet machine."""
    command = [sys.executable, "-S", "-E", "-c", SPIN]
    spinning = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(processes)]
    try:
        return max(1.0, fmean(float(process.communicate(timeout=SPIN_TIMEOUT_S)[0]) for process in spinning))
    except (subprocess.TimeoutExpired, ValueError):
        return SPIN_TIMEOUT_S
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def depths_to_measure(lowest: int, deepest: int) -> tuple[int, ...]:
    """The depths that are measured for a space: its ends, and the ends of ResNet50's stages between them."""
    return tuple(sorted({lowest, deepest, *(depth for depth in KNOTS if lowest < depth < deepest)}))


def device_name(*, gpu: bool) -> str:
    """The name of this machine's device: its first GPU's, or that of its processor.

    Does not import torch, so that a plan with a measured pace is printed at once.
    """
    if gpu:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            names = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            return names.splitlines()[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError):
            return "GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {os.cpu_count()} CPUs"


def measured_pace(order: PaceOrder) -> Pace | None:
    """The pace of this machine, from the cache or measured now, which takes seconds; None if that fails."""
    try:
        return _read(Pace, order.file.read_bytes())
    except (OSError, ValueError, TypeError):
        pass
    paces = _measure_side_by_side(order)
    if not paces:
        return None
    pace = Pace.mean(paces)
    try:
        order.file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(order.file, json.dumps(asdict(pace)).encode())
    except OSError:
        pass  # without a cache it is measured again
    return pace


def _measure_side_by_side(order: PaceOrder) -> list[Pace]:
    """Measures in `order.beside` processes at the same time; empty if one of them fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(order.threads)}
    processes = []
    try:
        for _ in range(order.beside):
            command = [sys.executable, "-m", __name__, json.dumps(asdict(order))]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
            )
        outputs = [process.communicate(timeout=MOST_S)[0] for process in processes]
        return [_read(Pace, output) for output in outputs]
    except (OSError, subprocess.TimeoutExpired, ValueError, TypeError):
        return []
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(order: PaceOrder) -> Pace:
    """Measures in this process: trains a short epoch at each depth, and predicts."""
    import torch

    torch.set_num_threads(order.threads)
    device = torch.device("cuda" if order.gpu and torch.cuda.is_available() else "cpu")
    _measure_depth(order, order.depths[0], device)  # the first training imports more, and sets up the device
    start_s = time.process_time()
    results = [_measure_depth(order, depth, device) for depth in order.depths]
    build_s, step_s, predict_s = zip(*results, strict=True)
    return Pace(order.device, start_s, build_s[-1], order.images, order.depths, step_s, predict_s)


def _measure_depth(order: PaceOrder, depth: int, device: Any) -> tuple[float, float, float]:
    """Seconds to build a trainer, of a training step, and to predict one image."""
    import torch

    from lungct_tune.config.hyperparameters import Hyperparameters
    from lungct_tune.training.trainer import Trainer

    images, steps, on_gpu = order.images, STEPS, device.type == "cuda"
    if not on_gpu:
        flops = 3 * IMAGE_FLOPS * (order.image_size / 224) ** 2 * (depth + 3) / 52  # a backward pass costs two forward
        images = max(min(4, images), min(images, int(STEP_S * CPU_FLOPS * order.threads / flops)))
        steps = STEPS if images == order.images else 1
    count = images * steps
    generator = torch.Generator().manual_seed(0)
    size = (count, order.image_size, order.image_size)
    images_NHW = torch.randint(256, size, dtype=torch.uint8, generator=generator).to(device)

    def finish() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.process_time() if not on_gpu and order.threads == 1 else time.perf_counter()

    began = finish()
    trainer = Trainer(
        Hyperparameters(truncation_depth=depth),
        images_NHW=images_NHW,
        labels_N=torch.arange(count) % 4,
        train_indices=range(count),
        classes=4,
        epochs=_untimed_epochs(steps, on_gpu) + 1,
        batch_size=images,
        seed=0,
        normalisation="imagenet",
        backbone_state=None,
        device=device,
    )
    built = finish()
    step_s = _step_seconds(trainer, on_gpu, finish)
    trainer.probabilities(range(count))  # estimates batch-norm statistics too
    before = finish()
    trainer.probabilities(range(count))
    return built - began, step_s * order.images / images, (finish() - before) / count


def _untimed_epochs(steps: int, on_gpu: bool) -> int:
    """Epochs before the one that is timed: on a GPU until a step is captured as a graph, as long as many steps."""
    from lungct_tune.training.graphed_step import WARM_UP_STEPS

    return math.ceil((WARM_UP_STEPS + 1) / steps) if on_gpu else 1


def _step_seconds(trainer: Trainer, on_gpu: bool, finish: Callable[[], float]) -> float:
    """Seconds of a training step.

    Args:
        trainer: has no epochs yet.
        finish: waits for the device, and returns the time.
    """
    began = finish()
    for _ in range(_untimed_epochs(trainer.steps, on_gpu)):
        trainer.train_epoch()
    seconds = finish() - began
    if not on_gpu and seconds >= STEPS * STEP_S:
        return seconds / trainer.steps  # set-up is little of so slow an epoch
    began = finish()
    trainer.train_epoch()
    return (finish() - began) / trainer.steps


def _read(kind: type[T], content: bytes | str) -> T:
    values: dict[str, Any] = json.loads(content)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


if __name__ == "__main__":
    print(json.dumps(asdict(measure(_read(PaceOrder, sys.argv[1])))))
