"""The base class of errors that a user can fix."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix; the message says what is wrong, where, and what to do."""


class SearchStopped(UserError):
    """A search has ended before all of its trials. What it has is kept, and it can continue."""
