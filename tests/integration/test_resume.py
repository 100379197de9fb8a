"""Long searches in processes of their own: interrupted in every way and resumed, and one of real images."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import CT_IMAGES, CT_WEIGHTS, SMALL
from optuna.trial import TrialState
from processes import searching, wait_for
from ray_state import nothing_held, train_workers
from studies import epochs_of, trials_in

from lungct_tune.pull import main as pull
from lungct_tune.search import main

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.long]

EPOCHS = 8
TWO_SLOTS = ["--slots", "2", "--workers", "2", "--cpus-per-worker", "0.5"]
SLOW = ["--image-size", "96", "--epochs", str(EPOCHS)]  # seconds a trial, so that it can be caught in the middle
EVERY_EPOCH = ["--checkpoint-interval", "0"]
HALF_WAY = "state-000[1-4].pt"  # of a trial that has epochs left, so that it has a state for some time


def test_a_search_goes_on_from_a_lost_worker_from_signals_and_the_loss_of_its_process(
    tmp_path: Path, phantoms: Path, space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL for a worker, SIGTERM in the search, SIGHUP and SIGKILL in the retraining, then left alone.

    It has as many trials as asked then. Two slots of two workers run its trials. A copy is pulled while it runs, its
    best model when it has been stopped. What SIGKILL in the search leaves is seen in test_failing_store and
    test_watching.
    """
    experiment = tmp_path / "killed"
    with command(tmp_path, phantoms, space, *TWO_SLOTS, "--trials", "3", *SLOW, *EVERY_EPOCH) as run:
        wait_for(lambda: list(experiment.glob("trials/*/state-*.pt")), run)
        victim = train_workers()[-1]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: train_workers() and victim not in train_workers(), run)
        wait_for(lambda: epochs_of_running_trials(experiment) and list(experiment.glob(f"trials/*/{HALF_WAY}")), run)
        pull_all_while_it_runs(experiment, tmp_path / "copy", capsys)
        wait_for(lambda: ended_trials(experiment) >= 1 and epochs_of_running_trials(experiment), run)
        run.send_signal(signal.SIGTERM)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 130
    assert re.search(r"^stopping; trial \d is at epoch \d", output, re.MULTILINE)
    again = f" -m lungct_tune.search --resume killed --storage {tmp_path}"
    assert re.search(rf"^stopped\. To continue: \S+{re.escape(again)}$", output, re.MULTILINE)
    assert "Traceback" not in output
    assert nothing_held()
    after_stop = trials_of(experiment)
    assert 1 <= ended_trials(experiment) < 3
    running = [n for n, t in after_stop.items() if t.state == TrialState.RUNNING and t.user_attrs.get("history")]
    assert running
    if has_completed_trial(experiment):  # the one that has ended may also have been stopped early
        pull_the_best_so_far(experiment, tmp_path / "model", capsys)
    else:
        assert pull([experiment.name, str(tmp_path / "model"), "--storage", str(tmp_path)]) == 2

    with command(tmp_path, None, None) as run:
        assert run.stdout is not None
        while not (line := run.stdout.readline()).startswith("retraining"):
            assert line, "it ended before the retraining"
        run.send_signal(signal.SIGHUP)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 130
    assert "stopping; the retraining continues from the last state" in output and "To continue: " in output
    assert "Traceback" not in output and nothing_held()

    with command(tmp_path, None, None) as run:
        wait_for(lambda: list(experiment.glob("final/*/last.pt")), run)
        run.kill()
    assert nothing_held() and not (experiment / "best").exists()

    with command(tmp_path, None, None) as run:
        output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output
    at_end = trials_of(experiment)
    assert len(finished_numbers(at_end)) == 3
    for number in finished_numbers(after_stop):
        assert at_end[number].datetime_complete == after_stop[number].datetime_complete
    for number in running:  # they went on: epochs that were repeated have the same figures
        had, has = epochs_of(after_stop[number]), epochs_of(at_end[number])
        assert [*map(figures_of, has[: len(had)])] == [*map(figures_of, had)]
    for number in finished_numbers(at_end):
        trial = at_end[number]
        epochs = [figures["epoch"] for figures in epochs_of(trial)]
        assert epochs == list(range(1, len(epochs) + 1))  # every epoch once
        completed = trial.user_attrs["ended"] == "completed"
        assert completed == (len(epochs) == EPOCHS) == (trial.state == TrialState.COMPLETE)
        assert trial.state != TrialState.FAIL
    assert (experiment / "best" / "checksums.txt").exists() and nothing_held()
    metrics = json.loads((experiment / "best" / "metrics.json").read_text())
    assert metrics["search"]["trials"] == 3


