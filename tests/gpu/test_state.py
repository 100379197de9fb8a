"""A trial's state is copied to the host, and written while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from devices import device  # noqa: F401
from toys import SMALL, toy_data, training

from lungct_tune.experiment.folder import Experiment, state_file
from lungct_tune.tuning.trial_state import StateWriter, read_state


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for item in nested for tensor in tensors_in(item)]


def test_a_state_is_that_of_its_epoch_though_training_goes_on(device: torch.device, tmp_path: Path) -> None:
    images_NHW, _ = toy_data()
    trained = training(SMALL, device=device, images_NHW=images_NHW.to(device))
    experiment = Experiment.at(str(tmp_path), "one")
    writer = StateWriter(experiment, lambda epoch: state_file(0, epoch))
    for epoch in (1, 2):  # the second copy goes into the memory of the first
        trained.train_epoch()
        state = trained.state_dict()
        expected = [tensor.clone().cpu() for tensor in tensors_in(state)]
        writer.start(epoch, {"training": state})
        trained.train_epoch()
        writer.wait()
        assert writer.take_error() is None and writer.newest == epoch
        kept = read_state(experiment, state_file(0, epoch)) or {}
        written = tensors_in(kept["training"])
        assert len(written) == len(expected) and all(map(torch.equal, written, expected))
    assert all(tensor.is_pinned() for tensor in tensors_in(writer._copy)) or device.type == "cpu"
