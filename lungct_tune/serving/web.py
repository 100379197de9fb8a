"""The deployment that speaks HTTP: checks requests, passes their images to the model, and has the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
from collections.abc import Callable
from importlib.resources import files
from time import perf_counter
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Environment, StrictUndefined
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException  # also what its forms raise; FastAPI's is a subclass
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from lungct_tune import __version__
from lungct_tune.serving.model import Upload

APPLICATION, MODEL = "lungct_tune", "Model"
"""The names of the application and of the model's deployment in Ray Serve."""

MOST_BYTES = 64_000_000
"""Of a request's body."""

MOST_FILES = 64
"""Of a request."""

BODY_S = 60
"""Seconds in which a request's body must have arrived."""

TRIES = 5
"""How often an image is given to a replica, if the replicas die."""

ENDING = "the server is ending"

LEAVING_S = 1.0
"""How long the last answers get to leave through Ray Serve's proxy."""

NO_DIAGNOSIS = "Research software, not a medical device. No answer is a diagnosis."

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            }
        },
    }
}


@serve.ingress()  # type: ignore[untyped-decorator]
class Web:
    """Answers requests. There is one replica, so that its counters are those of the server.

    Args:
        model: the deployment `Model`.
        about: what /predict says about the bundle: its name, classes, image_size and threshold.
        token_digest: the sha256 of the token; None if none is asked for.
    """

    def __init__(self, model: DeploymentHandle[Any], about: dict[str, Any], token_digest: bytes | None) -> None:
        self._model, self._about, self._token_digest = model, about, token_digest
        self._busy, self._is_ending = 0, False
        self._counters = CollectorRegistry()
        self._requests = Counter("lungct_requests", "Requests to /predict", ["status"], registry=self._counters)
        self._images = Counter("lungct_images", "Images in them", ["answer"], registry=self._counters)
        self._again = Counter("lungct_retries", "Images whose replica had died", registry=self._counters)
        self._seconds = Histogram("lungct_request_seconds", "Time of a request to /predict", registry=self._counters)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Is called by Ray Serve when the replica starts."""
        app = FastAPI(
            title="lungct_tune",
            version=__version__,
            description=f"Classifies lung CT images with a bundle's model. {NO_DIAGNOSIS}",
            docs_url=None,  # FastAPI's page loads its scripts from elsewhere
            redoc_url=None,
        )
        app.add_api_route("/predict", self.predict, methods=["POST"], summary="Classify images", openapi_extra=_FORM)
        app.add_api_route("/health", self.health, summary="Whether the server works")
        app.add_api_route("/metrics", self.metrics, summary="Counters for Prometheus")
        for path, answer in (("/health", self.health), ("/metrics", self.metrics)):
            app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)  # Starlette adds it by itself
        pages = {"/": _as_page("page.html", name=self._about["bundle"], no_diagnosis=NO_DIAGNOSIS)}
        pages["/docs"] = _as_page("docs.html", api=app.openapi())
        for path, page in pages.items():
            app.add_route(path, _always(page))
        return app

    async def end(self) -> None:
        """Waits until the requests that have arrived are answered. From now on others get the status 503."""
        self._is_ending = True
        while self._busy:
            await asyncio.sleep(0.05)
        await asyncio.sleep(LEAVING_S)

    async def health(self) -> JSONResponse:
        """Status and number of replicas, as of Ray Serve's last check, which is up to 10 s old. Needs no token."""
        if self._is_ending:
            return JSONResponse({"status": ENDING, "replicas": 0, "version": __version__}, 503)
        status = await asyncio.to_thread(serve.status)
        states = status.applications[APPLICATION].deployments[MODEL].replica_states
        running = sum(n for state, n in states.items() if state == "RUNNING")
        content = {"status": "ok" if running else "no replica runs", "replicas": running, "version": __version__}
        return JSONResponse(content, 200 if running else 503)

    async def metrics(self, request: Request) -> Response:
        """Requests, images and times since the server's start, as text."""
        self._check_token(request)
        return Response(generate_latest(self._counters), media_type=CONTENT_TYPE_LATEST)

    async def predict(
        self,
        request: Request,
        pictures: Annotated[bool, Query(description="whether to answer with heat maps")] = False,
    ) -> JSONResponse:
        """Classifies the files of a form, `files`, in any format that `predict` reads.

        For each image the answer has a row of `predict --out`: class, calibrated probabilities, cancer or normal at the
        operating point, whether the model was trained on the image or its like, and whether the image is unlike all
        that it was trained on. An unreadable file has the reason in `unreadable`. With `pictures`, `picture` and
        `heat_map` are data URIs. The status is 422 if no file can be read.
        """
        begun, status = perf_counter(), 500
        self._busy += 1
        try:
            self._check_token(request)
            if self._is_ending:
                raise HTTPException(503, ENDING)
            uploads = await _uploads(request, pictures)
            rows = await asyncio.gather(*map(self._classify, uploads))
            unreadable = sum(bool(row["unreadable"]) for row in rows)
            self._images.labels("unreadable").inc(unreadable)
            self._images.labels("classified").inc(len(rows) - unreadable)
            status = 422 if unreadable == len(rows) else 200
            return JSONResponse({"images": rows, **self._about, "note": NO_DIAGNOSIS}, status)
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self._busy -= 1
            self._requests.labels(status).inc()
            self._seconds.observe(perf_counter() - begun)

    async def _classify(self, upload: Upload) -> dict[str, Any]:
        """Asks a replica, and another one if it dies. Ray Serve itself does not ask again.

        Raises:
            HTTPException: 503, they all died.
        """
        for _ in range(TRIES):
            try:
                row: dict[str, Any] = await self._model.remote(upload)
                return row
            except RayActorError:
                self._again.inc()
        raise HTTPException(503, f"{TRIES} replicas were lost with this image; try again later")

    def _check_token(self, request: Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.encode()).digest()
        if self._token_digest and not (kind.lower() == "bearer" and hmac.compare_digest(digest, self._token_digest)):
            raise HTTPException(401, "this server asks for its token", {"WWW-Authenticate": "Bearer"})


