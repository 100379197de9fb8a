"""Tells whether an image is unlike all that a model has learned from, by the features that its backbone finds in it.

A model gives every image one of its classes, a photograph too. Probabilities do not show that the image is none of what
it knows (Hein et al., CVPR 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import safetensors
import safetensors.numpy
from scipy.linalg import cholesky, solve_triangular
from sklearn.covariance import ledoit_wolf
from sklearn.model_selection import GroupKFold

from lungct_tune.evaluation.bootstrap import group_weights
from lungct_tune.experiment.bundle import FEATURES, BundleError

SHARE = 0.99
"""The share of held-out groups that are not called unlike the training images."""

FOLDS = 5


@dataclass(frozen=True, eq=False)
class TrainingFeatures:
    """The distribution of a model's pooled features on its training images: a Gaussian of their square roots.

    The distance of an image is its Mahalanobis distance to it (Lee et al., NeurIPS 2018; one Gaussian for all classes
    as in Kamoi and Kobayashi, arXiv 2003.00402), divided by the threshold. Pooled features are means of what a ReLU
    lets through, so they are not negative and have a long tail; their roots are closer to a Gaussian.

    Measured on the published images (64 pixels, depth 10): 32 of 33 photographs and drawings from the packages of
    scikit-image, scikit-learn and matplotlib are unlike the training images, and 1.8 % of the held-out slices. Without
    the roots they are 29 and 1.8 %.
    """

    mean_D: np.ndarray
    whitening_DD: np.ndarray
    """Maps deviations from the mean to uncorrelated ones of variance 1."""
    threshold: float
    """For the share `SHARE` of the groups, the distance is below it if the Gaussian was fitted without them."""
    evidence_scale: float
    """The common scale of Grad-CAM maps, see `lungct_tune.models.gradcam.evidence_scale`."""

    @classmethod
    def fit(cls, features_ND: np.ndarray, groups_N: np.ndarray, evidence_scale: float) -> Self:
        """Fits the Gaussian, with a shrunk covariance (Ledoit and Wolf 2004), and the threshold.

        The threshold comes from a cross-validation over the groups, each with the same weight, however many images it
        has. The network itself has seen all of these images.

        Args:
            features_ND: of training images; none is negative.
            groups_N: the group of each image; see `can_hold_out`.
        """
        held_out_N = np.empty(len(features_ND))
        for fitted, others in GroupKFold(min(FOLDS, len(np.unique(groups_N)))).split(features_ND, groups=groups_N):
            held_out_N[others] = _distances(features_ND[others], *_fit(features_ND[fitted]))
        return cls(*_fit(features_ND), _quantile_over_groups(held_out_N, groups_N), evidence_scale)

    def distances(self, features_ND: np.ndarray) -> np.ndarray:
        """Distances (N,); above 1 an image is unlike the training images."""
        return _distances(features_ND, self.mean_D, self.whitening_DD) / self.threshold

    def as_bytes(self) -> bytes:
        """Encodes training_features.safetensors."""
        scalars = {"threshold": self.threshold, "evidence_scale": self.evidence_scale}
        arrays = {"mean": self.mean_D, "whitening": self.whitening_DD}
        return safetensors.numpy.save(
            {name: np.array(value, dtype=np.float32, order="C") for name, value in {**arrays, **scalars}.items()}
        )

    @classmethod
    def read(cls, content: bytes, channels: int) -> Self:
        """Reads training_features.safetensors.

        Args:
            channels: of the model's features.

        Raises:
            BundleError: it does not have the features of such a model.
        """
        try:
            kept = safetensors.numpy.load(content)
            mean_D, whitening_DD = kept["mean"], kept["whitening"]
            threshold, scale = float(kept["threshold"]), float(kept["evidence_scale"])
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise BundleError(f"{FEATURES} cannot be read: {error!r}; fetch the bundle again") from error
        are_finite = all(np.isfinite(values).all() for values in (mean_D, whitening_DD, threshold, scale))
        if mean_D.shape != (channels,) or whitening_DD.shape != (channels, channels) or not are_finite:
            raise BundleError(f"{FEATURES} does not have the {channels} features of the model; fetch the bundle again")
        if threshold <= 0 or scale <= 0:
            raise BundleError(f"{FEATURES}: threshold and scale must be above 0; fetch the bundle again")
        return cls(mean_D, whitening_DD, threshold, scale)


def can_hold_out(groups_N: np.ndarray) -> bool:
    """Whether a Gaussian can be fitted without the images of a group: two or more are in others, whichever it is."""
    return bool(len(groups_N) - np.unique(groups_N, return_counts=True)[1].max() >= 2)


def _fit(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and whitening matrix of the features' roots."""
    roots_ND = np.sqrt(features_ND.astype(float))
    covariance_DD, _ = ledoit_wolf(roots_ND)
    covariance_DD[np.diag_indices_from(covariance_DD)] += 1e-9 + 1e-6 * np.trace(covariance_DD) / len(covariance_DD)
    lower_DD = cholesky(covariance_DD, lower=True)
    return roots_ND.mean(axis=0), solve_triangular(lower_DD, np.eye(len(lower_DD)), lower=True)


def _distances(features_ND: np.ndarray, mean_D: np.ndarray, whitening_DD: np.ndarray) -> np.ndarray:
    # einsum: a matrix product sums in an order that depends on the number of images, and the last digits with it
    whitened_ND = np.einsum("nd,ed->ne", np.sqrt(features_ND) - mean_D, whitening_DD)
    return np.asarray(np.linalg.norm(whitened_ND, axis=1))


def _quantile_over_groups(distances_N: np.ndarray, groups_N: np.ndarray) -> float:
    """The smallest distance that the share `SHARE` does not exceed, with the images of a group counted as one image."""
    order = np.argsort(distances_N)
    share_N = np.cumsum(group_weights(groups_N)[order]) / len(np.unique(groups_N))
    return float(distances_N[order][np.searchsorted(share_N, SHARE - 1e-9)])
