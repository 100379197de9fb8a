"""The items of CLAIM 2024 and TRIPOD+AI, and which of them a report has.

Sources: Tejani et al., Radiology: Artificial Intelligence 2024 (CLAIM); Collins et al., BMJ 2024 (TRIPOD+AI). The items
are shortened and joined; the checklists themselves have the full text.
"""

from __future__ import annotations

from lungct_tune.experiment.results import SearchResults
from lungct_tune.reporting.format import how_split

REPORTED, USER, UNKNOWN = "reported", "from you", "unknown"

Item = tuple[str, str, str]
"""Item, state, and where it is or what is missing."""


def checklist(found: SearchResults) -> list[Item]:
    """The state of each item for a search with test results."""
    assert found.test is not None
    real = [] if found.phantoms else _of_patients(found)
    compared = "published" in found.test.references
    cancer = found.test.cancer_vs_normal is not None
    binary = "Test results: cancer against normal" if cancer else "the classes are not cancer and normal"
    gain = "Test results" if compared else "Test results; the published configuration only with --compare-baseline"
    return [
        ("title and abstract name method and data", USER, "this page has the figures for them"),
        ("clinical background and intended use", USER, "the model card lists uses that are excluded"),
        ("question of the study", REPORTED, "Verdict"),
        *real,
        ("files left out, with reasons", REPORTED if found.audit else UNKNOWN, "Data: flow chart"),
        ("images and groups by class and part", REPORTED, "Data: table"),
        ("how the data were split; no patient in two parts", REPORTED, f"Data: {_split(found)}"),
        ("preprocessing", REPORTED, "Model card, Data"),
        ("sample size and its reason", USER, "intervals show what this number of groups can tell"),
        ("model: architecture, parameters, initial weights", REPORTED, "Winner; Model card"),
        ("training: hyperparameters, augmentation, epochs", REPORTED, "Winner; config.json has all"),
        ("how the final model was chosen", REPORTED, "Search"),
        ("software, versions and hardware", REPORTED, "Do it again"),
        ("figures with intervals", REPORTED, "Test results"),
        ("discrimination of every class", REPORTED, "Test results: each class against the rest"),
        ("calibration", REPORTED, "Test results: reliability diagram" + (", slope and intercept" if cancer else "")),
        ("operating point and where it was chosen; net benefit", REPORTED if cancer else UNKNOWN, binary),
        ("comparison with simple rules and another model", REPORTED, gain),
        ("analysis of errors, and maps of what the network used", REPORTED, "Mistakes"),
        ("fairness: figures by age, sex, ethnicity, site", UNKNOWN, "the images have no such data"),
        ("test on data of another source", UNKNOWN, "python -m lungct_tune.evaluate BUNDLE --data DIR"),
        ("limits", REPORTED, "Model card: Limits"),
        ("code and model available", REPORTED, "lungct_tune is open source; the bundle is the model"),
        ("data available, licence, registration, funding, conflicts", USER, ""),
    ]


def _of_patients(found: SearchResults) -> list[Item]:
    patients = "split.csv has their groups" if found.patients_known else "groups stand for patients"
    return [
        ("ethics approval and consent", USER, ""),
        ("source of the images: sites, dates, scanners, dose, reconstruction", USER, "image files do not say it"),
        ("inclusion and exclusion of patients", USER, "the flow chart begins with the files"),
        ("patients: number, age, sex, ethnicity", USER, patients),
        ("reference standard: how the diagnoses were made", USER, "folders name the classes"),
    ]


def _split(found: SearchResults) -> str:
    shared = f"{found.seen} test images share a group with train or validation" if found.seen else "no shared group"
    return f"{how_split(found)}; {shared}"
