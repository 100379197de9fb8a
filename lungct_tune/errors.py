"""The base class of errors that a user can fix, and a word for their messages."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix; the message says what is wrong, where, and what to do."""


class SearchStopped(UserError):
    """A search has ended before all of its trials. What it has is kept, and it can continue."""


def number_of(n: int, what: str) -> str:
    """A number and a noun, such as "1 slot" or "2 slots"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class if it has none, as a bare `MemoryError`."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
