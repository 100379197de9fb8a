"""What the entrances of the package (`python -m lungct_tune.search` and its like) share: how they begin and end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from lungct_tune.errors import UserError


def command_line(name: str, description: str, examples: str, **more: Any) -> argparse.ArgumentParser:
    """The parser of `python -m lungct_tune.NAME`, without arguments yet."""
    return argparse.ArgumentParser(
        prog=f"python -m lungct_tune.{name}",
        description=description,
        epilog=examples,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=27, width=110),
        allow_abbrev=False,
        **more,
    )


def exit_status(run: Callable[[], int | None], stopped: str = "") -> int:
    """Runs an entrance to its end: its own status, 2 for what the user can mend, 130 for Ctrl-C.

    Args:
        stopped: what to know after Ctrl-C, where that itself says nothing.
    """
    try:
        return run() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nstopped. {str(stop) or stopped}".rstrip(), file=sys.stderr)
        return 130
