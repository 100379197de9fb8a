"""What the server answers over HTTP: rows as from predict, refusals with a reason, pages that need no network."""

from __future__ import annotations

import http.client
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import requests
from dicom_files import PATIENT_ID, PLANTED, UID_ROOT, WAYS, as_dicom, write_slice
from PIL import Image
from served import TOKEN, Server, server  # noqa: F401

from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.serving.web import MOST_BYTES, MOST_FILES


def read(path: Path) -> tuple[str, bytes]:
    return path.name, path.read_bytes()


def rows_of(table: Any) -> list[dict[str, Any]]:
    """Rows of a table as JSON has them."""
    rows: list[dict[str, Any]] = table.astype(object).where(table.notna(), None).to_dict("records")
    return rows


def test_answers_are_those_of_predict_to_the_last_digit_alone_and_together(
    server: Server, bundle: Path, phantoms: Path
) -> None:
    paths = sorted(phantoms.glob("*/*/*.png"))[:24]
    expected = Classifier.load(bundle, "cpu").classify_files(paths)
    expected["path"] = [path.name for path in paths]
    together = server.predict(*map(read, paths))
    assert together.status_code == 200 and together.json()["images"] == rows_of(expected)
    assert (together.json()["bundle"], together.json()["threshold"]) == ("one", 0.6)
    with ThreadPoolExecutor(8) as clients:
        alone = list(clients.map(lambda path: server.predict(read(path)).json()["images"], paths))
    assert [row for rows in alone for row in rows] == rows_of(expected)


def test_dicom_files_have_the_answers_of_predict_and_no_identifier_is_written(
    server: Server, bundle: Path, phantoms: Path, tmp_path: Path
) -> None:
    series = as_dicom(phantoms, tmp_path / "series")
    listed = pd.read_csv(phantoms / "groups.csv")["path"][: len(WAYS)]
    paths = [(series / path).with_suffix("") for path in listed]
    black_HW = np.zeros((32, 32), np.uint8)
    frames = write_slice(tmp_path / "frames.dcm", black_HW, NumberOfFrames=3, PatientID=f"{PATIENT_ID}7")
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(paths[0].read_bytes()[:-500])
    paths += [frames, cut]
    expected = Classifier.load(bundle, "cpu").classify_files(paths)
    expected["path"] = [path.name for path in paths]
    several = server.predict(*map(read, paths))
    assert several.status_code == 200 and several.json()["images"] == rows_of(expected)
    assert [bool(row["unreadable"]) for row in several.json()["images"]] == [False] * len(WAYS) + [True, True]
    one = server.predict(read(paths[0]))
    assert one.status_code == 200 and one.json()["images"] == rows_of(expected.iloc[:1])

    logs = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray/session_latest/logs").resolve()
    written = [path.read_text(errors="replace") for path in logs.rglob("*") if path.is_file()]
    assert len(written) > 10
    for identifier in [PATIENT_ID, UID_ROOT, *(part for value in PLANTED.values() for part in value.split("^"))]:
        assert identifier.encode() in paths[0].read_bytes(), "it would be found"
        assert not any(identifier in text for text in (several.text, one.text, *written)), identifier


def test_files_that_cannot_be_read_have_the_reason(server: Server, phantoms: Path) -> None:
    image = read(next(phantoms.glob("*/*/*.png")))
    mixed = server.predict(image, ("notes.txt", b"no picture"), ("", b"x"))
    assert mixed.status_code == 200
    good, bad, *_ = mixed.json()["images"]
    assert good["unreadable"] == "" and bad["unreadable"].startswith("not an image") and bad["class"] is None
    assert "/tmp" not in mixed.text
    large = io.BytesIO()
    Image.new("1", (6000, 6000)).save(large, "PNG")
    none = server.predict(("large.png", large.getvalue()))
    assert none.status_code == 422 and "pixels" in none.json()["images"][0]["unreadable"]


