"""An image has the same answer to the last digit, alone or among others, with one thread or several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lungct_tune.evaluation.classifier import Classifier


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
