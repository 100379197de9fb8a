"""How a search starts: what is refused at once starts no Ray cluster, and a cluster starts while images are read."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trials", "0"], "trials = '0'"),
        (["--space", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "nothing"], "there is no search 'nothing'"),
        (["--data", "."], "error: "),
    ],
)
def test_what_is_refused_at_once_starts_no_cluster(arguments: list[str], says: str, tmp_path: Path) -> None:
    sessions = tmp_path / "ray"
    sessions.mkdir()
    own = {"RAY_TMPDIR": str(sessions), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own
    command = [sys.executable, "-m", "lungct_tune.search", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr
    assert list(sessions.iterdir()) == []
