"""Opens file systems by URI, all that pyarrow supports, and retries when a server fails for a short time."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any

import pyarrow.fs

from lungct_tune.errors import UserError

ATTEMPTS = 10
"""How often an S3 request is retried: at once, then after 0.05, 0.1, 0.2 s and so on; 26 s in all."""

REQUEST_TIMEOUT_S = 5
"""How long S3 may give no answer before the request is retried."""

GOOGLE_PATIENCE = timedelta(seconds=30)
"""How long requests to Google Cloud Storage are retried; the default is 15 minutes."""

CAUSES = {
    r"NO_SUCH_BUCKET|Bucket '.*' not found|bucket does not exist": (
        "there is no such bucket; create it, or correct its name"
    ),
    r"ACCESS_DENIED|ACCESS_KEY|SIGNATURE|HTTP status 40[13]|UNAUTHENTICATED|OAuth2|PERMISSION_DENIED|[Pp]ermission d": (
        "permission denied; check the credentials on that machine (environment, the store's usual files, instance "
        "profile) and what they allow"
    ),
    r"NETWORK_CONNECTION|CURL error": (
        "no server answers; check the network, and AWS_ENDPOINT_URL if the S3 server is not Amazon's"
    ),
    r"HTTP status 301|PERMANENT_REDIRECT": "the bucket is in another region; set AWS_REGION to it",
    r"HTTP status 5\d\d|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE": "the server only answers with errors",
    r"No space left": "the disk is full",
    r"not a regular file": "there is something else of this name; move it away, and restore the file",
}
"""Patterns in the text of an error, and the likely cause of each."""


class StorageError(UserError):
    """A storage cannot be used; the message names the URI, what failed and what to do, and never a secret."""


class RetryingS3(pyarrow.fs.S3FileSystem):  # type: ignore[misc]
    """S3 whose requests are retried when they fail or stall, also after unpickling.

    pyarrow's S3 retries for 6 s; after unpickling, as in Ray's workers, it retries three times.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        _ask_no_metadata(options["endpoint_override"])
        patience = {
            "retry_strategy": pyarrow.fs.AwsDefaultS3RetryStrategy(max_attempts=ATTEMPTS),
            "request_timeout": REQUEST_TIMEOUT_S,
            "allow_delayed_open": True,  # a small file is one request instead of three
        }
        super().__init__(**options | patience)

    def __reduce__(self) -> Any:
        return RetryingS3, super().__reduce__()[1]


def resolve_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a URI, and the path in it.

    Raises:
        StorageError: the URI contains credentials or options, or no installed package supports it.
    """
    scheme, _, place = uri.partition("://")
    if re.match(r"[^/]*:.*@|.*\?", place):  # a secret may contain slashes; the message does not repeat it
        raise StorageError(
            f"the {scheme}:// URI contains credentials or a query, and others can read the places where it is stored. "
            "On every node, put credentials into the environment, the store's usual files or an instance profile. Put "
            "the address of an S3 server into AWS_ENDPOINT_URL (http://HOST:PORT) and its region into AWS_REGION"
        )
    _ask_no_metadata(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    except OSError as error:
        raise StorageError(refusal(uri, "open it", error)) from error
    except Exception as error:  # pyarrow and fsspec raise many kinds
        raise StorageError(
            f"{uri}: not understood ({error}); give a folder, s3://, gs://, abfs://, hdfs://, or fsspec+PROTOCOL:// "
            "for a protocol whose fsspec package is installed on every node"
        ) from error
    if isinstance(filesystem, pyarrow.fs.S3FileSystem):
        filesystem = RetryingS3(*filesystem.__reduce__()[1])
    elif filesystem.type_name == "gcs":
        make, (options,) = filesystem.__reduce__()
        filesystem = make(options | {"retry_time_limit": GOOGLE_PATIENCE})
    return filesystem, path


def refusal(uri: str, what: str, error: Exception) -> str:
    """The message for an operation, `what`, that failed on a URI, with the likely cause."""
    causes = (cause for words, cause in CAUSES.items() if re.search(words, str(error)))
    return f"{uri}: cannot {what}: {next(causes, 'check that the folder or bucket exists')} ({error})"


def _ask_no_metadata(endpoint: str | None) -> None:
    """Turns off EC2 metadata for an S3 server that is not Amazon's: looking for it takes 9 s in each process."""
    if endpoint and "amazonaws.com" not in endpoint:
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")


class NodeRefused(StorageError):
    """A node cannot use the search's storage. It would fail for every trial. The message names the node."""
