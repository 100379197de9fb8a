"""Work that a search does not wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lungct_tune.tuning.background import BackgroundThreads

if TYPE_CHECKING:
    import pytest


def test_an_error_is_logged_and_later_work_is_done(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("No space left on device")

    done: list[int] = []
    with BackgroundThreads(1) as threads:
        threads.submit(fail)
        threads.submit(done.append, 1)
    assert done == [1] and "the search goes on, but: No space left on device" in caplog.text
