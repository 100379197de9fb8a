"""The hyperparameters of one trial: one point of the search space."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Hyperparameters:
    """The values that Optuna may vary. The defaults are the published configuration, as far as it is known.

    The published model keeps 20 of ResNet50's 50 activations. It uses dropout 0.5, flips, rotations of up to 0.2 turns
    and zooms of up to 20 %. Learning rates and weight decay are not published.
    """

    truncation_depth: int = 20
    """k: the features are the output of the k-th of the network's 49 ReLUs; the layers behind it are removed."""
    frozen_share: float = 0.0
    """Share of the k kept activations whose layers keep their loaded weights, 0 to 1 (see `frozen_depth`)."""
    dropout: float = 0.5
    """Probability of dropping a unit between the dense layers of the head, 0 to below 1."""
    augmentation: float = 0.4
    """s, the strength of rotation, zoom and flips, 0 (none) to 1; 0.4 gives the published ranges."""
    rotation: float | None = None
    """Rotation is uniform in ± so many degrees, 0 to 180; None: as the strength gives, 180 s."""
    zoom: float | None = None
    """Magnification is uniform in 1 ± this, 0 to 0.5; None: as the strength gives, s / 2."""
    shift: float | None = None
    """Shift is uniform in ± this share of the image, each way, 0 to 0.5; None: none."""
    flip: float | None = None
    """Probability of a horizontal flip, 0 to 1; None: as the strength gives, 1.25 s, at most one half."""
    backbone_lr: float = 3e-4
    """Peak learning rate of the pretrained layers."""
    head_lr: float = 1e-3
    """Peak learning rate of the head."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""

    @property
    def frozen_depth(self) -> int:
        """Up to which activation the layers keep their loaded weights and batch-norm statistics, 0 to k.

        The search varies the share, not the depth. Multivariate TPE cannot use a range that depends on another
        parameter's value (https://optuna.readthedocs.io, TPESampler, `multivariate`).
        """
        return round(self.frozen_share * self.truncation_depth)

    @property
    def mirrored(self) -> bool:
        """Whether predictions are those of an image and its mirror image together: from a flip probability of 0.25 on.

        Without flips in training it would do harm (docs/accuracy.md, "Among unlike images").
        """
        flip = self.resolved.flip
        return flip is not None and flip >= 0.25

    @property
    def resolved(self) -> Hyperparameters:
        """These, with numbers instead of None."""
        s = self.augmentation
        by_strength: dict[str, Any] = {"rotation": 180 * s, "zoom": s / 2, "shift": 0.0, "flip": min(0.5, 1.25 * s)}
        return replace(self, **{name: value for name, value in by_strength.items() if getattr(self, name) is None})

    def __str__(self) -> str:
        r = self.resolved
        return (
            f"depth {self.truncation_depth}, {self.frozen_depth} frozen, dropout {self.dropout:.2f}, "
            f"rotation {r.rotation:.0f}°, zoom {r.zoom:.2f}, shift {r.shift:.2f}, flip {r.flip:.2f}, "
            f"rates {self.backbone_lr:.1e}/{self.head_lr:.1e}, decay {self.weight_decay:.1e}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Without the fields that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


PUBLISHED = Hyperparameters()
