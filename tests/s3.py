"""An S3 server's proxy that now and then fails or stalls."""

from __future__ import annotations

import http.client
import itertools
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pyarrow.fs

if TYPE_CHECKING:
    from collections.abc import Callable

KEY, SECRET = "A-KEY-OF-THE-TESTS", "a-secret-of-the-tests"


class Faulty(ThreadingHTTPServer):
    """Passes requests on to a server, but those that `fault` has another answer for."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.port, self.ended = port, threading.Event()
        self.fault: Callable[[BaseHTTPRequestHandler], int | str | None] = lambda request: None
        """An HTTP status to answer with, "stall" for no answer at all, or None to pass the request on."""
        self.answered: Counter[int | str | None] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def now_and_then(self, rates: dict[int | str, float], seed: int, stalls: set[int]) -> None:
        """Errors at these rates, and no answer at all to the requests of these numbers."""
        chance, number = random.Random(seed), itertools.count(1)

        def fault(request: BaseHTTPRequestHandler) -> int | str | None:
            if next(number) in stalls:
                return "stall"
            return next((error for error, rate in rates.items() if chance.random() < rate), None)

        self.fault = fault

    def first(self, fault: int | str, times: int) -> None:
        left = iter([fault] * times)
        self.fault = lambda request: next(left, None)


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def log_message(self, *_: object) -> None:
        pass

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            content = self.rfile.read(length)
            if len(content) < length:  # of a process that was killed: S3 keeps no half of an object, moto would
                raise ConnectionAbortedError
            return content
        chunks = []
        while length := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _pass_on(self) -> None:
        content = self._content()
        fault = self.server.fault(self)
        self.server.answered[fault] += 1
        if fault == "stall":
            self.server.ended.wait(600)
            self.close_connection = True
        elif fault is not None:
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            server = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
            server.request(self.command, self.path, content, headers)
            answer = server.getresponse()
            body = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            server.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on


def environment(proxy: Faulty) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}


def put(bucket_path: str, content: bytes) -> None:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(f"s3://{bucket_path}")
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)
