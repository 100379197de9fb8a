"""Ctrl-C, SIGTERM and SIGHUP: each of them ends a command in the same way.

Schedulers and containers send SIGTERM. SIGHUP comes when a terminal is closed or a connection is lost.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_libc = ctypes.CDLL(None)

_asked = threading.Event()
"""Whether the command has been asked to end."""


@contextmanager
def at_stop(act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` in the main thread when one of the `SIGNALS` comes. Outside of the main thread this does nothing.

    A signal that this process was started to ignore stays ignored: `nohup` sets that for SIGHUP, a shell for SIGINT of
    what it runs in the background. After the first signal only Ctrl-C calls `act` again: a terminal that closes and a
    system that shuts down send several.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if not any(getattr(handler, "__module__", "") == __name__ for handler in before.values()):
        _asked.clear()  # in a block inside of another one, a stop stays known

    def handle(number: int, frame: Any) -> None:
        _leave_lost_terminal()
        if number == signal.SIGINT or not _asked.is_set():
            _asked.set()
            act()

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt() -> None:
    """Raises what Python raises at Ctrl-C.

    Raises:
        KeyboardInterrupt: always.
    """
    raise KeyboardInterrupt


@contextmanager
def stop_delayed() -> Iterator[None]:
    """Delays a stop to the end of the block, so that what is started there is known to the code that ends it.

    Raises:
        KeyboardInterrupt: at the end, if a signal has come meanwhile.
    """
    asked = threading.Event()
    with at_stop(asked.set):
        yield
    if asked.is_set():
        raise KeyboardInterrupt


@contextmanager
def stop_says(sentence: str) -> Iterator[None]:
    """Gives a stop in the block this message, see `exit_status`.

    Raises:
        KeyboardInterrupt: with the message.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(sentence) from None


def was_asked() -> bool:
    """Whether the command has been asked to end. Errors after that are likely its consequences."""
    return _asked.is_set()


@contextmanager
def own_signals() -> Iterator[None]:
    """Around the start of Ray: its processes do not get SIGHUP, and this process keeps its handler of SIGTERM.

    A terminal that closes sends SIGHUP to all processes that were started from it. Those of Ray must live until this
    process has ended its search. Ray's library replaces the handler of SIGTERM by one that ends the process with a
    dump. Python can change handlers only in the main thread, and Ray may start in another one.
    """
    action = ctypes.create_string_buffer(1024)  # more than a struct sigaction
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # of this thread, and processes inherit it
    in_python = signal.getsignal(signal.SIGTERM)
    _libc.sigaction(signal.SIGTERM, None, action)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, in_python)
        _libc.sigaction(signal.SIGTERM, action, None)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def without_reader(stream: int) -> None:
    """Sends what is written to a file descriptor from now on nowhere, because nobody can read it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream)
    os.close(nowhere)


def _leave_lost_terminal() -> None:
    """Stops writing to a terminal that has been closed, which would be an error."""
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # what is no terminal has another code
                without_reader(stream)
