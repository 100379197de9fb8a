"""Measures how long a slot does something else than training and validation, for each epoch.

    python benchmarks/between_epochs.py [--depths 5 20 49] [--seconds 65]
    python benchmarks/between_epochs.py --memory

The epochs are short, as on a fast GPU: 16 phantom images of 32 pixels, on one CPU. There are three tables.

1. "now" is `TrialRunner` in this process: a state every 30 s, written by a thread, and copies of the best weights in
   memory. "before" is the old way, kept here: after each epoch the state is serialised, hashed and written, and so are
   the files of an epoch that is the best so far. The storage is a local folder, then an S3 server (moto, in a process
   of its own) whose answers come 50 ms late. `--seconds` is long enough for two states of "now".
2. A whole search with one slot and one trial, through Ray Tune and the study: the time between the end of an epoch and
   the start of the next one, as the study has it. It includes all messages between the processes.
3. `--memory`: the resident memory of a worker's process after trials of one epoch at depth 49.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import ray
import safetensors.torch
import torch
from further_trial import plan_in, search_in_one_slot
from rich.console import Console
from rich.table import Table

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.search_space import parse_space
from lungct_tune.experiment.folder import Experiment, delete_states
from lungct_tune.experiment.study import open_study, read_trials
from lungct_tune.experiment.study_journal import opened_journal
from lungct_tune.experiment.trial import EpochFigures, TrialOrder
from lungct_tune.training.objective import validation_figures
from lungct_tune.tuning.cluster import connect
from lungct_tune.tuning.fold_model import Fold
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.trial_runner import TrialRunner
from lungct_tune.tuning.workers import _free_memory

AIMS_MS = {20: 5.0, 49: 10.0}
"""The most milliseconds outside training and validation for each epoch, by depth."""

MEMORY_AIM = 1.1
"""The most memory after the last trial, relative to that after the second."""

TRIALS = (2, 10, 25, 50)
LATENCY_S = 0.05
CPU = torch.device("cpu")


def small_plan(folder: Path, epochs: int) -> SlotPlan:
    """A slot's plan for 16 training images in two steps, and 9 validation images, which are in this process."""
    plan = plan_in(folder, epochs, share=np.asarray)
    (fold,) = plan.folds
    return replace(plan, folds=(Fold(fold.train_rows[:16], fold.valid_rows[:9]),))


# ---- one process ---------------------------------------------------------------------------------------


def now(plan: SlotPlan, depth: int, epochs: int) -> tuple[float, float, int]:
    """Runs all epochs but the last; returns wall seconds, seconds of training and validation, and written bytes."""
    order = TrialOrder(depth, 0, Hyperparameters(truncation_depth=depth))
    trial = TrialRunner(replace(plan, rungs=(epochs - 1,)), order, CPU, slot=1, warn=print)
    began, seconds, written, done = time.perf_counter(), 0.0, 0, 0
    while done < epochs - 1:
        report = trial.run()
        assert report.cost is not None
        done = report.epochs[-1].epoch
        seconds += sum(figures.seconds for figures in report.epochs)
        written += report.cost.checkpoint_bytes
    return time.perf_counter() - began, seconds, written


def before(plan: SlotPlan, depth: int, epochs: int) -> tuple[float, float, int]:
    """Does the same in the old way, without its messages."""
    (fold,), data, experiment = plan.folds, plan.dataset, plan.experiment
    order = TrialOrder(depth, 0, Hyperparameters(truncation_depth=depth))
    trainer = data.trainer(order.hyperparameters, fold.train_rows, 0, CPU)
    positions, labels_N = data.positions(fold.valid_rows), data.labels_of(fold.valid_rows)
    history: list[EpochFigures] = []
    began, seconds, written = time.perf_counter(), 0.0, 0
    for epoch in range(1, epochs):
        epoch_began = time.perf_counter()
        loss = trainer.train_epoch()
        trained = time.perf_counter()
        probabilities_NC = trainer.probabilities(positions)
        found: dict[str, Any] = dict(validation_figures(labels_N, probabilities_NC))
        ended = time.perf_counter()
        seconds += ended - epoch_began
        figures = EpochFigures(epoch, **found, train_loss=loss, train_s=trained - epoch_began, valid_s=ended - trained)
        files: dict[str, bytes | memoryview] = {}
        if all(figures.rank > earlier.rank for earlier in history):
            valid = io.BytesIO()
            np.save(valid, probabilities_NC)
            files |= {"model.safetensors": safetensors.torch.save(trainer.model_state()), "valid.npy": valid.getvalue()}
        history.append(figures)
        stream = io.BytesIO(bytes(32))
        stream.seek(32)
        kept = [each.as_dict() for each in history]
        torch.save({"order": order.identity, "training": trainer.state_dict(), "history": kept}, stream)
        whole = stream.getbuffer()
        whole[:32] = hashlib.sha256(whole[32:]).digest()
        for name, content in (files | {"last.pt": whole}).items():
            experiment.write(f"trials/{depth:04d}/{name}", content)
            written += len(content)
    return time.perf_counter() - began, seconds, written


