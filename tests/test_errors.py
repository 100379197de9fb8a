"""The words for errors."""

from __future__ import annotations

import pytest

from lungct_tune.errors import first_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "CUDA out of memory."),
        (ValueError("\n  two lines\nfollow"), "two lines"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_error_has_a_first_line_even_without_a_message(error: Exception, expected: str) -> None:
    """A worker that ran out of memory without a word failed a second time, over its message."""
    assert first_line(error) == expected
