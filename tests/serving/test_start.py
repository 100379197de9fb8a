"""The start of the server and its end, in the session's Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import free_port

from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.serving.server import Replicas, serving


@pytest.mark.long
def test_an_error_while_the_server_runs_is_not_taken_for_one_of_its_start(cluster: None, bundle: Path) -> None:
    served = serving(Classifier.load(bundle, "cpu"), "127.0.0.1", free_port(), None, Replicas(1, 1), None)
    with pytest.raises(RuntimeError, match="while it runs"), served:
        raise RuntimeError("while it runs")
