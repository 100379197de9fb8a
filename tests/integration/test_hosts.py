"""The on-prem cluster on separate hosts: `ray up`, searches, hosts lost in the middle of them, pull, `ray down`."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import shlex
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hosts
import optuna
import pytest
import yaml
from conftest import REPOSITORY
from optuna.trial import TrialState
from processes import wait_for
from studies import epochs_of, trials_in

from lungct_tune.experiment.bundle import verify
from lungct_tune.tuning.trial_state import DIGEST_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WHY_NOT = hosts.missing()
pytestmark = [pytest.mark.long, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]

CLUSTER = "clusters/onprem.yaml"
PROJECT = f"{hosts.HOME}/lungct_tune"
STORAGE = f"{hosts.SHARED}/results"
PULL = ["python", "-m", "lungct_tune.pull"]
SMALL_STORE = "--object-store-memory=150000000"
QUICK = (
    "RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=3000 RAY_worker_niceness=0 "
    "RAY_worker_maximum_startup_concurrency=8 RAY_gcs_rpc_server_reconnect_timeout_s=10 "
    "AUTOSCALER_UPDATE_INTERVAL_S=1 AUTOSCALER_HEARTBEAT_TIMEOUT_S=10"
)
"""A host that is cut off is lost after 20 s, and Ray is started again on it 10 s later; and Ray's processes are not the
last to get a turn on two cores."""

SPACE = """
truncation_depth: {low: 1, high: 8}
dropout: {low: 0.0, high: 0.5}
"""
SMALL = ["--weights", "none", "--batch-size", "8", "--space", "lungct_tune/search_spaces/small.yaml"]
QUICK_TRIALS = [*SMALL, "--image-size", "32", "--trials", "4", "--epochs", "3"]
SLOW = [*SMALL, "--image-size", "64", "--checkpoint-interval", "0"]  # an epoch of trial 0: a second, and a state
EPOCHS = 16
"""So many that trial 0 has not ended when the last host is lost."""


@dataclass
class Cluster:
    """Three hosts and a laptop, with the project on the laptop alone."""

    network: hosts.Network

    @property
    def laptop(self) -> hosts.Host:
        return self.network.laptop

    @property
    def head(self) -> hosts.Host:
        return self.network.hosts[0]

    @property
    def workers(self) -> list[hosts.Host]:
        return self.network.hosts[1:]

    def ray(self, *command: str) -> str:
        """Runs `ray ...` on the laptop, in the project's folder."""
        return self.laptop.run("ray", *command, folder=PROJECT)

    def pull(self, *arguments: str, path: str = "") -> str:
        """What the product's own pull says on the laptop, where programs of this folder come first."""
        command = shlex.join([*PULL, *arguments, "--cluster", CLUSTER])
        return self.laptop.run("bash", "-c", f"PATH={hosts.HOME}/{path}:$PATH exec {command}", folder=PROJECT)

    def listed(self, what: str, *options: str) -> list[dict[str, Any]]:
        """What Ray's state API on the head says of actors, nodes, ..."""
        printed = self.head.run("ray", "list", what, "--detail", "--format=json", "--limit=10000", *options)
        return [] if printed.startswith("No resource") else list(json.loads(printed))

    def worker_groups(self) -> list[list[str]]:
        """The addresses of the workers of each slot of the last search, also of its retrainings."""
        address = {node["node_id"]: node["node_ip"] for node in self.listed("nodes")}
        workers = self.listed("actors", "--filter", "class_name=RayTrainWorker")
        last = max(worker["job_id"] for worker in workers)
        groups: dict[str, list[str]] = {}
        for worker in workers:
            if worker["job_id"] == last:
                groups.setdefault(worker["placement_group_id"], []).append(address[worker["node_id"]])
        return list(groups.values())


