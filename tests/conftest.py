"""One Ray for all tests that need it: starting it takes seconds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# Ray runs its workers at nice 15; beside the test runner on two cores they would starve
os.environ.setdefault("RAY_worker_niceness", "0")

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
    """A small phantom data set: 20 patients, 60 images."""
    from lungct_tune.data import make_phantoms

    return make_phantoms(tmp_path_factory.mktemp("data"), seed=1, patients=20, size=48)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests neither use nor fill the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
