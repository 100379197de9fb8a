"""Signals that end a command, beside threads that must not be interrupted."""

from __future__ import annotations

import signal
import threading

from lungct_tune.stopping import at_stop, stop_delayed, was_asked


def test_a_stop_is_remembered_while_a_thread_starts_something() -> None:
    """The retraining's slot starts in a thread. Terminals that close send their signal twice."""
    stops: list[int] = []

    def start() -> None:
        with stop_delayed():
            pass

    with at_stop(lambda: stops.append(1)):
        signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGTERM)
        assert was_asked() and stops == [1]


def test_a_stop_stays_known_in_a_block_inside_of_another_one() -> None:
    with at_stop(lambda: None):
        signal.raise_signal(signal.SIGTERM)
        with stop_delayed():
            assert was_asked()
        assert was_asked()
    with at_stop(lambda: None):
        assert not was_asked(), "another command"
