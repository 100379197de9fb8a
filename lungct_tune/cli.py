"""The command `lungct-tune`, and the argument parser and exit status that all commands share."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lungct_tune import __version__
from lungct_tune.errors import UserError

COMMANDS = {
    "search": "Search for the best truncated ResNet50 for lung CT images, retrain it, and evaluate it once.",
    "audit": "Look for copies, conflicts, shortcuts and leaks in images and their split.",
    "evaluate": "Evaluate a bundle's model on other images, without training.",
    "predict": "Classify images with a bundle's model, with heat maps and warnings.",
    "export": "Write a bundle's model as one file for ONNX Runtime or PyTorch.",
    "compare": "Compare bundles on the same test images.",
    "report": "Make the report of a search again, or of a search that has not ended.",
    "replay": "Train one trial of a search again, and compare its figures with the recorded ones.",
    "pull": "Fetch the best model of a search, verify it, and show how accurate it is.",
    "download": "Fetch the public CT images from Kaggle.",
}
"""What each command does. `lungct-tune NAME` and `python -m lungct_tune.NAME` both run `lungct_tune.NAME.main`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lungct-tune COMMAND ...`; returns the exit status of the command, 2 if there is no such command."""
    parser = argparse.ArgumentParser(
        prog="lungct-tune",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Search for the best ResNet50-based classifier of lung CT images, and show how accurate it is.",
        epilog="\n".join(["commands:", *(f"  {name:<10}{line}" for name, line in COMMANDS.items())])
        + "\n\nlungct-tune COMMAND --help shows its options. python -m lungct_tune.COMMAND is the same command.",
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-"):
        parser.parse_args(words)
        parser.error("a command is missing; lungct-tune --help lists them")
    name, *rest = words
    if name not in COMMANDS:
        parser.error(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    # imported by name here, since commands import much, and are in a layer above this module
    status: int = importlib.import_module(f"lungct_tune.{name}").main(rest)
    return status


def command_line(name: str, examples: str, **more: Any) -> argparse.ArgumentParser:
    """Makes the parser of `python -m lungct_tune.NAME`, without arguments yet."""
    return argparse.ArgumentParser(
        prog=f"python -m lungct_tune.{name}",
        description=COMMANDS[name],
        epilog=examples,
        formatter_class=_formatter,
        allow_abbrev=False,
        **more,
    )


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=27, width=110)


def exit_status(run: Callable[[], int | None], stopped: str = "") -> int:
    """Runs a command and returns its exit status; 2 for an error that the user can fix, 130 for Ctrl-C.

    Args:
        run: the command; it returns its exit status, or None for 0.
        stopped: the message after Ctrl-C, if the KeyboardInterrupt has no message.
    """
    try:
        return run() or 0
    except UserError as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nstopped. {_message(stop) or stopped}".rstrip(), file=sys.stderr)
        return 130


def _message(error: BaseException) -> str:
    """The error's own message and its notes, a line each."""
    return "\n".join(filter(None, [str(error), *getattr(error, "__notes__", ())]))
