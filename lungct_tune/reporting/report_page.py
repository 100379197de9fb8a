"""Makes the report's page from findings, charts and pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from lungct_tune.config.settings import Settings, flags
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.evaluation.inference import build_model
from lungct_tune.experiment.bundle import REPORT
from lungct_tune.experiment.results import SearchResults
from lungct_tune.reporting import verdict
from lungct_tune.reporting.checklist import checklist
from lungct_tune.reporting.data_section import data_section
from lungct_tune.reporting.format import SAME_GROUP
from lungct_tune.reporting.html import markdown, pairs_of_copies, render
from lungct_tune.reporting.model_card import model_card
from lungct_tune.reporting.search_section import (
    TRIAL_COLUMNS,
    about_the_search,
    facts,
    failures,
    search_charts,
    trial_rows,
)
from lungct_tune.reporting.test_charts import worth
from lungct_tune.reporting.test_section import Network, Pictures, compared_accuracies, test_section
from lungct_tune.reporting.winner_section import winner_section
from lungct_tune.training.objective import OBJECTIVE_NAME

TITLES = {"card": "model card"}
"""Of sections, where they are not their ids."""

PAIRS_SHOWN = 6
"""Pairs of copies in the report; the audit's own page shows more."""


def report_page(
    name: str, found: SearchResults, pictures: Pictures, of_search: Mapping[str, Any] | None = None
) -> bytes:
    """Makes report.html, one file without links to others.

    Args:
        name: the experiment's name.
        of_search: from `parts_of_search`, if they have been made already.
    """
    test = found.test
    sections = ["verdict", "data", "search", *(["winner"] if found.winner else [])]
    sections += ["test", "mistakes", "checklist", "card"] if test else []
    rows = compared_accuracies(test) if test else []
    shown: dict[str, Any] = {
        "title": f"Report of the search {name}",
        "found": found,
        "warnings": [*filter(None, (PHANTOMS if found.phantoms else "", verdict.standing(found)))],
        "sections": [*((section, TITLES.get(section, section)) for section in sections), ("again", "do it again")],
        "shows_images": pictures.images is not None,
        "verdict": verdict.verdict(found),
        "same_group": SAME_GROUP,
        "worth_chart": worth(rows, OBJECTIVE_NAME) if rows else "",
        "groups": found.split["group"].nunique(),
        "data": data_section(found),
        "pairs": pairs_of_copies(found.audit, pictures.images.root, PAIRS_SHOWN)
        if found.audit and pictures.images
        else [],
        "about_the_search": about_the_search(found),
        "failures": failures(found),
        "trials": trial_rows(found),
        "trial_columns": TRIAL_COLUMNS,
        "winner_number": found.winner.number if found.winner else None,
        **(of_search or parts_of_search(found)),
        "test": test,
        "command": command(found.settings),
        "facts": facts(found),
        "versions": ", ".join(f"{package} {v}" for package, v in found.versions.items()),
    }
    if test:
        shown |= {"checklist": checklist(found), "card_page": markdown(model_card(name, found).decode())}
    if test and found.bundle and found.bundle.predictions:
        model = build_model(found.bundle.config, found.bundle.weights)
        network = Network(model, found.bundle.predictions.classes, found.settings["normalisation"])
        on = f"The final model, evaluated once, on {test.n} images in {test.groups} groups. " + (
            f"For {found.seen} of them {SAME_GROUP} is in train or validation."
            if found.seen
            else "None of these groups is in train or validation."
        )
        seed = found.settings["seed"]
        shown |= test_section(test, found.bundle.predictions, pictures, network, seed, on)
    return render(REPORT, shown)


def parts_of_search(found: SearchResults) -> dict[str, Any]:
    """The parts of the page that take time to make and do not depend on the final model."""
    return {"search_charts": search_charts(found), "winner": winner_section(found)}


def command(settings: Mapping[str, Any]) -> str:
    """The command that runs the same search again."""
    names = [name for name in Settings.model_fields if name not in ("name", "storage", "study")]
    return shlex.join(["python", "-m", "lungct_tune.search", *flags(settings, names)])