class Search:
    """A search that somebody sends from the laptop, and the files that it keeps on the hosts' network storage."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster, self._name = cluster, name
        self.folder = cluster.network.shared / "results" / name
        self._job = ""

    def begin(self, *arguments: str) -> None:
        self._submit("--name", self._name, *arguments)

    def resume(self) -> None:
        self._submit("--resume", self._name)

    def _submit(self, *arguments: str) -> None:
        self._job = f"{self._name}-{secrets.token_hex(4)}"
        search = ["python", "-m", "lungct_tune.search", "--storage", STORAGE, *arguments]
        submit = ["ray", "job", "submit", "--no-wait", "--submission-id", self._job, "--", *search]
        self._cluster.ray("exec", CLUSTER, shlex.join(submit))
        wait_for(self._runs)

    def _runs(self) -> bool:
        return any(
            f"lungct_tune.search --storage {STORAGE}" in line for line in self._cluster.head.processes().values()
        )

    def _output(self) -> str:
        return self._cluster.head.run("ray", "job", "logs", self._job)

    def wait_for(self, condition: Callable[[], Any], within_s: float = 600) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert self._runs(), f"the search ended early:\n{self._output()}"
            assert time.monotonic() < deadline, f"waited too long:\n{self._output()}"
            time.sleep(0.2)

    def wait(self, within_s: float = 900) -> None:
        """Until the search ends, well."""

        def succeeded() -> bool:
            status = self._cluster.head.run("ray", "job", "status", self._job)
            assert "failed" not in status, self._output()
            return "succeeded" in status

        wait_for(lambda: not self._runs(), within_s=within_s)
        wait_for(succeeded)

    def history(self, trial: int) -> list[dict[str, float]]:
        """The epochs of a running trial, as kept on the storage: what a trial that is lost goes on from."""
        import torch

        with suppress(FileNotFoundError, ValueError):  # ValueError: there is none yet
            kept = max((self.folder / "trials" / f"{trial:04d}").glob("state-*.pt")).read_bytes()
            return list(torch.load(io.BytesIO(kept[DIGEST_BYTES:]), weights_only=True)["history"])
        return []

    def goes_on(self, before: list[dict[str, float]], lost: float, what: str) -> None:
        """Waits for an epoch of trial 0 by the workers that are there now; those kept before the loss still stand."""
        reached = len(self.history(0))
        self.wait_for(lambda: len(self.history(0)) > reached)
        assert self.history(0)[: len(before)] == before  # with the seconds they took: none was run anew
        print(f"{what} lost after epoch {len(before)}, epoch {reached + 1} after {time.monotonic() - lost:.0f} s")

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in trials_in(self.folder, self._name) if trial.state.is_finished()]

    def check_nothing_is_missing_or_double(self, trials: int, epochs: int) -> None:
        finished = self.finished()
        assert sorted(trial.number for trial in finished) == list(range(trials))
        for trial in finished:
            seen = [figures["epoch"] for figures in epochs_of(trial)]
            assert seen == list(range(1, len(seen) + 1))
            assert sorted(trial.intermediate_values) == seen
            assert trial.user_attrs["ended"] == "completed" if len(seen) == epochs else trial.state == TrialState.PRUNED
        verify(self.folder / "best")


def cluster_file(head: str, workers: list[str]) -> dict[str, Any]:
    """clusters/onprem.yaml for these hosts: other addresses and login, and small.

    The 5 GB that its set-up installs are there already, in the environment of this test.
    """
    config = yaml.safe_load((REPOSITORY / CLUSTER).read_text())
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    make, install, export = config["setup_commands"]
    assert "-m venv" in make and "uv pip install" in install
    config["setup_commands"] = [f"ln -sfn {hosts.PYTHON} ~/lungct_tune/.venv", export]
    for kind, cpus in (("head", 0), ("worker", 1)):
        stop, start = config[f"{kind}_start_ray_commands"]
        small = start.replace("ray start", f"{QUICK} ray start --num-cpus={cpus} {SMALL_STORE}")
        config[f"{kind}_start_ray_commands"] = [stop, small]
    return dict(config)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(hosts.Network(tmp_path_factory.mktemp("hosts"), ["head", "one", "two"]))
    project = cluster.laptop.home / "lungct_tune"
    (project / "clusters").mkdir(parents=True)
    head, *workers = (host.address for host in cluster.network.hosts)
    config = cluster_file(head, workers)
    (project / CLUSTER).write_text(yaml.safe_dump(config))
    for piece in config["file_mounts"].values():
        if (REPOSITORY / piece).is_dir():
            shutil.copytree(REPOSITORY / piece, project / piece)
        elif (REPOSITORY / piece).is_file():
            shutil.copy(REPOSITORY / piece, project / piece)
    (project / "search_spaces" / "small.yaml").write_text(f"# {secrets.token_hex()}\n{SPACE}")
    with cluster.network.up():
        cluster.ray("get-auth-token", "--generate")
        cluster.ray("up", CLUSTER, "-y")
        yield cluster


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def trainers(host: hosts.Host) -> set[int]:
    """The workers of slots, and of the retraining, on a host."""
    return {pid for pid, line in host.processes().items() if line.startswith("ray::RayTrainWorker")}


def test_head_and_workers_join_under_their_addresses(cluster: Cluster) -> None:
    wait_for(lambda: "3 local.cluster.node" in cluster.ray("exec", CLUSTER, "ray status"))
    nodes = {node["node_ip"]: node["is_head_node"] for node in cluster.listed("nodes")}
    assert nodes == {host.address: host is cluster.head for host in cluster.network.hosts}


def test_what_a_search_needs_and_the_token_arrive(cluster: Cluster) -> None:
    for file in ("lungct_tune/search_spaces/small.yaml", "lungct_tune/lungct_tune/search.py", ".ray/auth_token"):
        there = {(host.home / file).read_text() for host in cluster.network.hosts}
        assert there == {(cluster.laptop.home / file).read_text()}
    assert all((host.home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0 for host in cluster.network.hosts)


def test_slots_on_both_workers_and_the_bundle_on_the_laptop(cluster: Cluster) -> None:
    search = Search(cluster, "slots")
    search.begin(*QUICK_TRIALS, "--slots", "2")
    search.wait()
    search.check_nothing_is_missing_or_double(trials=4, epochs=3)
    one, two = ([host.address] for host in cluster.workers)
    groups = sorted(cluster.worker_groups())  # two slots, and one or two of the retrainings
    assert groups in ([one, one, two], [one, two, two], [one, one, two, two])
    said = cluster.pull("slots", "model", "--storage", STORAGE)
    assert "verified" in said and "test accuracy" in said
    pulled = cluster.laptop.home / "lungct_tune" / "model"
    verify(pulled)
    assert digests(pulled) == digests(search.folder / "best")


def test_all_of_a_search_comes_from_where_a_job_leaves_it_and_what_is_not_there_is_said(cluster: Cluster) -> None:
    (cluster.head.home / "results").symlink_to(STORAGE)
    study = cluster.network.shared / "results" / "slots" / "study.journal"
    before, rsync = study.read_bytes(), cluster.laptop.home / "slow" / "rsync"
    rsync.parent.mkdir()
    rsync.write_text(
        f"""#!/bin/sh
