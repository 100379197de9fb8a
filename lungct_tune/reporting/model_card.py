"""Makes MODEL_CARD.md: the intended use of a model, its limits, and the figures of its search."""

from __future__ import annotations

from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.experiment.bundle import CARD
from lungct_tune.experiment.results import SearchResults
from lungct_tune.models.complexity import model_profile
from lungct_tune.reporting import verdict
from lungct_tune.reporting.format import SAME_GROUP, how_split
from lungct_tune.reporting.html import render
from lungct_tune.reporting.search_section import about_the_search, facts
from lungct_tune.reporting.test_section import about_calibration, references


def model_card(name: str, found: SearchResults) -> bytes:
    """Makes MODEL_CARD.md of a search that has ended.

    After Mitchell et al. (FAccT 2019) and the CLAIM checklist (Tejani et al., Radiology: Artificial Intelligence 2024).
    """
    assert found.winner is not None and found.bundle is not None and found.test is not None
    configuration = found.winner.hyperparameters
    network = model_profile(configuration.truncation_depth, len(found.classes), found.settings["image_size"])
    shown = {
        "name": name,
        "found": found,
        "phantoms": PHANTOMS,
        "configuration": configuration,
        "sums": tuple(found.members * total for total in network.totals),
        "groups": found.split["group"].nunique(),
        "verdict": verdict.verdict(found),
        "how_split": how_split(found),
        "same_group": SAME_GROUP,
        "about_the_search": about_the_search(found),
        "config": found.bundle.config,
        "test": found.test,
        "references": references(found.test),
        "calibration": about_calibration(found.test.calibration),
        "facts": facts(found),
    }
    return render(CARD, shown)
