"""The pictures of README and docs, made from phantoms: `make pictures` (some minutes, Chromium from Debian).

    python docs/make_pictures.py [PICTURE ...]      all of them, or some: report audit terminal dashboard study

A search runs on phantoms in a pseudo-terminal. What it draws there becomes `terminal.svg`; meanwhile Chromium looks at
Ray's dashboard, and afterwards at the report, at the study in optuna-dashboard and at the audit of phantoms with
planted copies. Chromium is driven by its DevTools protocol over a WebSocket of aiohttp, which Ray brings. PNG files are
written with 256 colours, and none may be larger than LIMIT. `journey.svg` is drawn by hand.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from fcntl import ioctl
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image, ImageOps
from rich.console import Console
from rich.text import Text

from lungct_tune.data.phantoms import make_phantoms

PICTURES = Path(__file__).parent / "pictures"
NAMES = ("report", "audit", "terminal", "dashboard", "study")
LIMIT = 300_000
"""Bytes of the largest picture that a reader should have to wait for."""

WIDTH, HEIGHT = 1280, 900
COLUMNS, ROWS = 112, 40
SHOWN_HOME, SHOWN_FOLDER = "/home/me", "/home/me/lungct_tune"
"""What the terminal's picture shows instead of this machine's folders."""

DONE_BEFORE_LOOKING = 4
"""Trials that have ended when the running search is looked at."""

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--lang=en")


# ---- Chromium -----------------------------------------------------------------------------------------------


class Page:
    """A page of Chromium, driven by the DevTools protocol."""

    def __init__(self, socket_: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._calls = socket_, 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol, and returns what it answers."""
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        while (answer := await self._socket.receive_json()).get("id") != self._calls:
            pass  # an event
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    async def wait_for(self, script: str, seconds: float = 60) -> None:
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not await self.evaluate(script):
            if time.monotonic() > end:
                raise TimeoutError(script)
            await asyncio.sleep(0.3)

    async def show(self, url: str, width: int = WIDTH, height: int = HEIGHT, *, dark: bool = False) -> None:
        """Opens an address in a window of this size."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Page.navigate", url=url)
        await asyncio.sleep(0.5)
        await self.wait_for("document.readyState == 'complete'")

    async def scroll_to(self, heading: str) -> None:
        """Brings the heading with this text to the top."""
        headings = "[...document.querySelectorAll('h2, h3')]"
        await self.evaluate(f"{headings}.find(h => h.textContent == {json.dumps(heading)}).scrollIntoView()")

    async def picture(self) -> bytes:
        """What the window shows, as PNG."""
        await asyncio.sleep(1)  # what moves comes to rest
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


@asynccontextmanager
async def chromium() -> AsyncIterator[Page]:
    """A page of a Chromium of its own, which ends with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [shutil.which("chromium") or "chromium", *FLAGS, f"--user-data-dir={profile}"]
        browser = subprocess.Popen(
            [*command, "--remote-debugging-port=0", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            file = Path(profile, "DevToolsActivePort")
            while not (file.exists() and len(lines := file.read_text().split()) == 2):
                if browser.poll() is not None:
                    raise RuntimeError("Chromium did not start")
                await asyncio.sleep(0.1)
            async with aiohttp.ClientSession(f"http://127.0.0.1:{lines[0]}") as session:
                pages = await (await session.get("/json/list")).json()
                address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as socket_:
                    yield Page(socket_)
        finally:
            browser.terminate()
            browser.wait()


def save(name: str, png: bytes, height: int | None = None) -> None:
    """Writes a picture with 256 colours, cut to `height`."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if height:
        image = image.crop((0, 0, image.width, min(height, image.height)))
    file = PICTURES / f"{name}.png"
    image.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    if (size := file.stat().st_size) > LIMIT:
        raise RuntimeError(f"{file} has {size} bytes, and {LIMIT} are allowed")
    print(f"{file.relative_to(PICTURES.parents[1])}: {size / 1000:.0f} kB, {image.width} x {image.height}")


# ---- the search, in a terminal ------------------------------------------------------------------------------


class Terminal:
    """What a program draws in a pseudo-terminal, as far as rich's live display needs it: lines that are erased and
    drawn again, with their colours."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self._lines, self._row, self._master = [""], 0, master
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stream = io.TextIOWrapper(io.FileIO(self._master), encoding="utf-8", errors="replace", newline="")
        pending = ""
        while True:
            try:
                pending += stream.read(1)
            except OSError:  # the program has ended
                return
            if re.fullmatch(r"\x1b(\[[?0-9;]*)?", pending):
                continue
            self._draw(pending)
            pending = ""

    def _draw(self, piece: str) -> None:
        if piece == "\n":
            self._row += 1
            self._lines += [""] * (self._row >= len(self._lines))
        elif piece == "\x1b[2K":
            self._lines[self._row] = ""
        elif piece == "\x1b[1A":
            self._row -= 1
        elif piece != "\r" and not piece.startswith("\x1b[?"):
            self._lines[self._row] += piece

    @property
    def screen(self) -> str:
        """All that was drawn, with the escape sequences of its colours."""
        return "\n".join(self._lines).rstrip()

    @property
    def text(self) -> str:
        return Text.from_ansi(self.screen).plain


def save_terminal(screen: str) -> None:
    """Writes a screen as an SVG, without the fonts that rich would fetch from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen), soft_wrap=False)
    svg = console.export_svg(title="make search")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code", "DejaVu Sans Mono")
    file = PICTURES / "terminal.svg"
    file.write_text(re.sub(r"terminal-\d+", "terminal", svg))
    print(f"{file.relative_to(PICTURES.parents[1])}: {file.stat().st_size / 1000:.0f} kB")


@contextmanager
def running_search(folder: Path) -> Iterator[Terminal]:
    """A search on phantoms with a Ray of its own, whose dashboard asks for no token."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local", "TERM": "xterm-256color"}
    environment |= {"COLORTERM": "truecolor", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["python", "-m", "lungct_tune.search", "--name", "phantoms"]
    terminal = Terminal(command, folder, environment)
    try:
        yield terminal
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGINT)  # it ends its Ray too
        terminal.process.wait()


async def until(terminal: Terminal, pattern: str) -> re.Match[str]:
    """Waits until the terminal shows something."""
    while not (found := re.search(pattern, terminal.text)):
        if terminal.process.poll() is not None:
            raise RuntimeError(f"the search ended without {pattern!r}:\n{terminal.text}")
        await asyncio.sleep(0.5)
    return found


UNFOLD = """
(() => {
  let at = document.querySelector("[data-testid=progress-bar-segment]");
  if (!at) return false;
  while (!at.querySelector("svg")) at = at.parentElement;
  at.querySelector("svg").dispatchEvent(new MouseEvent("click", {bubbles: true}));
  return true;
})()
"""
"""Clicks the arrow beside the progress bar in Ray's dashboard; false while it is not there."""


async def job_page(page: Page, dashboard: str) -> None:
    """The search's page in Ray's dashboard, with its progress bar unfolded."""
    async with aiohttp.ClientSession() as session, session.get(f"{dashboard}/api/jobs/") as answer:
        job = (await answer.json())[0]["job_id"]
    await page.show(f"{dashboard}/#/jobs/{job}", height=1130)
    await page.wait_for(UNFOLD, 120)
    await page.wait_for("document.body.innerText.includes('trials done')", 60)


@contextmanager
def study_server(study: Path) -> Iterator[str]:
    """optuna-dashboard on a study; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    server = subprocess.Popen(
        [program, "--port", str(port), str(study)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


async def study_page(page: Page, study: Path) -> None:
    """The study in optuna-dashboard."""
    with study_server(study) as address:
        await page.show(f"{address}/dashboard/studies/0", height=1130)
        await page.wait_for("document.body.innerText.includes('Best Trial')")
        await asyncio.sleep(3)  # its charts are drawn one after another


# ---- the audit ----------------------------------------------------------------------------------------------


def audited(folder: Path) -> Path:
    """The audit's page of phantoms of which six stand again, changed, in another part."""
    images = make_phantoms(folder, seed=0)
    originals = sorted(images.glob("train/*/*-0.png"))[::12][:6]
    for number, original in enumerate(originals):
        image, target = Image.open(original), images / ("valid", "test")[number % 2]
        (of_class,) = (f for f in target.iterdir() if f.name.split("_")[0] == original.parent.name.split("_")[0])
        match number % 3:
            case 0:
                shutil.copy(original, of_class / f"copy-{number}.png")
            case 1:
                ImageOps.mirror(image).save(of_class / f"copy-{number}.jpg", quality=60)
            case 2:
                image.resize((160, 160)).save(of_class / f"copy-{number}.png")
    page = folder / "audit.html"
    subprocess.run([sys.executable, "-m", "lungct_tune.audit", "--data", images, "--html", page], check=True)
    return page


# ---- all of it ----------------------------------------------------------------------------------------------


async def make(wanted: set[str], folder: Path) -> None:
    """Makes the pictures that are wanted, with all that they need in `folder`."""
    async with chromium() as page:
        if "audit" in wanted:
            await page.show(audited(folder).as_uri())
            save("audit", await page.picture())
            await page.scroll_to("Copies to look at")
            save("copies", await page.picture(), height=665)
        if not wanted - {"audit"}:
            return
        with running_search(folder) as terminal:
            dashboard = (await until(terminal, r"dashboard +(http\S+)"))[1]
            await until(terminal, rf"\b{DONE_BEFORE_LOOKING} of \d+ trials")
            if "terminal" in wanted:
                save_terminal(terminal.screen.replace(str(folder), SHOWN_FOLDER).replace(str(Path.home()), SHOWN_HOME))
            if "dashboard" in wanted:
                await job_page(page, dashboard)
                save("dashboard", await page.picture(), height=760)
            await until(terminal, "bundle: ")
        experiment = folder / "results" / "phantoms"
        if "report" in wanted:
            report = experiment / "best" / "report.html"
            if not report.exists():
                raise RuntimeError(f"the bundle has no report:\n{terminal.text}")
            await page.show(report.as_uri())
            save("report", await page.picture())
        if "study" in wanted:
            await study_page(page, experiment / "study.journal")
            save("study", await page.picture())


if __name__ == "__main__":
    chosen = set(sys.argv[1:]) or set(NAMES)
    if strangers := chosen - set(NAMES):
        sys.exit(f"no picture is called {', '.join(strangers)}; there are {', '.join(NAMES)}")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        asyncio.run(make(chosen, Path(os.environ.get("PICTURES_SCRATCH", scratch))))
