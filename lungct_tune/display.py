"""What a command shows while it works: sentences, bars, and what it does now and for how long."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Self, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

REFRESHES_PER_S = 4

T = TypeVar("T")


def print_prose(console: Console, text: str, style: str | None = None, *, hang: int = 0) -> None:
    """Prints sentences: in a terminal broken between words, elsewhere each line as it is.

    No word is broken, so that a path can be copied. A command is no prose: a line break would end it.

    Args:
        hang: how far the lines that follow the first are indented.
    """
    if console.is_terminal:
        width, indent = max(console.width, hang + 20), " " * hang
        broken = (
            textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            for line in text.split("\n")
        )
        text = "\n".join("\n".join(lines) for lines in broken)
    console.print(text, style=style, soft_wrap=True, markup=False)


def tracked(items: Iterable[T], description: str, total: int, *, shown: bool) -> Iterator[T]:
    """Yields the items, and shows a bar if stderr is a terminal: in the display that is open, or else alone."""
    bar = Progress(console=Console(stderr=True), transient=True, disable=not (shown and sys.stderr.isatty()))
    if Display.open is None:
        with bar:
            yield from bar.track(items, total=total, description=description)
    else:
        with Display.open.showing(bar.get_renderable):
            yield from bar.track(items, total=total, description=description)


class Display:
    """Shows the steps that a command is in, each with the time since its start, below what the command prints.

    Without a terminal each step is a line, printed when it starts. A context manager; before and after it only the
    lines are printed.
    """

    open: ClassVar[Display | None] = None
    """The one that is shown now."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._steps: dict[str, float] = {}
        self._parts: list[Callable[[], RenderableType]] = []
        self._live = Live(
            console=console, refresh_per_second=REFRESHES_PER_S, transient=True, get_renderable=self._render
        )
        self._spinner = Spinner("dots")

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start(refresh=True)
            Display.open = self
        return self

    def __exit__(self, *_: object) -> None:
        Display.open = None
        self._live.stop()

    @contextmanager
    def step(self, name: str, *, announced: bool = False) -> Iterator[None]:
        """Shows a step until its end. Steps may overlap.

        Args:
            announced: whether what has been printed says the same, so that no line is needed without a terminal.
        """
        if not (announced or self.console.is_terminal):
            self.console.print(name)
        self._steps[name] = time.monotonic()
        try:
            yield
        finally:
            self._steps.pop(name, None)

    @contextmanager
    def showing(self, render: Callable[[], RenderableType]) -> Iterator[None]:
        """Shows something above the steps, again and again; `render` is called in a thread."""
        self._parts.append(render)
        try:
            yield
        finally:
            self._parts.remove(render)

    def _render(self) -> RenderableType:
        steps = Table.grid(padding=(0, 1))
        for name, since in list(self._steps.items()):
            steps.add_row(self._spinner, Text(f"{name}, {time.monotonic() - since:.0f} s"))
        return Group(*(part() for part in list(self._parts)), steps)
