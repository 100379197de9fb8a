"""The command `lungct-tune`, and the argument parser and exit status that all commands share."""

from __future__ import annotations

import argparse
import difflib
import errno
import gc
import importlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from lungct_tune import __version__
from lungct_tune.errors import UserError
from lungct_tune.stopping import at_stop, interrupt, without_reader

PROGRAM = "lungct-tune"
"""The name of the installed program."""

OBJECTS = 50_000
"""How many new objects start Python's search for cycles. With its default of 700, what a command imports is searched
again and again, for a tenth of the time until it answers."""

FULL = {errno.ENOSPC, errno.EDQUOT}
"""Errors of a disk that is full, or of a user who may not write more to it. A write that fails names no file."""

REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, *FULL}
"""What the system refuses a user: permission, a write, a name that long, space. No other `OSError` is the user's."""

COMMANDS = {
    "search": "Search for the best truncated ResNet50 for lung CT images, retrain it, and evaluate it once.",
    "audit": "Look for copies, conflicts, shortcuts and leaks in images and their split.",
    "evaluate": "Evaluate a bundle's model on other images, without training.",
    "predict": "Classify images with a bundle's model, with heat maps and warnings.",
    "serve": "Serve a bundle's model over HTTP: a page for people, /predict for programs.",
    "export": "Write a bundle's model as one file for ONNX Runtime or PyTorch.",
    "compare": "Compare searches, or models on the same test images.",
    "report": "Make the report of a search again, or of a search that has not ended.",
    "replay": "Train one trial of a search again, and compare its figures with the recorded ones.",
    "clean": "Remove what a finished search does not need any more, after saying what and how much.",
    "pull": "Fetch the best model of a search, verify it, and show how accurate it is.",
    "download": "Fetch the public CT images from Kaggle.",
}
"""What each command does. `lungct-tune NAME` and `python -m lungct_tune.NAME` both run `lungct_tune.NAME.main`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lungct-tune COMMAND ...`; returns the exit status of the command, 2 if there is no such command."""
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Search for the best truncated ResNet50 for lung CT images, on one machine or a Ray cluster.",
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
        parser.error(
            f"there is no command {name!r}{suggestion(name, COMMANDS)}; the commands are {', '.join(COMMANDS)}"
        )
    # imported by name here, since commands import much, and are in a layer above this module
    status: int = importlib.import_module(f"lungct_tune.{name}").main(rest)
    return status


def command_line(name: str, examples: str, **more: Any) -> argparse.ArgumentParser:
    """Makes the parser of `python -m lungct_tune.NAME`, without arguments yet."""
    return _Parser(
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

    SIGTERM and SIGHUP count as Ctrl-C, and so does the end of the program that reads what is printed (`| head`).

    Args:
        run: the command; it returns its exit status, or None for 0.
        stopped: the message after Ctrl-C, if the KeyboardInterrupt has no message.
    """
    gc.set_threshold(OBJECTS)
    try:
        with at_stop(interrupt):
            status = run() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        _say(f"error: {_message(error)}")
        return 2
    except KeyboardInterrupt as stop:
        if not _Terminal.has_no_reader or _message(stop):
            _say(f"\nstopped. {_message(stop) or stopped}".rstrip())
        return 130
    except BrokenPipeError:
        without_reader(sys.stdout.fileno())
        return 130
    except OSError as error:
        if error.errno not in REFUSALS or (error.filename is None and error.errno not in FULL):
            raise
        where = error.filename or "the disk of the results, of the cache (XDG_CACHE_HOME) or of /tmp (TMPDIR)"
        _say(f"error: {where}: {error.strerror}")
        return 2


def _say(text: str) -> None:
    with suppress(OSError):  # nobody may read this either
        print(printable(text), file=sys.stderr, flush=True)


def terminal() -> Console:
    """What a command prints to: texts are shown as they are, see `printable`, unless `markup` is given.

    No text is broken into lines, so that a path or a command can be copied; `print_prose` breaks sentences.
    """
    return _Terminal(highlight=False, markup=False)


def command_words(name: str) -> list[str]:
    """The words that run another command from the user's folder, in this environment: `lungct-tune NAME`, or Python."""
    called = Path(sys.argv[0])
    if called.name == PROGRAM:
        return [PROGRAM if shutil.which(PROGRAM) == str(called.absolute()) else _from_here(called), name]
    python = Path(sys.executable)  # not resolved: in a virtual environment it is a link to the system's Python
    return [
        python.name if shutil.which(python.name) == sys.executable else _from_here(python),
        "-m",
        f"lungct_tune.{name}",
    ]


def _from_here(program: Path) -> str:
    with suppress(ValueError):
        return str(program.relative_to(Path.cwd()))
    return str(program)


def suggestion(word: str, words: Iterable[str]) -> str:
    """The words for a message that name the one of `words` that was probably meant; empty if none is like it."""
    closest = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {closest[0]}?)" if closest else ""


def printable(text: str) -> str:
    """A text for the terminal, without secrets in addresses, and with control characters as codes.

    Names of files and classes, and messages of libraries about them, may have characters that move the cursor, colour
    the screen or turn the direction of writing.
    """
    text = _SECRETS.sub("***", text)
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SECRETS = re.compile(
    r"(?<=:/)/?[^\s/@'\"]*:[^\s'\"]*(?=@)"  # a path has one of the slashes
    r"|(?<=[?&])[^\s=&'\"]*(?:pass|pwd|secret|token|key|sig)[^\s=&'\"]*=[^\s&'\"]*",
    re.IGNORECASE,
)


class _Terminal(Console):
    has_no_reader = False

    def on_broken_pipe(self) -> None:
        """Stops the command as Ctrl-C does. The reader has gone, and no more is printed."""
        self.quiet = _Terminal.has_no_reader = True
        without_reader(sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGTERM)  # and not an exception here, which may be in the thread of a display

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **{"soft_wrap": all(isinstance(each, str) for each in objects), **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


class _Parser(argparse.ArgumentParser):
    """Refuses arguments that no option takes: empty ones, and those that are not UTF-8."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        for before, word in zip(["", *words], words, strict=False):
            if not word or re.fullmatch("--[a-z-]+=", word):
                name = word.rstrip("=") or (before if before.startswith("--") else "an argument")
                self.error(f"{name} is empty; give a value, or leave it out")
            if not word.isprintable():  # also what is not UTF-8
                self.error(f"{word!a} has characters that cannot be printed, or is not UTF-8; rename that file")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            known = {word: suggestion(word.partition("=")[0], flags) for word in message.split(": ", 1)[1].split()}
            unknown = [f"{word}{meant}" for word, meant in known.items() if word.startswith("-") or meant]
            message = f"there is no option {', '.join(unknown)}" if unknown else message
        super().error(printable(message))

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        try:
            sys.stdout.flush()  # the help
        except BrokenPipeError:
            without_reader(sys.stdout.fileno())
        super().exit(status, message)


def _message(error: BaseException) -> str:
    """The error's own message and its notes, a line each."""
    return "\n".join(filter(None, [str(error), *getattr(error, "__notes__", ())]))
