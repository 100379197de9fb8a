"""Servers on this machine, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator

from processes import free_port, wait_for


@contextlib.contextmanager
def server(command: Callable[[int], list[str]], ready: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server on loopback, when it answers at the path `ready`: its address and its process, a group of its own."""
    port = free_port()
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command(port), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(url + ready), process)
        yield url, process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        get(url)
    except OSError:
        return False
    return True


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())
