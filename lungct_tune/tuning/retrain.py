"""The final retraining: the best configuration on train and validation together, evaluated once on test."""

from __future__ import annotations

import io
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray import train

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import RetrainedModel
from lungct_tune.experiment.folder import Experiment
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.workers import START_ATTEMPTS

MAX_FAILURES = 3
"""How many times the retraining may lose a worker and continue from its last epoch."""


class RetrainingFailed(UserError):
    """The final retraining failed for good. The message says why and how to continue."""


@dataclass(frozen=True)
class RetrainPlan:
    """The configuration of the retraining, which runs all epochs of the dataset's schedule.

    Their number is that of the winner's best epoch. Over them the learning rate falls to zero. The search's longer
    schedule would end in its middle, at a high learning rate, where the last epoch's accuracy depends on chance.
    """

    experiment: Experiment
    dataset: SharedDataset
    hyperparameters: Hyperparameters
    seed: int
    train_rows: np.ndarray
    test_rows: np.ndarray
    workers: int
    resources_per_worker: dict[str, float]


def retrain_and_predict(plan: RetrainPlan, name: str) -> RetrainedModel:
    """Runs the retraining as an ordinary TorchTrainer run. An interrupted run continues from its last epoch.

    Args:
        name: the run's folder under the experiment's `final/`.

    Raises:
        RetrainingFailed: workers failed more than MAX_FAILURES times, or could not be started.
        KeyboardInterrupt: the user pressed Ctrl-C; the run's last checkpoint is kept.
    """
    from lungct_tune.tuning.ray_trainer import GroupTrainer

    trainer = GroupTrainer(
        _run_worker,
        {"plan": plan},
        plan.workers,
        plan.resources_per_worker,
        train.RunConfig(
            name=name,
            storage_path=f"{plan.experiment.root}/final",
            storage_filesystem=plan.experiment.filesystem,
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
            failure_config=train.FailureConfig(  # type: ignore[call-arg]
                max_failures=MAX_FAILURES, controller_failure_limit=START_ATTEMPTS
            ),
        ),
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
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
    assert result.checkpoint is not None  # a run always ends with a checkpoint
    with result.checkpoint.as_directory() as folder:
        return RetrainedModel(
            weights=Path(folder, "model.safetensors").read_bytes(),
            probabilities_NC=np.load(Path(folder, "test_probabilities.npy")),
        )


def _run_worker(config: dict[str, Any]) -> None:
    import safetensors.torch
    import torch
    from ray.train.torch import get_device

    plan: RetrainPlan = config["plan"]
    torch.set_num_threads(max(1, int(plan.resources_per_worker["CPU"])))
    trainer = plan.dataset.trainer(plan.hyperparameters, plan.train_rows, plan.seed, get_device())
    if (checkpoint := train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            trainer.load_state_dict(torch.load(Path(folder, "last.pt"), weights_only=True, map_location="cpu"))

    def state() -> bytes:
        stream = io.BytesIO()
        torch.save(trainer.state_dict(), stream)
        return stream.getvalue()

    while trainer.epoch < plan.dataset.epochs:
        loss = trainer.train_epoch()
        _report({"epoch": trainer.epoch, "train_loss": loss}, {"last.pt": state()})
    # the one place in the program that looks at the test split
    probabilities_NC = trainer.probabilities(plan.dataset.positions(plan.test_rows))
    predictions = io.BytesIO()
    np.save(predictions, probabilities_NC)
    files = {
        "test_probabilities.npy": predictions.getvalue(),
        "model.safetensors": safetensors.torch.save(trainer.model_state()),
        "last.pt": state(),  # if the run is started again, it continues from its newest checkpoint, this one
    }
    _report({"epoch": trainer.epoch}, files)


def _report(metrics: dict[str, Any], files: dict[str, bytes]) -> None:
    """Reports to Ray Train from all workers. The first worker adds the files as a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if train.get_context().get_world_rank() == 0:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            checkpoint = train.Checkpoint.from_directory(folder)
        train.report(metrics, checkpoint=checkpoint)