def test_a_search_whose_disk_is_full_for_a_while_goes_on_and_ends(tmp_path: Path, phantoms: Path, space: Path) -> None:
    """The disk is a real file system of 60 MB. It is full from the first epoch on, until the search has said so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        with command(disk, phantoms, space, "--trials", "4", "--epochs", "3", *EVERY_EPOCH) as run:
            assert run.stdout is not None
            wait_for(lambda: epochs_of_running_trials(disk / "killed") or ended_trials(disk / "killed"), run)
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(2**16))
            said = ""
            while "the disk is full" not in said:
                line = run.stdout.readline()
                assert line, said
                said += line
            (disk / "filler").unlink()
            output, _ = run.communicate(timeout=600)
        assert run.returncode == 0, said + output
        assert "Traceback" not in said + output
        assert len(finished_numbers(trials_of(disk / "killed"))) == 4
        assert (disk / "killed" / "best" / "checksums.txt").exists()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def pull_all_while_it_runs(experiment: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The copy is one that a search can go on from: a trial runs, and its state is there."""
    assert pull([str(experiment), str(storage / experiment.name), "--all"]) == 0
    assert epochs_of_running_trials(storage / experiment.name)
    assert list((storage / experiment.name).glob("trials/*/state-*.pt"))
    resume = ["--resume", experiment.name, "--storage", str(storage)]
    assert " ".join(resume) in capsys.readouterr().out
    assert main([*resume, "--plan"]) == 0


def pull_the_best_so_far(experiment: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from lungct_tune.evaluation.inference import load_model

    capsys.readouterr()
    assert pull([experiment.name, str(model), "--storage", str(experiment.parent)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"best of the first [12] of 3 trials", said) and "not been evaluated" in said
    network, config = load_model(model)
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, len(config.classes))


@pytest.mark.skipif(
    not CT_IMAGES.is_dir() or not CT_WEIGHTS.is_file(), reason="no ../shared with CT images and weights"
)
def test_real_images_and_real_weights(tmp_path: Path) -> None:
    space = "search_spaces/shallow.yaml"
    arguments = ["--data", str(CT_IMAGES), "--weights", str(CT_WEIGHTS), "--normalisation", "unit", "--space", space]
    tiny = ["--image-size", "32", "--trials", "2", "--epochs", "2", "--name", "ct", "--storage", str(tmp_path)]
    assert main([*arguments, *tiny]) == 0
    metrics = json.loads((tmp_path / "ct" / "best" / "metrics.json").read_text())
    assert 130 <= metrics["test"]["n"] <= 145
    assert metrics["test"]["references"]["majority class"]["difference"]["value"] > 0
    least, most = (metrics["test"]["by_likeness"][half] for half in ("least", "most"))
    assert least["n"] + most["n"] == metrics["test"]["n"] and least["similarity"] < most["similarity"] < 0.99
    split = (tmp_path / "ct" / "split.csv").read_text()
    assert "/l4.png" not in split and "/sq2.png" not in split


# ---- a search in a process of its own, and its study ---------------------------------------------------


def command(
    storage: Path, data: Path | None, space: Path | None, *arguments: str
) -> AbstractContextManager[subprocess.Popen[str]]:
    """The search's command line in a process of its own; without data it resumes."""
    which = ["--resume", "killed"]
    if data is not None:
        which = ["--name", "killed", "--data", str(data), "--space", str(space), *SMALL, *arguments]
    return searching("--storage", str(storage), *which)


def trials_of(experiment: Path) -> dict[int, optuna.trial.FrozenTrial]:
    return {trial.number: trial for trial in trials_in(experiment, "killed")}


def finished_numbers(trials: dict[int, optuna.trial.FrozenTrial]) -> list[int]:
    return [number for number, trial in trials.items() if trial.state.is_finished()]


def ended_trials(experiment: Path) -> int:
    return len(finished_numbers(trials_of(experiment)))


def has_completed_trial(experiment: Path) -> bool:
    """Whether a trial ran to its end, so that there is a best one so far."""
    return any(trial.state == TrialState.COMPLETE for trial in trials_of(experiment).values())


def epochs_of_running_trials(experiment: Path) -> int:
    trials = trials_of(experiment).values()
    return sum(len(trial.intermediate_values) for trial in trials if trial.state == TrialState.RUNNING)


def figures_of(epoch: dict[str, Any]) -> dict[str, Any]:
    """Without when, where and how fast it was trained."""
    return {name: value for name, value in epoch.items() if name not in ("at", "slot", "train_s", "valid_s")}
