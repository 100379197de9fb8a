"""The start of the server and its end, in the session's Ray."""

from __future__ import annotations

import threading
from pathlib import Path
from time import sleep

import pytest
import requests
from processes import free_port

from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.serving.server import Replicas, serving


@pytest.mark.long
def test_an_error_while_the_server_runs_is_not_taken_for_one_of_its_start(cluster: None, bundle: Path) -> None:
    served = serving(Classifier.load(bundle, "cpu"), "127.0.0.1", free_port(), None, Replicas(1, 1), None)
    with pytest.raises(RuntimeError, match="while it runs"), served:
        raise RuntimeError("while it runs")


@pytest.mark.long
def test_requests_that_have_arrived_are_answered_before_the_server_ends(
    cluster: None, bundle: Path, phantoms: Path
) -> None:
    port, answers = free_port(), []
    image = next(phantoms.rglob("*.png")).read_bytes()

    def ask(images: int) -> None:
        files = [("files", (f"{k}.png", image)) for k in range(images)]
        url = f"http://127.0.0.1:{port}/predict?pictures=true"
        answers.append(requests.post(url, files=files, timeout=60).status_code)

    asking = threading.Thread(target=ask, args=(24,))
    with serving(Classifier.load(bundle, "cpu"), "127.0.0.1", port, None, Replicas(1, 1), None):
        ask(1)
        asking.start()
        sleep(0.5)
        assert len(answers) == 1, "it is being answered when the server ends"
    asking.join()
    assert answers == [200, 200]
    with pytest.raises(requests.ConnectionError):
        ask(1)