async def _uploads(request: Request, pictures: bool) -> list[Upload]:
    """Reads the files of a form.

    Raises:
        HTTPException: it is too large, late, or no form with files.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "send images as multipart/form-data, in the field `files`")
    if int(request.headers.get("content-length", 0)) > MOST_BYTES:  # uvicorn lets only numbers through
        raise _too_large()
    limited = Request(request.scope, _limited(request.receive))
    try:
        async with asyncio.timeout(BODY_S), limited.form(max_files=MOST_FILES, max_fields=MOST_FILES) as form:
            sent = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            uploads = [Upload(file.filename or "", await file.read(), pictures) for file in sent]
    except TimeoutError as error:
        raise HTTPException(408, f"the request did not arrive within {BODY_S} s") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the request did not arrive") from error
    if not uploads:
        raise HTTPException(400, "there is no file in the form; send images in the field `files`")
    return uploads


def _limited(receive: Receive) -> Receive:
    """The parts of a request's body, up to `MOST_BYTES`, for a request that does not say its length."""
    left = MOST_BYTES

    async def next_part() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise _too_large()
        return message

    return next_part


def _too_large() -> HTTPException:
    return HTTPException(413, f"a request may have {MOST_BYTES // 10**6} MB; send fewer images at a time")


def _always(page: Response) -> Callable[[Request], Response]:
    return lambda _: page


def _as_page(template: str, **shown: Any) -> HTMLResponse:
    """One of this folder's pages, which the browser keeps from loading anything from elsewhere."""
    text = files(__package__).joinpath(template).read_text("utf-8")
    html = Environment(autoescape=True, undefined=StrictUndefined).from_string(text).render(shown)
    allowed = {
        "style-src": re.findall(r"<style>(.*?)</style>", html, re.DOTALL),
        "script-src": re.findall(r"<script>(.*?)</script>", html, re.DOTALL),
    }
    policy = ["default-src 'none'", "img-src data:", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"]
    for source, parts in allowed.items():
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        policy.append(" ".join([source, *(f"'sha256-{digest}'" for digest in digests)]))
    headers = {"Content-Security-Policy": "; ".join([*policy, "frame-ancestors 'none'"]), "Cache-Control": "no-store"}
    return HTMLResponse(html, headers=headers)
