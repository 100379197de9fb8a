"""The form of audit.json, as far as pages use it; see `lungct_tune.auditing.audit`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from lungct_tune.experiment.bundle import AUDIT
from lungct_tune.experiment.form import check_form, read_json

Counts = dict[str, int]


class _Verdict(BaseModel):
    level: Literal["leaks", "caution", "clean"]
    headline: str
    reasons: list[str]
    advice: list[str]


class _Split(BaseModel):
    how: str
    parts: list[str]


class _Side(BaseModel):
    path: str


class _Pair(BaseModel):
    first: _Side
    second: _Side
    kind: str
    similarity: float
    change: str


class _WithCopy(BaseModel):
    part: str
    images: int
    with_copy: int
    byte_identical: int
    by_class: Counts


class _Across(_WithCopy):
    other: str


class _Copies(BaseModel):
    threshold: float
    pairs_by_kind: Counts
    images_by_class: Counts
    across: list[_Across]
    inside: list[_WithCopy]
    pairs: list[_Pair]


class _Groups(BaseModel):
    threshold: float
    groups: int
    largest: int
    images_in_groups_csv: int
    images_with_patient_id: int = 0
    groups_from_patient_ids: int = 0
    patients_known: bool | None = None
    of_several_classes: int
    cut_by_the_split: int
    by_threshold: list[dict[Literal["threshold", "groups"], float]]


class _Rule(BaseModel):
    rule: str
    title: str
    balanced_accuracy: float
    auroc: dict[str, float]


class _Chance(BaseModel):
    balanced_accuracy: float
    auroc: float


class _GivenAway(BaseModel):
    by: str
    auroc: float


class _Shortcuts(BaseModel):
    chance: _Chance
    rules: list[_Rule]
    given_away: list[_GivenAway]


class _Others(BaseModel):
    images: int
    nearest_neighbour_right: int
    expected_of_unseen_groups: float


class _OfClass(BaseModel):
    images: int
    seen: int
    median_similarity: float


class _Health(BaseModel):
    part: str
    before: list[str]
    images: int
    nearest_neighbour_accuracy: float
    others: _Others
    by_class: dict[str, _OfClass]


class _Permuted(BaseModel):
    part: str
    title: str
    balanced_accuracy: float
    chance: float
    proves_a_leak: bool


class _Audit(BaseModel):
    verdict: _Verdict
    data: str
    images: int
    classes: list[str]
    split: _Split
    copies: _Copies
    groups: _Groups
    shortcuts: _Shortcuts
    split_health: list[_Health]
    permuted: list[_Permuted] | None


def read_audit(content: bytes) -> dict[str, Any]:
    """The content of audit.json, as plain values.

    Raises:
        BundleError: a value that pages need is missing or has another form; the message names it.
    """
    audit = read_json(content, AUDIT)
    check_form(audit, _Audit, AUDIT)
    return dict(audit)
