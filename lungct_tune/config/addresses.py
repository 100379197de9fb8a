"""Addresses of databases and servers. They are stored and shown, so they must not contain a password."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

LONGEST = 300
"""Characters of a value in a message."""

SECRETS = "pass(?!file)|pwd|secret|token|odbc_connect"
"""Pattern for options of a database URL that may hold a password; drivers have many, such as sslpassword."""


def without_secrets(text: str) -> str:
    """Hides NAME:PASSWORD@ and ?OPTIONS of URLs in a user's text, so that a message can quote it."""
    return re.sub(r"[^/'\n]*:.*@|(?<=\?).*", "***", text)


def shown(value: Any) -> str:
    """A user's value for a message: without secrets, and not endless."""
    text = without_secrets(repr(value))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def check_database(url: str) -> None:
    """Checks the URL of Optuna's database.

    Raises:
        ValueError: it is no such URL, or has a password.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        database = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError("expected a database URL, such as sqlite:///FILE or postgresql://USER@HOST/NAME") from None
    if database.password is not None or any(re.search(SECRETS, key, re.IGNORECASE) for key in database.query):
        raise ValueError(
            "others can read a password in a command, for example in Ray's dashboard; put it where the "
            "database driver looks for it (PostgreSQL: PGPASSWORD or ~/.pgpass)"
        )


def check_server(track: str) -> None:
    """Checks the address of a tracking server.

    Raises:
        ValueError: it is no such address, or has a name or password.
    """
    uri = urlsplit(track.removeprefix("mlflow:"))
    if "@" in uri.netloc:
        raise ValueError(
            "it must not contain a name or password, since it is stored and shown; set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD instead"
        )
    if not track.startswith("mlflow:") or uri.scheme not in ("http", "https") or not uri.hostname:
        raise ValueError("expected mlflow:http://HOST:PORT, or https")