def test_pictures_are_sent_where_they_are_asked_for(server: Server, phantoms: Path) -> None:
    image = read(next(phantoms.glob("*/*/*.png")))
    seen, broken = server.predict(image, ("x", b"x"), pictures=True).json()["images"]
    assert all(seen[name].startswith("data:image/webp;base64,") for name in ("picture", "heat_map"))
    assert seen["picture"] != seen["heat_map"] and "picture" not in broken
    assert "picture" not in server.predict(image).json()["images"][0]


def test_a_token_is_needed_for_answers_and_counters_only(server: Server, phantoms: Path) -> None:
    image = read(next(phantoms.glob("*/*/*.png")))
    for token in ("", "wrong", TOKEN + "x", "tök"):
        answer = server.predict(image, token=token.encode().decode("latin-1"))
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert requests.get(f"{server.url}/metrics", timeout=60).status_code == 401
    assert requests.post(f"{server.url}/predict", files={"files": image}, timeout=60).status_code == 401
    for path in ("/", "/docs", "/openapi.json", "/health"):
        assert requests.get(server.url + path, timeout=60).status_code == 200
    assert server.health()[1]["replicas"] == 2


def send(server: Server, headers: dict[str, str], parts: list[bytes]) -> http.client.HTTPResponse:
    """A request whose body is what the parts are, whatever the headers say."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/predict")
    form = {"Content-Type": "multipart/form-data; boundary=b", "Authorization": f"Bearer {TOKEN}"}
    for name, value in (form | headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    try:
        for part in parts:
            connection.send(part)
    except OSError:
        pass  # it has answered already
    return connection.getresponse()


def test_a_request_that_is_too_large_is_refused_before_it_is_read(server: Server) -> None:
    said = send(server, {"Content-Length": str(MOST_BYTES + 1)}, [])  # and nothing of it is sent
    assert said.status == 413 and b"64 MB" in said.read()
    chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
    parts = [b"%x\r\n" % len(head) + head + b"\r\n", *[chunk] * (MOST_BYTES // 0x100000 + 2)]
    assert send(server, {"Transfer-Encoding": "chunked"}, parts).status == 413


def test_forms_that_are_none_are_refused(server: Server) -> None:
    many = server.predict(*[("x.png", b"x")] * (MOST_FILES + 1))
    assert many.status_code == 400 and str(MOST_FILES) in many.json()["detail"]
    assert send(server, {"Content-Type": "image/png", "Content-Length": "1"}, [b"x"]).status == 415
    capitals = {"Content-Type": "Multipart/Form-Data; boundary=b", "Content-Length": "7"}
    assert send(server, capitals, [b"--b--\r\n"]).status == 400  # a form, with no file in it
    empty = send(server, {"Content-Length": "7"}, [b"--b--\r\n"])
    assert empty.status == 400 and b"no file" in empty.read()


def test_counters_count(server: Server, phantoms: Path) -> None:
    before = server.metrics()
    server.predict(read(next(phantoms.glob("*/*/*.png"))), ("x", b"x"))
    server.predict(("x", b"x"), token="wrong")
    assert send(server, {"Content-Type": "multipart/form-data", "Content-Length": "1"}, [b"x"]).status == 400
    now = server.metrics()
    for name, more in (
        ('lungct_requests_total{status="200"}', 1),
        ('lungct_requests_total{status="401"}', 1),
        ('lungct_requests_total{status="400"}', 1),
        ('lungct_requests_total{status="500"}', 0),
        ('lungct_images_total{answer="classified"}', 1),
        ('lungct_images_total{answer="unreadable"}', 1),
        ("lungct_request_seconds_count", 3),
    ):
        assert now.get(name, 0) == before.get(name, 0) + more


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/health", "/metrics"])
def test_whatever_answers_get_answers_head(server: Server, path: str) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    got, head = (requests.request(method, server.url + path, headers=headers, timeout=60) for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == got.headers["Content-Type"]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere(server: Server, path: str) -> None:
    page = requests.get(server.url + path, timeout=60)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.text) and "No answer is a diagnosis" in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "/predict" in requests.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
