"""TensorBoard's files: every epoch of every step, the hyperparameters, and a copy on remote storage."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.trial import EpochCost, EpochFigures, EpochReport, Outcome, TrialOrder
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.callbacks.tensorboard import FOLDER, PREFIX, TensorBoardCallback
from lungct_tune.tuning.slots import REPORT


class RayTrial:
    """As much of Ray's trial as the callback reads."""

    config: dict[str, Any] = {"order": TrialOrder(7, 0, PUBLISHED)}  # noqa: RUF012
    last_result: dict[str, Any] = {OBJECTIVE: 0.5}  # noqa: RUF012

    def __str__(self) -> str:
        return "trial_0007"


def report(*epochs: int, trained: int) -> dict[str, Any]:
    """The result of a step by a worker whose clock stands at 1970."""
    figures = [
        EpochFigures(
            epoch=epoch, balanced_accuracy=epoch / 10, accuracy=0.5, log_loss=1.0, train_loss=1.0, train_s=1.0,
            valid_s=0.1, at=float(epoch), slot=1,
        )
        for epoch in epochs
    ]  # fmt: skip
    return {REPORT: EpochReport(Outcome.RUNNING, tuple(figures), EpochCost(trained, 8, 0, 0.0))}


def events(content: bytes) -> list[Any]:
    """TensorBoard's records: a length of 8 bytes, its checksum of 4, the event, and its checksum of 4."""
    found, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 16 + length
    return found


@pytest.mark.parametrize("remote", [False, True])
def test_every_epoch_and_the_hyperparameters_are_in_a_trials_file(
    tmp_path: Path, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # files of searches on remote storage are in ./results
    experiment = Experiment(f"fsspec+file://{tmp_path}/there/one" if remote else f"{tmp_path}/one")
    trial = RayTrial()
    with ThreadPoolExecutor(2) as threads, TensorBoardCallback(experiment, threads) as board:
        board.on_trial_result(0, [], trial, report(1, 2, 3, 4, 5, trained=3))  # two are of before an interruption
        board.on_trial_result(0, [], trial, report(6, trained=1))
        board.on_trial_complete(0, [], trial)
    (file,) = experiment.files(FOLDER)
    assert file.startswith(f"{FOLDER}/trial_0007/events.out.tfevents.")
    written = events(experiment.read(file) or b"")
    drawn = {
        event.step: value.simple_value
        for event in written
        for value in event.summary.value
        if value.tag == f"{PREFIX}{OBJECTIVE}" and event.step
    }
    assert drawn == pytest.approx({epoch: epoch / 10 for epoch in (3, 4, 5, 6)})
    tags = {value.tag for event in written for value in event.summary.value}
    assert "_hparams_/session_start_info" in tags and f"{PREFIX}log_loss" in tags
    assert not tags & {f"{PREFIX}at", f"{PREFIX}slot"}, "every event has a time, and a slot is no figure"