case "$*" in */slots/study.journal*) ;; *) echo {{}} >> {STORAGE}/slots/study.journal;; esac
exec /usr/bin/rsync "$@"
"""
    )
    rsync.chmod(0o755)
    cluster.pull("slots", "everything", "--all", path=rsync.parent.name)
    assert study.read_bytes() > before
    study.write_bytes(before)
    everything = cluster.laptop.home / "lungct_tune" / "everything"
    assert (everything / study.name).read_bytes() == before, "a trial may have ended in it whose files came too early"
    assert len(trials_in(everything, "slots")) == 4
    verify(everything / "best")
    with pytest.raises(AssertionError, match=r"no experiment 'other' on the head in ~/results .* there are: slots"):
        cluster.pull("other", "other")


def test_a_storage_that_hosts_do_not_share_is_refused(cluster: Cluster) -> None:
    command = ["python", "-m", "lungct_tune.search", "--name", "alone", "--storage", "alone", *QUICK_TRIALS]
    with pytest.raises(AssertionError, match=r"node 10\.77\.0\.[34] and the head do not see each other's files there"):
        cluster.ray("exec", CLUSTER, shlex.join(command))


def test_a_slot_across_two_hosts_and_the_head_lost(cluster: Cluster) -> None:
    """The head's power fails in the middle of a trial; `ray up` and `--resume` finish the search."""
    search = Search(cluster, "apart")
    search.begin(*SLOW, "--trials", "1", "--epochs", "6", "--workers", "2")
    search.wait_for(lambda: len(search.history(0)) >= 2)
    one, two = (trainers(host) for host in cluster.workers)
    assert one and two
    cluster.network.power_off(cluster.head)
    before, lost = search.history(0), time.monotonic()
    cluster.network.power_on(cluster.head)
    cluster.ray("up", CLUSTER, "-y")
    search.resume()
    search.wait_for(lambda: all(trainers(host) - one - two for host in cluster.workers))
    search.goes_on(before, lost, "head")
    search.wait()
    search.check_nothing_is_missing_or_double(trials=1, epochs=6)
    assert sorted(host.address for host in cluster.workers) in map(sorted, cluster.worker_groups())


