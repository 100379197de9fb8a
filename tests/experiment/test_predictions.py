"""predictions.csv: what is written is read back."""

from __future__ import annotations

import numpy as np
import pytest

from lungct_tune.experiment.predictions import Predictions, probability_columns, read_predictions


@pytest.mark.parametrize("classes", [("large cell carcinoma", "normal"), ("a b", "a_b"), ("a", "A")])
def test_each_class_has_a_column_of_its_own(classes: tuple[str, str]) -> None:
    probabilities_NC = np.array([[0.9, 0.1], [0.2, 0.8]])
    paths_N, labels_N, groups_N = np.array(["x", "y"]), np.array([0, 1]), np.array([0, 1])
    written = Predictions(classes, paths_N, labels_N, probabilities_NC, groups_N)
    np.testing.assert_array_equal(read_predictions(written.as_csv(), classes).probabilities_NC, probabilities_NC)


def test_blanks_in_columns_are_underscores() -> None:
    assert probability_columns(["large cell carcinoma", "normal"]) == ["p_large_cell_carcinoma", "p_normal"]
