"""The server under load and in a real Chromium: a killed replica, 500 hostile uploads, Ctrl-C, dropped files."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from make_pictures import Page, chromium
from processes import free_port, running, wait_for
from served import TOKEN, Server, server  # noqa: F401
from user_files import image_cases

pytestmark = [pytest.mark.long, pytest.mark.ray]

NAMES = (
    "a.png",
    "",
    "\x00.png",
    "../../x",
    "a" * 5000,
    "<script>.dcm",
    "\u202e.jpg",
    "a\r\nX: y",
    "é.tiff",
    '".',
)
KINDS = ("multipart/form-data", "multipart/form-data; boundary=", "text/plain", "image/png")


def replicas() -> set[int]:
    """The processes of the model's replicas."""
    from ray.util.state import list_actors

    named = [("class_name", "=", "ServeReplica:lungct_tune:Model"), ("state", "=", "ALIVE")]
    return {actor.pid for actor in list_actors(filters=named)}


def test_a_replica_that_is_killed_under_load_loses_no_request(server: Server, phantoms: Path) -> None:
    images = [(path.name, path.read_bytes()) for path in sorted(phantoms.glob("*/*/*.png"))[:20]]
    expected = {name: server.predict((name, content)).json()["images"] for name, content in images}
    before = server.metrics().get("lungct_retries_total", 0)
    with ThreadPoolExecutor(16) as clients:
        answers = [(image[0], clients.submit(server.predict, image)) for image in images * 30]
        wait_for(lambda: sum(answer.done() for _, answer in answers) > 60)
        killed, other = replicas()
        os.kill(killed, signal.SIGKILL)
        for name, answer in answers:
            assert answer.result().status_code == 200
            assert answer.result().json()["images"] == expected[name]
    assert server.metrics()["lungct_retries_total"] > before, "the dead replica had no request"
    # Ray Serve counts the dead one for up to 10 s, until its health check
    wait_for(lambda: len(replicas() - {killed}) == 2 and server.health()[1]["replicas"] == 2, within_s=120)
    assert other in replicas()


def hostile_uploads(folder: Path) -> list[tuple[bytes, str]]:
    """Bodies and content types of 500 requests: broken images, hostile names, broken forms."""
    contents = []
    for i, case in enumerate(image_cases()):
        (folder / str(i)).mkdir()
        case.prepare(folder / str(i), folder)
        file = folder / str(i) / "data" / "normal" / "broken.png"
        if file.is_file() and not file.is_symlink() and file.stat().st_size < 10**7:
            contents.append(file.read_bytes())
    assert len(contents) > 40
    draw = random.Random(0)
    uploads = []
    for i in range(500):
        content, name = contents[i % len(contents)], NAMES[i % len(NAMES)]
        request = requests.Request("POST", "http://x/", files={"files": (name, content)}).prepare()
        body, kind = bytearray(request.body or b""), request.headers["Content-Type"]
        if i % 5 == 1:
            for _ in range(8):
                body[draw.randrange(min(len(body), 300))] = draw.randrange(256)
        elif i % 5 == 2:
            body = body[: draw.randrange(len(body))]
        elif i % 5 == 3:
            body = bytearray(f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode())
            body += content + b"\r\n--b--\r\n"
            kind = "multipart/form-data; boundary=b"
        elif i % 5 == 4:
            kind = draw.choice([*KINDS, kind])
        uploads.append((bytes(body), kind))
    return uploads