def first_table(folder: Path, depths: list[int], seconds: float, console: Console) -> None:
    table = Table("storage", "depth", "way", "epochs", "epoch, ms", "outside, ms", "written, MB", "aim, ms")
    with LateS3() as url:
        for storage in ("folder", "S3, 50 ms"):
            where = str(folder) if storage == "folder" else url
            for depth in depths:
                plan = replace(small_plan(folder, 10), experiment=Experiment.at(where, "one"))
                wall, _, _ = now(plan, depth, 10)
                for way, epochs in ((before, 5), (now, max(12, int(seconds * 9 / wall)))):
                    long = replace(plan, dataset=replace(plan.dataset, epochs=epochs))
                    wall, inside_s, written = way(long, depth, epochs)
                    delete_states(plan.experiment, depth)
                    done = epochs - 1
                    cells = [f"{inside_s / done * 1e3:.0f}", f"{(wall - inside_s) / done * 1e3:.1f}"]
                    aim = f"{AIMS_MS[depth]:.0f}" if way is now and depth in AIMS_MS else ""
                    table.add_row(storage, f"{depth}", way.__name__, f"{done}", *cells, f"{written / 1e6:.0f}", aim)
    console.print(table)


class LateS3:
    """An S3 server in a process of its own, with a bucket, whose answers come late."""

    def __enter__(self) -> str:
        here, there = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        os.environ |= {"AWS_ENDPOINT_URL": here.recv(), "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        return "s3://bucket"

    def __exit__(self, *_: object) -> None:
        self._process.terminate()


def _serve(parent: Connection) -> None:
    from http.client import HTTPConnection

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = HTTPConnection(host, port)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    listening = socket.create_server(("127.0.0.1", 0))
    parent.send(f"http://127.0.0.1:{listening.getsockname()[1]}")
    while True:
        client, _ = listening.accept()
        upstream = socket.create_connection((host, port))
        threading.Thread(target=_pass_on, args=(client, upstream, 0.0), daemon=True).start()
        threading.Thread(target=_pass_on, args=(upstream, client, LATENCY_S), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    with suppress(OSError):
        while content := source.recv(2**20):
            time.sleep(delay_s)
            target.sendall(content)
        target.shutdown(socket.SHUT_WR)


# ---- a search ------------------------------------------------------------------------------------------


def second_table(folder: Path, depths: list[int], seconds: float, console: Console) -> None:
    table = Table("depth", "epochs", "epoch, ms", "outside, ms", "aim, ms")
    for depth in depths:
        wall, _, _ = now(small_plan(folder, 10), depth, 10)
        epochs = max(10, int(seconds * 9 / wall))
        plan = replace(small_plan(folder, epochs), experiment=Experiment.at(str(folder), f"search-{depth}"))
        plan = replace(plan, dataset=replace(plan.dataset, images=ray.put(np.asarray(plan.dataset.images))))
        space = parse_space(f"truncation_depth: {depth}\ndropout: {{low: 0.0, high: 0.5}}", "benchmark")
        space = replace(space, fixed_trials=())
        with opened_journal(folder / f"{depth}.journal") as storage:
            study = open_study(storage, "one", space, epochs, new=True)
            search_in_one_slot(study, space, plan, trials=1)
        (trial,) = read_trials(study)
        first, last = trial.history[0], trial.history[-1]
        assert trial.hyperparameters.truncation_depth == depth and first.at and last.at
        inside, done = sum(figures.seconds for figures in trial.history[1:]), len(trial.history) - 1
        outside_ms = (last.at - first.at - inside) / done * 1e3
        aim = f"{AIMS_MS[depth]:.0f}" if depth in AIMS_MS else ""
        table.add_row(f"{depth}", f"{done}", f"{inside / done * 1e3:.0f}", f"{outside_ms:.1f}", aim)
    console.print(table)


# ---- memory --------------------------------------------------------------------------------------------


def memory(folder: Path, console: Console) -> None:
    """Runs trials one after another as `run_worker` does; prints the process's resident memory."""
    plan = small_plan(folder, epochs=1)
    table = Table("after trial", "resident memory, MB", "relative to trial 2")
    first = 0.0
    for number in range(1, TRIALS[-1] + 1):
        _free_memory()
        order = TrialOrder(number, 0, Hyperparameters(truncation_depth=49), weights_from=(1.0, 0.0))
        trial = TrialRunner(plan, order, CPU, slot=1, warn=print)
        assert trial.run().is_last
        used = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        del trial
        if number in TRIALS:
            first = first or used
            table.add_row(f"{number}", f"{used:.0f}", f"{used / first:.2f}")
    console.print(table, f"aim: at most {MEMORY_AIM}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[5, 20, 49], metavar="N", help="(5 20 49)")
    parser.add_argument("--seconds", type=float, default=65, metavar="S", help="length of each measurement (65)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        if chosen.memory:
            memory(Path(scratch), console)
            return
        first_table(Path(scratch), chosen.depths, chosen.seconds, console)
        connect(None, verbose=False)
        second_table(Path(scratch), chosen.depths, chosen.seconds, console)
        ray.shutdown()


if __name__ == "__main__":
    main()
