"""An audit as one page that needs no network."""

from __future__ import annotations

from pathlib import Path

from lungct_tune.auditing.conclusions import about_files
from lungct_tune.auditing.findings import Audit
from lungct_tune.reporting.format import place_name
from lungct_tune.reporting.html import pairs_of_copies, render

PAIRS_SHOWN = 60
"""Pairs of copies on the page."""


def audit_page(audit: Audit, root: Path) -> bytes:
    """Makes the audit's HTML page, with pairs of copies as thumbnails, the worst first.

    Args:
        root: the folder of the images.
    """
    shown = {
        "title": f"Audit of the images in {place_name(root)}",
        "warnings": [],
        "sections": [("verdict", "verdict"), ("there", "the images"), ("found", "findings")],
        "audit": audit,
        "files": about_files(audit.inventory),
        "pairs": (pairs := pairs_of_copies(audit, root, PAIRS_SHOWN)),
        "shows_images": bool(pairs),
    }
    return render("audit.html", shown)
