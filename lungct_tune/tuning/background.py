"""Threads for work that a search does not wait for, such as uploads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lungct_tune.errors import UserError


class BackgroundThreads(ThreadPoolExecutor):
    """A pool of threads whose results nobody looks at. Errors do not end the search; they are logged as warnings."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(work, *args, **kwargs)
        future.add_done_callback(_log_error)
        return future


def _log_error(future: Future[Any]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        trace = None if isinstance(error, (UserError, OSError)) else error  # a full disk is no fault of the program
        logging.getLogger(__name__).warning("the search goes on, but: %s", error, exc_info=trace)
