"""Images from elsewhere: which of a bundle's classes they are told by."""

from __future__ import annotations

from lungct_tune.errors import UserError

OTHER = "other"
"""What a folder is mapped to whose images are of no class of the bundle's."""


class EvaluateError(UserError):
    """These images cannot be judged by this bundle: the message says why and what to do."""


def read_map(text: str | None, classes: tuple[str, ...]) -> dict[str, str]:
    """Which class each folder's images count as: what the user says, and with cancer in it, the cancers as cancer.

    Raises:
        EvaluateError: it is no map, or names what is neither a class of the bundle's nor cancer or other.
    """
    from lungct_tune.config.settings import pairs
    from lungct_tune.evaluation.metrics import CANCER, CANCERS, are_cancer_and_normal

    try:
        given: dict[str, str] = pairs(text or {})
    except ValueError as error:
        raise EvaluateError(f"--map {text!r}: {error}") from error
    allowed = dict.fromkeys((*classes, *([CANCER] if are_cancer_and_normal(classes) else []), OTHER))
    if wrong := [f"{folder}={name}" for folder, name in given.items() if name not in allowed]:
        raise EvaluateError(f"--map: {', '.join(wrong)}: this bundle's images can be {', '.join(allowed)}")
    if CANCER in given.values() and CANCER not in classes:
        given = dict.fromkeys(set(CANCERS) & set(classes), CANCER) | given
        given = {folder: CANCER if name in CANCERS else name for folder, name in given.items()}
    return given
