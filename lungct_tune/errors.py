"""What a user can mend, and is told in words."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend; the message says what is wrong, where, and what to do."""