def test_no_hostile_upload_is_answered_with_a_fault_of_the_server(
    server: Server, phantoms: Path, tmp_path: Path
) -> None:
    image = next(phantoms.glob("*/*/*.png"))
    good, before = server.predict((image.name, image.read_bytes())).json(), replicas()

    def send(upload: tuple[bytes, str]) -> int:
        headers = {"Content-Type": upload[1], "Authorization": f"Bearer {TOKEN}"}
        return requests.post(
            f"{server.url}/predict?pictures=1", data=upload[0], headers=headers, timeout=120
        ).status_code

    with ThreadPoolExecutor(8) as clients:
        statuses = Counter(clients.map(send, hostile_uploads(tmp_path)))
    assert statuses.total() == 500 and not {status for status in statuses if status >= 500}, statuses
    assert {400, 415, 422} <= statuses.keys()
    assert server.predict((image.name, image.read_bytes())).json() == good
    assert server.health() == (200, {**server.health()[1], "status": "ok", "replicas": 2})
    assert replicas() == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_command_and_its_ray(bundle: Path, how: signal.Signals) -> None:
    port, scratch = free_port(), Path(tempfile.mkdtemp(prefix="r"))  # a Ray of its own, in a folder with a short path
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_TMPDIR"] = str(scratch)

    def serves() -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        except requests.RequestException:  # it is not there yet, or not yet ready
            return False

    try:
        with running("serve", str(bundle), "--port", str(port), "--replicas", "1", environment=environment) as process:
            assert process.stdout is not None
            said = process.stdout.readline() + process.stdout.readline()
            assert f"http://127.0.0.1:{port} (1 replica with 1 CPU)" in said and "Ctrl-C ends it" in said
            assert serves()
            image = {"files": ("x.png", next(bundle.parents[1].rglob("config.json")).read_bytes())}
            assert requests.post(f"http://127.0.0.1:{port}/predict", files=image, timeout=60).status_code == 422
            process.send_signal(how)
            ended, _ = process.communicate(timeout=90)
        said += ended
        assert process.returncode == 130 and ended == "\nstopped. The server has ended.\n"
        assert "token" not in said and "Traceback" not in said and "raylet" not in said, said
        assert not serves()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def test_a_second_server_on_the_same_ray_is_refused(server: Server, bundle: Path) -> None:
    with running("serve", str(bundle), "--port", str(free_port())) as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Ray Serve runs already" in said
    assert server.health()[0] == 200


DROPPED = """(() => {
  const files = new DataTransfer();
  for (const [name, content] of %s)
    files.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
})()"""


async def drop(page: Page, *files: tuple[str, bytes]) -> None:
    """Drops files on the page."""
    encoded = [(name, base64.b64encode(content).decode()) for name, content in files]
    await page.evaluate(DROPPED % json.dumps(encoded))


async def press(page: Page, key: str, code: int, text: str = "") -> None:
    for kind in ("keyDown", "keyUp"):
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text if kind == "keyDown" else ""}
        await page.call("Input.dispatchKeyEvent", type=kind, **named)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_in_a_browser_an_image_is_dropped_and_its_answer_read(
    server: Server, phantoms: Path, width: int, dark: bool
) -> None:
    image = next((phantoms / "train").glob("*/*.png"))
    row = server.predict((image.name, image.read_bytes())).json()["images"][0]

    async def look() -> None:
        async with chromium() as page:
            await page.show(server.url, width, dark=dark)
            asked: str = "document.activeElement.id"
            await press(page, "Tab", 9)
            await press(page, "Tab", 9)
            assert await page.evaluate(asked) == "files"  # the keyboard reaches it; Enter would open the dialog
            await drop(page, (image.name, image.read_bytes()))
            await page.wait_for("!document.getElementById('access').hidden")
            assert await page.evaluate(asked) == "token"
            await page.call("Input.insertText", text=TOKEN)
            await press(page, "Enter", 13, "\r")
            await page.wait_for("!!document.querySelector('article figure img')")
            said = await page.evaluate("document.querySelector('article').innerText")
            assert image.name in said and row["class"] in said and "No answer is a diagnosis" not in said
            assert f"{100 * row['p_normal']:.1f} %" in said and f"Counts as {row['cancer_or_normal']}" in said
            assert "The model was trained on this image" in said  # it is of the folder train
            loaded = "[...document.querySelectorAll('article img')].map((it) => it.complete && it.naturalWidth)"
            await page.wait_for(f"{loaded}.every(Boolean)")
            assert await page.evaluate(loaded) == [448, 448]
            assert "No answer is a diagnosis" in await page.evaluate("document.querySelector('header').innerText")
            assert await page.evaluate("document.documentElement.scrollWidth") == width
            ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (ground == "rgb(255, 255, 255)") != dark

            await drop(page, ("<b>notes</b>.txt", b"no picture"))
            await page.wait_for("!!document.querySelector('article .error')")
            said = await page.evaluate("document.querySelector('article').innerText")
            assert "<b>notes</b>.txt" in said and "This file cannot be read: not an image" in said
            assert (
                await page.evaluate("performance.getEntriesByType('resource').map((it) => it.name)")
                == [f"{server.url}/predict?pictures=true"] * 3
            )

    asyncio.run(asyncio.wait_for(look(), 120))
