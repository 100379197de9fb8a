"""An image has the same answer to the last digit, alone or among others, with one thread or several."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from lungct_tune.evaluation import classifier as module
from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.models.preprocessing import forward


@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_has_the_same_answer_alone_and_among_others(bundle: Path, threads: int) -> None:
    classifier = Classifier.load(bundle, "cpu")
    images_NHW = np.random.default_rng(0).integers(0, 256, (37, 32, 32), dtype=np.uint8)
    of_one_thread = classifier.classify(images_NHW)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = classifier.classify(images_NHW)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert together.table().equals(of_one_thread.table())
    for i in range(len(images_NHW)):
        alone = classifier.classify(images_NHW[i : i + 1]).table()
        assert alone.iloc[0].equals(together.table().iloc[i])


def test_calls_at_the_same_time_leave_torch_its_number_of_threads(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call begins while the first one computes, and ends after it."""
    classifier, image_1HW = Classifier.load(bundle, "cpu"), np.zeros((1, 32, 32), np.uint8)
    first_began, second_began, first_ended = Event(), Event(), Event()

    def slow_forward(*given: Any) -> torch.Tensor:
        if first_began.is_set():
            second_began.set()
            first_ended.wait(30)
        first_began.set()
        second_began.wait(30)
        return forward(*given)

    monkeypatch.setattr(module, "forward", slow_forward)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(2) as callers:
            first = callers.submit(classifier.classify, image_1HW)
            assert first_began.wait(30)
            second = callers.submit(classifier.classify, image_1HW)
            first.result()
            first_ended.set()
            second.result()
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
