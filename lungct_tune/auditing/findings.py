"""What an audit finds: the content of audit.json, and of the pages made from it.

A field's name is its key in the file, unless the field has an alias. Fields with a default are missing in files of
earlier versions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from lungct_tune.data.folders import LeftAside

Counts = dict[str, int]
Level = Literal["leaks", "caution", "clean"]
ClassName = Annotated[str, Field(alias="class")]


@dataclass(frozen=True)
class Verdict:
    """Whether an accuracy on the held-out images can be trusted, why, and what to do, as text."""

    level: Level
    headline: str
    reasons: list[str]
    advice: list[str]


@dataclass(frozen=True)
class Split:
    """The split that was audited."""

    how: str
    """ "grouped", "official", "file" or "no"."""
    parts: list[str]


@dataclass(frozen=True)
class SideLengths:
    """Widths or heights, in pixels."""

    min: int
    median: float
    max: int


@dataclass(frozen=True)
class WrongSuffix:
    """A file whose format is not what its suffix says."""

    path: str
    format: str


@dataclass(frozen=True)
class Unreadable:
    """A file that was left out because it cannot be read."""

    path: str
    reason: str


@dataclass(frozen=True)
class Inventory:
    """The files."""

    by_class: dict[str, Counts]
    """Images of each class in each part."""
    formats: Counts
    modes: Counts
    sizes: dict[Literal["width", "height"], SideLengths]
    distinct_sizes: int
    not_what_the_suffix_says: list[WrongSuffix]
    unreadable: list[Unreadable]
    without_content: list[str] = field(default_factory=list)
    left_aside: list[LeftAside] = field(default_factory=list)


@dataclass(frozen=True)
class CopySide:
    """One image of a pair of copies."""

    path: str
    class_name: ClassName
    split: str
    """Its part, or "left out"."""


@dataclass(frozen=True)
class Pair:
    """Two images that are copies."""

    first: CopySide
    second: CopySide
    kind: str
    similarity: float
    change: str
    """How they differ, as text."""


@dataclass(frozen=True)
class CopyCounts:
    """How many images of a part have a copy in another part, or in the same."""

    images: int
    with_copy: int
    byte_identical: int
    by_class: Counts


@dataclass(frozen=True)
class CopiesInside(CopyCounts):
    """Copies inside one part."""

    part: str


@dataclass(frozen=True)
class CopiesAcross(CopiesInside):
    """Copies of images of one part in another."""

    other: str


@dataclass(frozen=True)
class Copies:
    """All copies."""

    threshold: float
    pairs_by_kind: Counts
    images_by_class: Counts
    across: list[CopiesAcross]
    inside: list[CopiesInside]
    pairs: list[Pair]
    """The worst first."""


@dataclass(frozen=True)
class Conflict:
    """Copies of one image under several classes."""

    paths: list[str]
    classes: list[str]


@dataclass(frozen=True)
class GroupCount:
    """How many groups there are at a threshold."""

    threshold: float
    groups: int


@dataclass(frozen=True)
class Groups:
    """The groups of images that a split must not divide."""

    threshold: float
    groups: int
    largest: int
    by_class: Counts
    images_in_groups_csv: int
    of_several_classes: int
    cut_by_the_split: int
    by_threshold: list[GroupCount]
    images_with_patient_id: int = 0
    patients_known: bool | None = None
    """See `ImageSet.patients_known`."""
    groups_from_patient_ids: int = 0


@dataclass(frozen=True)
class RuleScores:
    """The scores of a rule that sees one property of an image."""

    rule: str
    title: str
    balanced_accuracy: float
    auroc: dict[str, float]
    """Of each class against the others."""


@dataclass(frozen=True)
class Chance:
    """The scores of chance."""

    balanced_accuracy: float
    auroc: float


@dataclass(frozen=True)
class GivenAway:
    """A class that a rule separates from the others."""

    class_name: ClassName
    by: str
    """The rule's title."""
    auroc: float


@dataclass(frozen=True)
class Shortcuts:
    """What can be predicted without the lungs."""

    chance: Chance
    rules: list[RuleScores]
    given_away: list[GivenAway]


@dataclass(frozen=True)
class UnseenImages:
    """The images of a part whose groups are not in the parts before it."""

    images: int
    nearest_neighbour_right: int
    expected_of_unseen_groups: float
    too_alike: bool
    """Whether the nearest neighbours are right more often than for unseen groups (`TOO_ALIKE`)."""


@dataclass(frozen=True)
class ClassSimilarity:
    """The images of a class in a part."""

    images: int
    seen: int
    """Images of a group that is in the parts before."""
    median_similarity: float


@dataclass(frozen=True)
class Similarity:
    """The similarity of a part to the parts before it, on which an evaluated model was trained."""

    part: str
    before: list[str]
    images: int
    seen: int
    copies: CopyCounts
    nearest_neighbour_accuracy: float
    others: UnseenImages
    by_class: dict[str, ClassSimilarity]


@dataclass(frozen=True)
class PermutedScores:
    """The score of a rule that was trained on permuted labels."""

    part: str
    rule: str
    title: str
    balanced_accuracy: float
    chance: float
    proves_a_leak: bool


@dataclass(frozen=True)
class Findings:
    """All that an audit measures."""

    data: str
    fingerprint: str
    images: int
    classes: list[str]
    split: Split
    inventory: Inventory
    copies: Copies
    conflicts: list[Conflict]
    groups: Groups
    shortcuts: Shortcuts
    split_health: list[Similarity]
    permuted: list[PermutedScores] | None
    """Only on request."""


@dataclass(frozen=True)
class Audit(Findings):
    """The findings and the verdict."""

    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """The content of audit.json, the verdict first."""
        content: dict[str, Any] = TypeAdapter(Audit).dump_python(self, by_alias=True)
        return {"verdict": content.pop("verdict")} | content
