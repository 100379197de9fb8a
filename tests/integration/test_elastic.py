"""Nodes that come when slots wait for them, and go when nobody needs them: Ray's own autoscaler, real raylets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import psutil
import pytest
from conftest import SMALL, SPACE
from optuna.trial import TrialState
from processes import free_port, wait_for
from studies import epochs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.long, pytest.mark.ray]

NODES = 2
WORKER = {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "min_workers": 0}
SILENT: dict[str, object] = {
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    "cluster_synced_files": [],
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster that is a head without CPUs, with an autoscaler that may add two nodes of one CPU each."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    config = tmp_path_factory.mktemp("autoscaler") / "cluster.yaml"
    provider = {
        "type": "fake_multinode",
        "gcs_address": address,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    config.write_text(
        json.dumps(
            {
                "cluster_name": "elastic",
                "max_workers": NODES,
                "upscaling_speed": 10,
                "idle_timeout_minutes": 0.1,
                "provider": provider,
                "head_node_type": "ray.head.default",
                "available_node_types": {
                    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                    "worker": WORKER | {"max_workers": NODES},
                },
                **SILENT,
            }
        )
    )
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    ray = Path(sys.executable).parent / "ray"
    start = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=0", f"--autoscaling-config={config}"]
    # a folder of its own, where it notes that it is the cluster at hand; short, for the sockets in it
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        start += ["--include-dashboard=false", f"--temp-dir={folder}"]
        head = subprocess.Popen([*start, "--node-ip-address=127.0.0.1"], env=environment)
        yield address
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()
        head.wait()


def nodes(address: str) -> list[dict[str, float]]:
    """The resources of the nodes that are up, asked of the head without joining its cluster."""
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions

    state = GlobalState()
    state._initialize_global_state(GcsClientOptions.create(address, None, True, False))
    return [node["Resources"] for node in state.node_table() if node["Alive"]]


def test_slots_wait_for_nodes_that_come_and_go(
    address: str, tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster begins and ends with its head alone, which has no CPU for a worker."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "space.yaml").write_text(SPACE)
    arguments = ["--address", address, "--space", str(tmp_path / "space.yaml"), "--storage", str(tmp_path)]
    search = [sys.executable, "-m", "lungct_tune.search", "--data", str(phantoms), *arguments, *SMALL]
    wait_for(lambda: len(nodes(address)) == 1)

    refused = subprocess.run([*search, "--slots", str(NODES + 1)], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "holds 0 workers, and 2 with all the nodes that its autoscaler may bring, and 3 are" in refused.stderr

    most, log = 1, tmp_path / "search.log"
    study_url = f"sqlite:///{tmp_path}/elsewhere.db"
    asked = ["--name", "elastic", "--study", study_url, "--trials", "6", "--epochs", "4"]
    with log.open("w") as printed, subprocess.Popen([*search, *asked], stdout=printed, stderr=printed) as run:
        try:
            while run.poll() is None:
                most = max(most, len(nodes(address)))
                time.sleep(1)
        finally:
            run.kill()
    assert run.returncode == 0, log.read_text()
    assert "2 slots of 1 worker with 1 CPU each (room for 0 now; the others start as nodes come)" in log.read_text()
    assert most >= 1 + NODES  # at times more: the autoscaler replaces a node that it ended before the head missed it
    study = optuna.load_study(study_name="elastic", storage=study_url)
    assert not (tmp_path / "elastic" / "study.journal").exists()
    ended = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    assert [trial.number for trial in ended] == list(range(6))
    histories = [epochs_of(trial) for trial in ended]
    assert all([figures["epoch"] for figures in history] == [*range(1, 1 + len(history))] for history in histories)
    assert {figures["slot"] for history in histories for figures in history} == {1, 2}
    wait_for(lambda: len(nodes(address)) == 1)  # nobody pays for what nobody uses
