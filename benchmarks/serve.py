"""Measures how many requests a second the server answers, and how long they take, beside the model alone.

    python benchmarks/serve.py

A bundle with random weights is served with Ray Serve on this machine. Each of 1, 8 and 64 clients sends one drawn slice
(512 x 512 pixels, PNG) after another over a connection of its own. The clients share the CPUs with the server. The
model alone is the loop of `Classifier.classify` over ready images, in this process. About 2 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import tempfile
from pathlib import Path
from time import perf_counter

import aiohttp
import numpy as np
from predict import prepare, timed

from lungct_tune.serving.server import Replicas, serving

CLIENTS = (1, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests per second of serve, and their 99th percentile.")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--replicas", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, socket.create_server(("127.0.0.1", 0)) as free:
        classifier, sources = prepare(Path(scratch), args.depth, args.px, 64)
        images = [Path(source).read_bytes() for source in sources]
        port = free.getsockname()[1]
        free.close()
        print(f"depth {args.depth}, {args.px} px, {os.cpu_count()} CPUs, {args.replicas} replicas")
        images_NHW = np.random.default_rng(0).integers(0, 256, (64, args.px, args.px), dtype=np.uint8)
        classifier.classify(images_NHW)
        alone = len(images_NHW) / timed(lambda: classifier.classify(images_NHW))
        print(f"{'model alone':>12} {alone:8.1f} images/s", flush=True)
        with serving(classifier, "127.0.0.1", port, None, Replicas(args.replicas, args.replicas), None):
            url = f"http://127.0.0.1:{port}/predict"
            asyncio.run(load(url, images, 2, 5))  # the first requests take longer
            for clients in CLIENTS:
                seconds_N, took = asyncio.run(load(url, images, clients, args.seconds))
                median, late = np.percentile(seconds_N, [50, 99])
                print(
                    f"{clients:4} clients {len(seconds_N) / took:8.1f} requests/s, median {1000 * median:7.0f} ms, "
                    f"99th percentile {1000 * late:7.0f} ms",
                    flush=True,
                )


async def load(url: str, images: list[bytes], clients: int, seconds: float) -> tuple[list[float], float]:
    """The seconds of each request, and of all of them together."""
    end, taken = perf_counter() + seconds, []

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        while (begun := perf_counter()) < end:
            form = aiohttp.FormData()
            form.add_field("files", images[number % len(images)], filename="x.png")
            async with session.post(url, data=form) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            taken.append(perf_counter() - begun)
            number += clients

    begun = perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session, number) for number in range(clients)))
    return taken, perf_counter() - begun


if __name__ == "__main__":
    main()
