"""What tests share: one Ray, one small data set, one finished search.

The Makefile says how tests run; which of them run together is decided by their marks:

- A test marked `long` needs hosts, services, a failing store, a long search, or much time. `make test-all` runs it.
- A test that uses the fixture `cluster` is marked `ray` here. All of them share one Ray, in one process. A test that
  starts a Ray of its own is marked `ray` in its module, since no other test may run beside it.
- A test marked `gpu` needs a CUDA GPU. `make test-gpu` runs it; the other commands leave it out.
- All others need no Ray. They run in two processes, each with one thread for torch, also those that are `long`.
"""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lungct_tune.cli import OBJECTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s3 import Faulty

# Ray runs its workers at nice 15; beside the test runner on two cores they would starve
os.environ.setdefault("RAY_worker_niceness", "0")

if "PYTEST_XDIST_WORKER" in os.environ:  # one of two processes on two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.set_threshold(OBJECTS)  # as every command does

# A shell ignores Ctrl-C for what it starts in the background, and nohup ignores SIGHUP. The processes that tests start
# would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPOSITORY = Path(__file__).parents[1]
CT_IMAGES = REPOSITORY.parent / "shared" / "chest-ctscan"
SPACE = """
truncation_depth: {low: 1, high: 8}
dropout: {low: 0.0, high: 0.5}
backbone_lr: {low: 1e-4, high: 1e-2, log: true}
fixed_trials: [{truncation_depth: 4}]
"""
SMALL = ["--weights", "none", "--image-size", "32", "--batch-size", "8"]
CT_WEIGHTS = REPOSITORY.parent / "shared" / "weights" / "resnet_ct_k22.pth"


@pytest.hookimpl(tryfirst=True)  # before pytest picks tests by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and "cluster" in item.fixturenames:
            item.add_marker("ray")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray of two CPUs, which processes that the tests start find and join too."""
    import ray

    from lungct_tune.tuning.cluster import connect

    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)  # of a test that has a store of its own: the cluster's workers do not know it
        connect(None, verbose=False)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small phantom data set: 30 patients, 60 images."""
    from lungct_tune.data import make_phantoms

    return make_phantoms(tmp_path_factory.mktemp("data"), seed=1, patients=30, size=48)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A bundle of a network that has learned a little from the phantoms' train and valid, made without Ray."""
    from trained import write_trained_bundle

    return write_trained_bundle(tmp_path_factory.mktemp("results"), phantoms)


@pytest.fixture(scope="session")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small search space."""
    file = tmp_path_factory.mktemp("space") / "small.yaml"
    file.write_text(SPACE)
    return file


@pytest.fixture(scope="session")
def finished(cluster: None, tmp_path_factory: pytest.TempPathFactory, space: Path) -> Path:
    """The folder of a search that has ended, made as a user makes it. Tests read it and leave it as it is.

    It ran 6 trials in 2 slots on phantoms of its own, compared its winner with the published configuration, and left
    nothing behind in Ray.
    """
    from processes import searching
    from ray_state import nothing_held

    storage = tmp_path_factory.mktemp("storage")
    where = ["--space", str(space), "--storage", str(storage), "--name", "one"]
    how = ["--trials", "6", "--epochs", "4", "--slots", "2", "--final-workers", "2", "--compare-baseline"]
    with searching(*where, *SMALL, *how) as run:
        output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output
    assert nothing_held()
    return storage / "one"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[int]:
    """The port of an S3 server with the bucket `bucket`."""
    from http.client import HTTPConnection

    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    yield port
    server.stop()


@pytest.fixture
def s3(s3_server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """The proxy before the S3 server, which this process takes for S3."""
    from s3 import Faulty, environment

    proxy = Faulty(s3_server)
    for name, value in environment(proxy).items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.ended.set()
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests neither use nor fill the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
