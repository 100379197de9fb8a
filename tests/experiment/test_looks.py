"""Searches that are evaluated on one test split are counted, each once."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from lungct_tune.data import ImageSet
from lungct_tune.data.split import DataSplit
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.looks import count_look
from lungct_tune.reporting.format import looks_in_words


def a_split(*test: int) -> DataSplit:
    """Six images, these of them for test."""
    table = pd.DataFrame({"digest": [f"{i:064}" for i in range(6)]})
    images = ImageSet(Path("somewhere"), table, np.zeros((6, 1, 1), np.uint8), ("a", "b"), [], [], [], [], "")
    return DataSplit(images, np.where(np.isin(range(6), test), "test", "train"), None)


def test_each_search_counts_once_for_its_own_test_images(tmp_path: Path) -> None:
    one, two, three = (Experiment.at(str(tmp_path), name) for name in ("one", "two", "three"))
    began = datetime(2026, 11, 28, 9, 30)
    assert count_look(one, a_split(0, 1), began) == 1
    assert count_look(one, a_split(0, 1), began) == 1, "it was stopped before its bundle was written"
    assert count_look(two, a_split(1, 2), began) == 1
    assert count_look(three, a_split(1, 0), began) == 2
    assert count_look(one, a_split(0, 1), began.replace(day=29)) == 3, "it was deleted, and searched again"
    assert one.siblings() == [], "the marks are no experiment"
    assert looks_in_words(1) == "" and looks_in_words(2).startswith("2 finished searches")