@pytest.fixture(scope="module")
def lost(cluster: Cluster) -> Search:
    """A search whose only slot has one worker. It loses the worker's host again and again."""
    search = Search(cluster, "lost")
    search.begin(*SLOW, "--trials", "2", "--epochs", str(EPOCHS), "--slots", "1")
    return search


@contextmanager
def in_the_middle(cluster: Cluster, search: Search) -> Iterator[hosts.Host]:
    """Yields the host that trains, to be lost in the middle of a trial; then waits for it to go on on the other one."""
    reached = len(search.history(0))
    training: list[hosts.Host] = []

    def one_of_them_trains() -> bool:
        training[:] = [host for host in cluster.workers if trainers(host)]
        return len(training) == 1 and len(search.history(0)) > reached

    search.wait_for(one_of_them_trains)  # and the one that was lost before has heard of it
    (host,) = training
    (other,) = (each for each in cluster.workers if each is not host)
    before, began = search.history(0), time.monotonic()
    yield host
    search.wait_for(lambda: trainers(other))
    search.goes_on(before, began, host.name)


def test_a_cut_network_costs_what_was_trained_since_the_last_state(cluster: Cluster, lost: Search) -> None:
    with in_the_middle(cluster, lost) as host:
        cluster.network.cut(host)
    cluster.network.mend(host)


def test_a_spot_notice_costs_no_more_than_an_epoch(cluster: Cluster, lost: Search) -> None:
    with in_the_middle(cluster, lost) as host:
        nodes = {node["node_ip"]: node["node_id"] for node in cluster.listed("nodes", "--filter", "state=ALIVE")}
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        notice += ["--node-id", nodes[host.address], "--deadline-remaining-seconds", "3"]
        cluster.head.run("ray", "drain-node", *notice)
        time.sleep(3)
        cluster.network.power_off(host)
    cluster.network.power_on(host)


def test_a_search_that_lost_hosts_ends_with_the_trials_asked_for(lost: Search) -> None:
    lost.wait()
    lost.check_nothing_is_missing_or_double(trials=2, epochs=EPOCHS)


def test_ray_down_ends_ray_everywhere(cluster: Cluster) -> None:
    cluster.ray("down", CLUSTER, "-y")
    for host in cluster.network.hosts:
        wait_for(lambda host=host: not any("/raylet " in line for line in host.processes().values()))
