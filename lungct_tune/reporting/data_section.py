"""The report's section on the data: what was left out and why, and images and groups by class and part."""

from __future__ import annotations

from typing import Any

from lungct_tune.data.split import SPLITS
from lungct_tune.experiment.results import SearchResults


def data_section(found: SearchResults) -> dict[str, Any]:
    """The values for the flow chart and the table of report.html.

    Images of a group are of one patient where groups.csv has the patients.
    """
    table = found.split
    groups = table.groupby("split")["group"].nunique()
    by_class = table.groupby(["label", "split"])["group"].nunique()
    left_out = _left_out(found)
    return {
        "files": len(table) + sum(n for _, n in left_out),
        "left_out": left_out,
        "parts": [(part, n, int(groups.get(part, 0))) for part, n in zip(SPLITS, found.totals, strict=True)],
        "by_class": {
            name: [
                count
                for part, images in zip(SPLITS, counts, strict=True)
                for count in (images, int(by_class.get((name, part), 0)))
            ]
            for name, counts in found.counts.items()
        },
    }


def _left_out(found: SearchResults) -> list[tuple[str, int]]:
    """How many files were left out, by reason."""
    if found.audit is None:
        return []
    inventory = found.audit.inventory
    reasons = [(aside.reason, aside.files) for aside in inventory.left_aside]
    reasons.append(("cannot be read", len(inventory.unreadable)))
    copies = sum(len(conflict.paths) for conflict in found.audit.conflicts)
    reasons.append(("copies in the folders of several classes", copies))
    return [(reason, n) for reason, n in reasons if n]
