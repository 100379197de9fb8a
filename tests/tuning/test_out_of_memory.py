"""Trials whose workers run out of memory, on the node or on the GPU."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from trials import order

from lungct_tune.tuning.groups import Group, MailboxLost, WorkersLost
from lungct_tune.tuning.mailbox import Mailbox
from lungct_tune.tuning.ray_compat import worker_errors
from lungct_tune.tuning.workers import OutOfMemory


def test_what_has_ended_workers_is_found_in_the_error_that_ray_makes_of_it() -> None:
    killed = WorkerHealthCheckFailedError("rank 0", failure=ray.exceptions.OutOfMemoryError("the node is full"))
    raised = UserExceptionWithTraceback(OutOfMemory("cuda:0: CUDA out of memory"), "Traceback")
    workers = {0: WorkerStatus(running=False, error=killed), 1: WorkerStatus(running=False, error=raised)}
    error = pickle.loads(pickle.dumps(WorkerGroupPollStatus(workers).get_worker_group_error()))
    assert [(type(each), str(each)) for each in worker_errors(error)] == [
        (ray.exceptions.OutOfMemoryError, "the node is full"),
        (OutOfMemory, "cuda:0: CUDA out of memory"),
    ]
    assert worker_errors(RuntimeError("no node has room")) == []


def test_a_kill_is_noticed_also_where_the_mailbox_is_killed_with_the_worker(cluster: None) -> None:
    group, killed = Group.__new__(Group), ray.exceptions.OutOfMemoryError("the node is full")
    group.id, group._sequence, group._error, group._reason = "one-slot-1-a", 0, None, "the node is full"
    group._mailbox = ray.remote(Mailbox).options(num_cpus=0).remote("one")  # as a new one, which knows no older group
    group._run = threading.Timer(1, setattr, (group, "_error", killed))
    group._run.start()
    with pytest.raises(WorkersLost, match="the node is full") as lost:
        group.run(order(0))
    assert lost.value.__cause__ is killed and not isinstance(lost.value, MailboxLost)
    ray.kill(group._mailbox)


@pytest.mark.long
@pytest.mark.ray
def test_a_trial_is_out_of_memory_when_its_workers_were_killed_twice_and_the_slot_goes_on(
    tmp_path: Path, phantoms: Path
) -> None:
    """The worker of the first trial is killed once, as if another trial's needed the memory. That of the third says
    that the GPU has not enough. On one node the mailbox is killed too, each time.
    """
    script = Path(__file__).with_name("short_of_memory.py")
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.run([sys.executable, script, tmp_path, phantoms], env=own, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    once, twice, on_gpu, after = [line for line in run.stdout.splitlines() if line.startswith("trial ")]
    killed = "the workers ended: 2 worker(s) were killed due to the node running low on memory"
    assert once.startswith(f"trial 0: completed:  trial 0 has lost its workers: {killed}")
    assert twice.startswith(f"trial 1: out of memory: {killed}")
    assert on_gpu == "trial 2: out of memory: the workers ended: cpu: CUDA out of memory"
    assert after == "trial 3: completed: "
