"""Places by URI: whatever pyarrow's file systems take, opened to outlast a bad moment of a server."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any

import pyarrow.fs

from lungct_tune.errors import UserError

ATTEMPTS = 10
"""How often S3 is asked again, at once, then after 0.05, 0.1, 0.2 s and so on: 26 s in all."""

REQUEST_TIMEOUT_S = 5
"""How long S3 may say nothing before it is asked again."""

GOOGLE_PATIENCE = timedelta(seconds=30)
"""How long Google Cloud Storage is asked again, instead of a quarter of an hour."""

CAUSES = {
    r"NO_SUCH_BUCKET|Bucket '.*' not found|bucket does not exist": (
        "there is no such bucket; create it, or correct its name"
    ),
    r"ACCESS_DENIED|ACCESS_KEY|SIGNATURE|HTTP status 40[13]|UNAUTHENTICATED|OAuth2|PERMISSION_DENIED|[Pp]ermission d": (
        "permission denied; check the credentials on that machine (environment, the store's usual files, instance "
        "profile) and at what they allow"
    ),
    r"NETWORK_CONNECTION|CURL error": (
        "no server answers; check the network, and AWS_ENDPOINT_URL if the S3 server is not Amazon's"
    ),
    r"HTTP status 301|PERMANENT_REDIRECT": "the bucket is in another region; set AWS_REGION to it",
    r"HTTP status 5\d\d|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE": "the server only answers with errors",
    r"No space left": "the disk is full",
}
"""What an error's words say of its likely cause."""


class StorageError(UserError):
    """A place cannot be used: the message names the URI, what failed and what to do, and never a secret."""


class RetryingS3(pyarrow.fs.S3FileSystem):  # type: ignore[misc]
    """S3 that is asked again when it fails or stalls, from whichever process.

    pyarrow's own asks for 6 s, and where it was unpickled, as in Ray's workers, three times.
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
        StorageError: it holds credentials or options, or nothing here understands it.
    """
    scheme, _, place = uri.partition("://")
    if re.match(r"[^/]*:.*@|.*\?", place):  # a secret may have slashes in it; said without repeating it
        raise StorageError(
            f"the {scheme}:// URI contains credentials or a query, and it is written where others can read it. Put "
            "credentials into the environment, the store's usual files or an instance profile, the address of an S3 "
            "server into AWS_ENDPOINT_URL (http://HOST:PORT) and its region into AWS_REGION, on every node"
        )
    _ask_no_metadata(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    except OSError as error:
        raise StorageError(refusal(uri, "open it", error)) from error
    except Exception as error:  # pyarrow and fsspec raise many kinds
        raise StorageError(
            f"{uri}: not understood ({error}); give a folder, s3://, gs://, abfs://, hdfs://, or fsspec+PROTOCOL:// "
            "for what an fsspec package takes that is installed on every node"
        ) from error
    if isinstance(filesystem, pyarrow.fs.S3FileSystem):
        filesystem = RetryingS3(*filesystem.__reduce__()[1])
    elif filesystem.type_name == "gcs":
        make, (options,) = filesystem.__reduce__()
        filesystem = make(options | {"retry_time_limit": GOOGLE_PATIENCE})
    return filesystem, path


def refusal(uri: str, what: str, error: Exception) -> str:
    """The message for a place that cannot do `what`, with the likely cause."""
    causes = (cause for words, cause in CAUSES.items() if re.search(words, str(error)))
    return f"{uri}: cannot {what}: {next(causes, 'check that the folder or bucket exists')} ({error})"


def _ask_no_metadata(endpoint: str | None) -> None:
    """Where S3 is not Amazon's, its library need not wait 9 s in each process for an EC2 that isn't there."""
    if endpoint and "amazonaws.com" not in endpoint:
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
