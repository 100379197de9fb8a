"""A search of 40 trials while workers, slots, the mailbox and nodes are killed at random, then left in peace.

The nodes are local ones of Ray's cluster utilities, and what dies gets SIGKILL. Ray's own release test of Tune asserts
the first three: every trial reaches its end or its pruning; a state was there on each restore; its epoch is the one
that had been reported. Ours are: as many trials as asked and none twice, at most the set seconds repeated, and nothing
held at the end.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from conftest import SMALL
from optuna.trial import FrozenTrial, TrialState
from processes import searching, wait_for
from studies import epochs_of, trials_in

from lungct_tune.experiment.study import history_key, rungs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.long, pytest.mark.ray]

SEED = 1
TRIALS = 40
EPOCHS = 27
NODES = 4
KILLING_S = 90
INTERVAL_S = 3.0
"""Of training between two states."""

SLACK_S = 3
"""Of training while a state is copied and written, on a machine with other work."""

KINDS = {"worker": "RayTrainWorker", "slot": "ResourceTrainable", "mailbox": "Mailbox", "node": ""}
"""What is killed, and the class of its actor. Tune's `with_resources` makes such a class of a slot's."""

SOON_MISSED = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""By default Ray misses a node that was killed after 15 seconds, and places nothing in the meantime."""


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of a head without CPUs and four nodes with one CPU each. This process does not join it."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # a folder of its own; short, for the sockets in it
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SOON_MISSED}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(NODES):
                cluster.add_node(num_cpus=1)
            monkeypatch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()


