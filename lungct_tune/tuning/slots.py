"""Slots: warm groups of Ray Train workers that run one trial after another.

Ray's documented way of combining Tune and Train starts a Train run for every trial: seven processes that
each import their libraries, some 17 s on two cores. Here one Tune actor keeps one Train run for as long as
the search lasts, and its workers take trials, an epoch at a time, from a mailbox. Data, pretrained weights,
process group and CUDA context are set up once a slot. (Measured in benchmarks/further_trial.py.)
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import tune

from lungct_tune.configuration import Configuration
from lungct_tune.evaluation import OBJECTIVE, rank, validation_figures
from lungct_tune.experiment import Experiment, trial_folder
from lungct_tune.tuning.material import Material

START_ATTEMPTS = 20
"""How often Ray Train tries to start a group of workers, 30 s each, before a cluster without room is an error."""


class SlotLost(RuntimeError):
    """The workers of a slot are gone; Tune's failure policy builds another slot for the trial."""


@dataclass(frozen=True)
class SlotPlan:
    """All that a slot needs to know: the same for every slot of a search."""

    experiment: Experiment
    material: Material
    train_indices: np.ndarray
    valid_indices: np.ndarray
    workers: int
    resources_per_worker: dict[str, float]


class Mailbox:
    """Where a slot leaves orders and its workers leave answers; a letter is read once it is there."""

    def __init__(self) -> None:
        self._letters: defaultdict[tuple[str, int], asyncio.Future[Any]] = defaultdict(asyncio.Future)

    async def put(self, kind: str, turn: int, letter: Any) -> None:
        self._letters[kind, turn].set_result(letter)

    async def get(self, kind: str, turn: int) -> Any:
        return await asyncio.shield(self._letters[kind, turn])


class Slot(tune.Trainable):  # type: ignore[misc]
    """Ray Tune's side of a slot: an actor that Tune reuses for one trial after another.

    A trial is `{"number": int, "seed": int, "configuration": {...}}`; a step is one epoch of it. The workers
    keep a trial's state on the experiment's storage after every epoch and look there first, so a trial goes
    on where it was, whoever runs it: this slot, the one that replaces it, or one of a resumed search.
    """

    def setup(self, config: dict[str, Any], plan: SlotPlan) -> None:  # type: ignore[override]
        # Returns before the workers are up: Tune starts the next slot only when this one is set up
        self._order, self._turn = config, 0
        self._error: Exception | None = None
        self._mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=1000).remote()
        self._run = threading.Thread(target=self._fit, args=(plan,), daemon=True)
        self._run.start()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._order = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Has the workers run the trial's next epoch.

        Raises:
            SlotLost: the workers ended instead; promptly, whatever ended them.
        """
        self._turn += 1
        self._mailbox.put.remote("order", self._turn, self._order)
        answer = self._mailbox.get.remote("answer", self._turn)
        while not ray.wait([answer], timeout=1)[0]:
            if not self._run.is_alive():
                raise SlotLost(f"the workers ended: {self._error or 'without an error'}") from self._error
        return dict(ray.get(answer))

    def cleanup(self) -> None:
        """Lets the workers go. Those that do not leave in time lose their mailbox, and with it their run."""
        self._mailbox.put.remote("order", self._turn + 1, None)
        self._run.join(timeout=10)
        ray.kill(self._mailbox)
        self._run.join(timeout=10)

    def _fit(self, plan: SlotPlan) -> None:
        from ray.train import FailureConfig, RunConfig
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            run_worker,
            train_loop_config={"plan": plan, "mailbox": self._mailbox},
            scaling_config=scaling(plan.workers, plan.resources_per_worker),
            run_config=RunConfig(
                name=uuid.uuid4().hex[:8],
                storage_path=f"{plan.experiment.uri}/slots",
                # one owner of recovery: a slot that loses a worker ends, and Tune builds the next one
                failure_config=FailureConfig(  # type: ignore[call-arg]
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=START_ATTEMPTS
                ),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # kept for step(), which raises it where Tune sees it
            self._error = error


def scaling(workers: int, resources_per_worker: dict[str, float]) -> Any:
    """Ray Train's description of a group of workers."""
    from ray.train import ScalingConfig

    gpu = resources_per_worker.get("GPU", 0) > 0
    return ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=resources_per_worker)


