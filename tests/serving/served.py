"""One server for the tests of a module, in the session's Ray. It asks for a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from processes import free_port

TOKEN = "the-token-of-the-tests"


@dataclass(frozen=True)
class Server:
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def predict(self, *files: tuple[str, bytes], token: str = TOKEN, pictures: bool = False) -> requests.Response:
        return requests.post(
            f"{self.url}/predict",
            params={"pictures": pictures},
            files=[("files", file) for file in files],
            headers={"Authorization": f"Bearer {token}"},
            timeout=120,
        )

    def metrics(self) -> dict[str, float]:
        """The value of each series."""
        answer = requests.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def health(self) -> Any:
        answer = requests.get(f"{self.url}/health", timeout=60)
        return answer.status_code, answer.json()


@pytest.fixture(scope="module")
def server(cluster: None, bundle: Path) -> Iterator[Server]:
    """It has two replicas of the model."""
    from lungct_tune.evaluation.classifier import Classifier
    from lungct_tune.serving.server import Replicas, serving

    port = free_port()
    with serving(Classifier.load(bundle, "cpu"), "127.0.0.1", port, TOKEN, Replicas(2, 2), None) as what:
        assert what == "2 replicas with 1 CPU"
        yield Server(port)
