"""The final retraining: the best configuration on train and validation together, evaluated once on test."""

from __future__ import annotations

import hashlib
import io
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import train

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import RetrainedModel
from lungct_tune.experiment.folder import Experiment
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.workers import START_ATTEMPTS

if TYPE_CHECKING:
    import torch

    from lungct_tune.training.trainer import Trainer

MAX_FAILURES = 3
"""How many times the retraining may lose a worker and continue from its last state."""

STATE, WEIGHTS, PREDICTIONS = "last.pt", "model.safetensors", "test_probabilities.npy"
"""The files of a retraining. The predictions are written last, so they say that it has ended."""

DIGEST_BYTES = 32
"""A state starts with the sha256 of its other bytes, because torch loads many damaged files without an error."""


class RetrainingFailed(UserError):
    """The final retraining failed for good. The message says why and how to continue."""


@dataclass(frozen=True)
class RetrainPlan:
    """The configuration of the retraining, which runs all epochs of the dataset's schedule.

    Their number is that of the winner's best epoch. Over them the learning rate falls to zero. The search's longer
    schedule would end in its middle, at a high learning rate, where the last epoch's accuracy depends on chance.
    """

    experiment: Experiment
    name: str
    """Of the folder with its files, in the experiment's `final/`."""
    dataset: SharedDataset
    """The images of train and validation, which the search's slots have too. All of them are trained on."""
    test: SharedDataset
    """The images of test, which the search's slots do not have."""
    hyperparameters: Hyperparameters
    seed: int
    checkpoint_interval: float
    """Seconds of training between two states."""
    workers: int
    resources_per_worker: dict[str, float]

    def file(self, name: str) -> str:
        return f"final/{self.name}/{name}"


def retrain_and_predict(plan: RetrainPlan) -> RetrainedModel:
    """Runs the retraining as an ordinary TorchTrainer run. An interrupted one continues from its last state.

    Raises:
        RetrainingFailed: workers failed more than MAX_FAILURES times, or could not be started.
        KeyboardInterrupt: the user pressed Ctrl-C; the last state is kept.
        StorageError: its files cannot be read.
    """
    if (before := _read_result(plan)) is not None:
        return before
    _run_workers(plan)
    result = _read_result(plan)
    assert result is not None  # the workers have ended without an error
    return result


def _read_result(plan: RetrainPlan) -> RetrainedModel | None:
    predictions = plan.experiment.read(plan.file(PREDICTIONS))
    weights = plan.experiment.read(plan.file(WEIGHTS)) if predictions else None
    return RetrainedModel(weights, np.load(io.BytesIO(predictions))) if weights and predictions else None


def _run_workers(plan: RetrainPlan) -> None:
    from lungct_tune.tuning.ray_trainer import GroupTrainer

    trainer = GroupTrainer(
        _run_worker,
        {"plan": plan},
        plan.workers,
        plan.resources_per_worker,
        train.RunConfig(
            name=plan.name,
            storage_path=f"{plan.experiment.root}/final",
            storage_filesystem=plan.experiment.filesystem,
            failure_config=train.FailureConfig(  # type: ignore[call-arg]
                max_failures=MAX_FAILURES, controller_failure_limit=START_ATTEMPTS
            ),
        ),
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except train.TrainingFailedError as error:
        raise RetrainingFailed(
            f"the final retraining failed: {str(error).strip().splitlines()[-1]}\n"
            "Fix the cause (Ray's log files have the full error; --verbose prints it), or lower "
            "--final-workers; the search is kept, and --resume continues with the retraining"
        ) from error
    except SystemExit:  # with status 0: Train's handler of SIGINT ends an aborted run so
        raise KeyboardInterrupt from None
    finally:
        # otherwise that handler stays, with a reference to the run's controller: the actor would never end
        signal.signal(signal.SIGINT, before)


def _run_worker(config: dict[str, Any]) -> None:
    import torch
    from ray.train.torch import get_device

    plan: RetrainPlan = config["plan"]
    torch.set_num_threads(max(1, int(plan.resources_per_worker["CPU"])))
    retrain(plan, get_device())


def retrain(plan: RetrainPlan, device: torch.device) -> None:
    """Trains to the last epoch, predicts the test images, and writes the files. All workers call it together."""
    import safetensors.torch

    trainer = plan.dataset.trainer(plan.hyperparameters, plan.dataset.rows, plan.seed, device)
    _resume(plan, trainer)
    saved_at = time.monotonic()
    while trainer.epoch < plan.dataset.epochs:
        trainer.train_epoch()
        if trainer.rank == 0 and time.monotonic() - saved_at >= plan.checkpoint_interval:
            _save(plan, trainer)
            saved_at = time.monotonic()
    # the one place in the program that looks at the test split
    test_NHW = plan.test.images_on(device)
    probabilities_NC = trainer.probabilities(range(len(test_NHW)), test_NHW)
    if trainer.rank == 0:
        predictions = io.BytesIO()
        np.save(predictions, probabilities_NC)
        plan.experiment.write(plan.file(WEIGHTS), safetensors.torch.save(trainer.model_state()))
        plan.experiment.write(plan.file(PREDICTIONS), predictions.getbuffer())


def _save(plan: RetrainPlan, trainer: Trainer) -> None:
    import torch

    stream = io.BytesIO()
    torch.save(trainer.state_dict(), stream)
    content = stream.getvalue()
    plan.experiment.write(plan.file(STATE), hashlib.sha256(content).digest() + content)


def _resume(plan: RetrainPlan, trainer: Trainer) -> None:
    """Continues from the last state, if there is one that is whole.

    Only the first worker reads it. If each read the storage, one of them might find another state than the others, and
    data-parallel training goes wrong without an error then.
    """
    import torch
    import torch.distributed as dist

    kept = [plan.experiment.read(plan.file(STATE)) or b"" if trainer.rank == 0 else b""]
    if trainer.world > 1:
        dist.broadcast_object_list(kept, src=0)
    digest, content = kept[0][:DIGEST_BYTES], kept[0][DIGEST_BYTES:]
    if digest == hashlib.sha256(content).digest():
        trainer.load_state_dict(torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"))