def run_worker(config: dict[str, Any]) -> None:
    """A worker's life in a slot: take an order, run an epoch of that trial, answer, until there is no order."""
    import torch

    plan, mailbox = config["plan"], config["mailbox"]
    torch.set_num_threads(max(1, int(plan.resources_per_worker["CPU"])))
    first = ray.train.get_context().get_world_rank() == 0
    trial: _Trial | None = None
    for turn in range(1, 2**62):
        order = ray.get(mailbox.get.remote("order", turn))
        if order is None:
            return
        if trial is None or trial.number != order["number"]:
            trial = None  # the model that was is gone before the next one comes
            trial = _Trial(plan, order, writes=first)
        answer = trial.run_epoch()
        if first:
            ray.get(mailbox.put.remote("answer", turn, answer))


class _Trial:
    """A worker's part of one trial: its training, its history, its files."""

    def __init__(self, plan: SlotPlan, order: dict[str, Any], writes: bool) -> None:
        import torch

        self.number, self._order = order["number"], order
        self._plan, self._writes = plan, writes
        self._training = plan.material.training(
            Configuration(**order["configuration"]), plan.train_indices, order["seed"]
        )
        self._history: list[dict[str, float]] = []
        self._told = 0
        if (kept := plan.experiment.read(f"{trial_folder(self.number)}/last.pt")) is not None:
            state = torch.load(io.BytesIO(kept), weights_only=True, map_location="cpu")
            if state["order"] == order:  # else it belongs to a trial of that number in another study
                self._training.load_state_dict(state["training"])
                self._history = state["history"]

    def run_epoch(self) -> dict[str, Any]:
        """Trains and validates an epoch, keeps the trial's state, and says what the study should know."""
        from lungct_tune.training import NotFiniteLoss

        try:
            if self._training.epoch < self._plan.material.epochs:
                self._history.append(self._train_and_validate())
                self._keep()
        except NotFiniteLoss as error:
            return {OBJECTIVE: 0.0, "diverged": str(error), "done": True}
        *earlier, last = self._history[self._told :]
        self._told = len(self._history)
        return last | {"earlier": earlier, "done": self._training.epoch >= self._plan.material.epochs}

    def _train_and_validate(self) -> dict[str, float]:
        from lungct_tune.training import NotFiniteLoss

        began = time.perf_counter()
        loss = self._training.train_epoch()
        trained = time.perf_counter()
        probabilities_NC = self._training.probabilities(self._plan.valid_indices)
        if not np.isfinite(probabilities_NC).all():
            raise NotFiniteLoss(f"predictions are not finite after epoch {self._training.epoch}")
        figures = validation_figures(self._plan.material.labels_N[self._plan.valid_indices], probabilities_NC)
        validated = time.perf_counter()
        seconds = {"train_s": trained - began, "valid_s": validated - trained}
        return {"epoch": self._training.epoch, "train_loss": loss} | figures | seconds

    def _keep(self) -> None:
        """Best weights first, then the state that counts them: a crash between the two repeats the epoch."""
        import safetensors.torch
        import torch

        if not self._writes:
            return
        folder, last = trial_folder(self.number), self._history[-1]
        if max(self._history, key=rank) is last:
            metadata = {"epoch": str(last["epoch"]), OBJECTIVE: str(last[OBJECTIVE])}
            self._plan.experiment.write(
                f"{folder}/best.safetensors", safetensors.torch.save(self._training.model_state(), metadata)
            )
        stream = io.BytesIO()
        state = {"order": self._order, "training": self._training.state_dict(), "history": self._history}
        torch.save(state, stream)
        self._plan.experiment.write(f"{folder}/last.pt", stream.getbuffer())
