"""Which images are unlike the training images."""

from __future__ import annotations

import numpy as np

from lungct_tune.evaluation.training_features import TrainingFeatures


def test_a_group_of_many_odd_images_does_not_widen_the_threshold() -> None:
    rng = np.random.default_rng(0)
    usual_ND = rng.normal(20, 1, size=(300, 8))
    odd_ND = rng.normal(30, 1, size=(30, 8))
    groups_N = np.concatenate([np.arange(300), np.full(30, 300)])
    fitted = TrainingFeatures.fit(np.concatenate([usual_ND, odd_ND]), groups_N, 1.0)
    assert (fitted.distances(rng.normal(20, 1, size=(500, 8))) > 1).mean() < 0.04
    assert (fitted.distances(rng.normal(20, 4, size=(500, 8)).clip(0)) > 1).mean() > 0.9
    again = TrainingFeatures.read(fitted.as_bytes(), 8)
    np.testing.assert_allclose(again.distances(odd_ND), fitted.distances(odd_ND), rtol=1e-4)
