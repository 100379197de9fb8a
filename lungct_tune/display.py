"""The last lines of the terminal while a command works: what it does, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

REFRESHES_PER_S = 4


class Display:
    """Shows the steps that a command is in, each with the time since its start, below what the command prints.

    Without a terminal each step is a line, printed when it starts. A context manager; before and after it only the
    lines are printed.
    """

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
        return self

    def __exit__(self, *_: object) -> None:
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

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Shows nothing for a while, because something else shows a bar of its own."""
        self._live.stop()
        try:
            yield
        finally:
            self.__enter__()

    def _render(self) -> RenderableType:
        steps = Table.grid(padding=(0, 1))
        for name, since in list(self._steps.items()):
            steps.add_row(self._spinner, Text(f"{name}, {time.monotonic() - since:.0f} s"))
        return Group(*(part() for part in list(self._parts)), steps)
