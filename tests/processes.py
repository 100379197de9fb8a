"""Searches and servers in processes of their own, and waiting for what they do."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def run_here(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str, str]:
    """A command line in this process, since a new one would import torch for 5 s: exit status, stdout, stderr."""
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as complained:
        status = main([str(argument) for argument in arguments])
    return status, said.getvalue(), complained.getvalue()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[Any] | None = None, within_s: float = 600) -> None:
    """Waits until the condition holds.

    Raises:
        AssertionError: the process ended first, with what it had printed; or that takes too long.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it ended early:\n{process.stdout and process.stdout.read()}")
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.3)


@contextmanager
def running(
    command: str, *arguments: str, environment: dict[str, str] | None = None, folder: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`python -m lungct_tune.COMMAND`, with what it prints in its pipe; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"lungct_tune.{command}", *arguments],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


searching = partial(running, "search")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
