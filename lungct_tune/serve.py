"""Serves a bundle's model over HTTP: a page for people, /predict for programs.

python -m lungct_tune.serve --help
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from rich.console import Console

from lungct_tune.cli import command_line, exit_status, terminal
from lungct_tune.display import print_prose
from lungct_tune.errors import UserError

TOKEN = "LUNGCT_TOKEN"
"""The environment variable with the token."""

EXAMPLES = f"""\
examples:
  python -m lungct_tune.serve results/NAME/best
  curl -F files=@slice.png http://127.0.0.1:8000/predict
  python -m lungct_tune.serve results/NAME/best --address auto --replicas 2-8 --gpus-per-replica 0.25
  {TOKEN}=... python -m lungct_tune.serve results/NAME/best --host 0.0.0.0
  curl -H "Authorization: Bearer ${TOKEN}" -F files=@a.png -F files=@b.png http://HOST:8000/predict

The page is at /, the interface is described at /docs. The answers are those of predict. Unless it listens on this
machine only, the server asks for a token: that of the environment variable {TOKEN}, or a new one, which it prints.
Ctrl-C ends it. No answer is a diagnosis.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 2 for an error that the user can fix, 130 for Ctrl-C."""
    parser = command_line("serve", EXAMPLES)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="its folder, results/NAME/best or as pulled")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=_port, default=8000, help="where to listen (8000)")
    parser.add_argument(
        "--replicas", metavar="MIN-MAX", type=_replicas, default=(1, None), help="of the model (1 to all that fit)"
    )
    parser.add_argument(
        "--gpus-per-replica", metavar="GPUS", type=_gpus, help="such as 0.25, or 0 for one CPU (a GPU if there are any)"
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="a Ray cluster, whose head listens; auto: the one here")
    asked = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends is a Ctrl-C
    return exit_status(lambda: serve(asked, terminal()), "The server has ended.")


def serve(asked: argparse.Namespace, console: Console) -> None:
    """Reads the bundle, starts the server, and waits for Ctrl-C.

    Raises:
        BundleError: the bundle is incomplete or altered.
        UserError: a package is missing, or the server cannot start.
    """
    # imported only after the command line is checked, so that --help answers at once
    from lungct_tune.experiment.bundle import verify

    verify(asked.bundle)  # before torch is imported, which takes seconds
    for module in ("fastapi", "uvicorn", "python_multipart"):
        if find_spec(module) is None:
            raise UserError(f"{module} is missing; install what serves with: pip install 'lungct-tune[serve]'")

    from lungct_tune.evaluation.classifier import Classifier
    from lungct_tune.serving.server import Replicas, serving

    token = os.environ.get(TOKEN) or (None if _is_loopback(asked.host) else secrets.token_urlsafe(24))
    classifier = Classifier.load(asked.bundle, device="cpu")  # a replica knows where it computes
    least, most = asked.replicas
    replicas = Replicas(least, most, asked.gpus_per_replica)
    with serving(classifier, asked.host, asked.port, token, replicas, asked.address) as what:
        name = f"[{asked.host}]" if ":" in asked.host else asked.host
        console.print(f"serving {asked.bundle} at http://{name}:{asked.port} ({what})")
        if token:
            shown = f"that of {TOKEN}" if os.environ.get(TOKEN) else token
            warning = "Anyone who can read the network can read it: put TLS before this server."
            print_prose(console, f"token: {shown}. {warning}")
        console.print("Ctrl-C ends it. Research software: no answer is a diagnosis.")
        threading.Event().wait()


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(word: str) -> int:
    if not word.isascii() or not word.isdigit() or not 1 <= int(word) <= 65535:
        raise argparse.ArgumentTypeError(f"{word!r} is no port; give a number from 1 to 65535")
    return int(word)


def _replicas(word: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", word)
    least, most = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{word!r}: give a number, or MIN-MAX with MIN from 1 to MAX, such as 1-4")
    return least, most


def _gpus(word: str) -> float:
    gpus = float(word) if re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,4})?", word) else -1.0
    if gpus < 0 or (gpus > 1 and gpus % 1):
        raise argparse.ArgumentTypeError(f"{word!r}: give a share of a GPU, such as 0.25, a whole number, or 0")
    return gpus


if __name__ == "__main__":
    sys.exit(main())