class Killer:
    """Kills at random: in each round each kind once, in random order, some seconds apart."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster, self._random = cluster, random.Random(seed)
        self._round: list[str] = []
        self.kills: Counter[str] = Counter()

    def kill_one(self) -> None:
        if not self._round:
            self._round = self._random.sample(list(KINDS), len(KINDS))
        kind = self._round[-1]
        if kind == "node":
            victim = self._random.choice(sorted(self._cluster.worker_nodes, key=lambda node: node.unique_id))
            self._cluster.remove_node(victim, allow_graceful=False)
            self.wait()
            self._cluster.add_node(num_cpus=1)
        elif living := self._pids(KINDS[kind]):
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(self._random.choice(living), signal.SIGKILL)
        else:
            return  # none is there yet; the next call tries again
        self.kills[self._round.pop()] += 1

    def wait(self) -> None:
        time.sleep(self._random.uniform(1, 6))

    def _pids(self, name: str) -> list[int]:
        actors = self._cluster.global_state.actor_table(None, actor_state_name="ALIVE").values()
        return sorted(actor["Pid"] for actor in actors if actor["ActorClassName"].endswith(name))


def test_kills_cost_time_and_no_trial(
    nodes: Cluster, tmp_path: Path, phantoms: Path, space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, killer = tmp_path / "chaos", Killer(nodes, SEED)
    where = ["--name", "chaos", "--storage", str(tmp_path), "--data", str(phantoms), "--space", str(space)]
    slots = ["--slots", "2", "--workers", "2", "--cpus-per-worker", "0.5"]
    how = ["--trials", str(TRIALS), "--epochs", str(EPOCHS), "--checkpoint-interval", str(INTERVAL_S)]
    how += ["--image-size", "64"]  # so that a trial takes some seconds
    with searching(*where, *SMALL, *slots, *how) as run, states_seen(experiment) as seen:
        wait_for(lambda: list(experiment.glob("trials/*/state-*.pt")), run)
        until = time.monotonic() + KILLING_S
        while time.monotonic() < until and ended(experiment) < TRIALS - 4:
            before = epochs_told(experiment)
            killer.kill_one()
            wait_for(lambda before=before: epochs_told(experiment) > before, run)  # so that kills meet training
            killer.wait()
        before_peace = ended(experiment)
        output, _ = run.communicate(timeout=900)
    trials = trials_in(experiment)
    restores = [restore for trial in trials for restore in restores_of(trial)]
    with capsys.disabled():
        print(f"\nkilled: {dict(killer.kills)}; {before_peace} trials had ended by then")
        print(f"trials: {dict(Counter(trial.state.name for trial in trials))}")
        print(f"epochs: {sum(len(epochs_of(trial)) for trial in trials)}")
        print(f"repeated: {sum(len(restore.repeated) for restore in restores)} epochs in {len(restores)} restores")
        print(f"at once: at most {max((restore.repeated_s for restore in restores), default=0):.1f} s")
    assert run.returncode == 0, output
    assert set(killer.kills) == set(KINDS) and restores

    assert [trial.number for trial in trials] == list(range(TRIALS))
    for trial in trials:
        epochs = [figures["epoch"] for figures in epochs_of(trial)]
        assert epochs == list(range(1, len(epochs) + 1)) == sorted(trial.intermediate_values)
        if trial.state == TrialState.COMPLETE:
            assert trial.user_attrs["ended"] == "completed" and len(epochs) == EPOCHS
        else:
            assert trial.state == TrialState.PRUNED and len(epochs) in rungs(EPOCHS), trial.user_attrs["ended"]
    for restore in restores:
        there = [epoch for epoch, since in seen[restore.trial].items() if since < restore.began]
        assert restore.epoch == max(there, default=0)
        assert restore.repeated_s <= INTERVAL_S + SLACK_S
    wait_for(lambda: not held(nodes), within_s=90)


# ---- what is there at the end ---------------------------------------------------------------------------


@dataclass
class Restore:
    """A trial went on from the state after `epoch`, or from its beginning, and repeated epochs that were known."""

    trial: int
    epoch: int
    began: float
    repeated: list[dict[str, Any]]

    @property
    def repeated_s(self) -> float:
        return sum(figures["train_s"] + figures["valid_s"] for figures in self.repeated)


def restores_of(trial: FrozenTrial) -> list[Restore]:
    """The restores that one sees in the steps that the study has: those after which known epochs were repeated."""
    restores, known, count = [], list[dict[str, Any]](), 0
    while (step := trial.user_attrs.get(history_key(count))) is not None:
        first = step[0]
        kept, repeated = known[: first["epoch"] - 1], known[first["epoch"] - 1 :]
        assert len(kept) == first["epoch"] - 1, "no epoch is left out"
        if repeated:
            restores.append(
                Restore(trial.number, len(kept), first["at"] - first["train_s"] - first["valid_s"], repeated)
            )
        known, count = kept + step, count + 1
    return restores


@contextmanager
def states_seen(experiment: Path) -> Iterator[dict[int, dict[int, float]]]:
    """Since when the state of each epoch of each trial was on the storage. A thread looks all the time."""
    seen: dict[int, dict[int, float]] = defaultdict(dict)
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            for path in experiment.glob("trials/*/state-*.pt"):
                number, epoch = int(path.parent.name), int(path.stem.removeprefix("state-"))
                seen[number].setdefault(epoch, time.time())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def epochs_told(experiment: Path) -> int:
    return sum(len(trial.intermediate_values) for trial in trials_in(experiment))


def ended(experiment: Path) -> int:
    return sum(trial.state.is_finished() for trial in trials_in(experiment))


def held(cluster: Cluster) -> bool:
    """Whether the cluster has an actor that is not Ray Train's own, a placement group, or a CPU in use."""
    state = cluster.global_state
    actors = [actor for actor in state.actor_table(None).values() if actor["State"] != "DEAD"]
    groups = [group for group in state.placement_group_table().values() if group["state"] != "REMOVED"]
    busy = state.available_resources().get("CPU") != state.cluster_resources()["CPU"]
    return bool([a for a in actors if a["ActorClassName"] != "_AutoscalingCoordinatorActor"] or groups or busy)
