"""Prints and writes what a bundle's model says about images or patients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from lungct_tune.data import tables
from lungct_tune.data.seen_images import NEW
from lungct_tune.display import print_prose
from lungct_tune.errors import number_of
from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.evaluation.metrics import are_cancer_and_normal
from lungct_tune.experiment.predictions import probability_columns
from lungct_tune.reporting.format import TRAINED_ON_PHANTOMS
from lungct_tune.reporting.output_file import written_whole

MOST_PRINTED = 30
"""The most rows that are printed; of more, only the counts are."""


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Writes rows as CSV, JSON (a list of objects) or Parquet, by the ending of the file's name.

    Raises:
        UserError: it cannot be written.
    """
    with written_whole(out, "--out") as new:
        if out.suffix.lower() == ".csv":
            new.write_bytes(tables.write_table(table))
        elif out.suffix.lower() == ".json":
            table.to_json(new, orient="records", indent=2, double_precision=15)
        else:
            table.to_parquet(new, index=False)


def print_predictions(
    classifier: Classifier,
    rows: pd.DataFrame,
    patients: pd.DataFrame | None,
    left_aside: Mapping[str, int],
    console: Console,
) -> None:
    """Prints each of few rows, the counts, what could not be read or was left aside, and the warnings.

    Args:
        rows: of all images, from `Classifier.classify_files`.
        patients: of `by_patient`; None if rows are printed by image.
        left_aside: the number of files that are not images, by reason.
    """
    table = rows if patients is None else patients
    if len(table) <= MOST_PRINTED:
        for _, row in table.iterrows():
            _print_row(row, classifier.classes, console)
    read, unread = rows[rows["unreadable"] == ""], rows[rows["unreadable"] != ""]
    counted = table[table["class"].notna()]
    what = "image" if patients is None else "patient"
    counts = ", ".join(f"{name} {n}" for name, n in counted["class"].value_counts().items()) if len(counted) else "none"
    console.print(f"classified: {number_of(len(counted), what)} ({counts})")
    if are_cancer_and_normal(classifier.classes) and len(counted):
        n = int((counted["cancer_or_normal"] == "cancer").sum())
        rule = f"cancer at the operating point (probability of cancer above {classifier.threshold:.3f})"
        console.print(f"{rule}: {number_of(n, what)}")
    if patients is not None:
        console.print("a patient's probabilities are those of the mean logits of its images")
    if len(unread):
        console.print(f"unreadable: {number_of(len(unread), 'file')}", style="yellow")
        for path, reason in zip(unread["path"], unread["unreadable"], strict=True):
            console.print(f"  {path}: {reason}")
    for reason, n in sorted(left_aside.items()):
        console.print(f"left aside: {n} {reason}")
    _print_warnings(classifier, read, console)
    console.print("Research software: no output is a diagnosis.", style="dim")


def _print_warnings(classifier: Classifier, read: pd.DataFrame, console: Console) -> None:
    def warn(sentence: str) -> None:
        print_prose(console, sentence, "bold yellow")

    if classifier.config.settings.data is None:
        warn(TRAINED_ON_PHANTOMS)
    if classifier.learned is None:
        warn("The bundle does not list its training images, so nothing is known about images that it has seen.")
    elif seen := int((read["learned_from"] != NEW).sum()):
        warn(f"The model was trained on {seen} of these images, or on images that look like them.")
    if classifier.features is None:
        warn("The bundle does not have the features of its training images, so unlike images are not recognised.")
    elif unlike := int(read["unlike_training"].astype(bool).sum()):
        warn(
            f"Images unlike all that the model has learned from (distance above 1): {unlike}. Its answers for them "
            "mean nothing."
        )


def _print_row(row: pd.Series, classes: tuple[str, ...], console: Console) -> None:
    """Prints an image or a patient: its name, its class and the other classes with probabilities, the other columns."""
    console.print(str(row.iloc[0]), style="bold")
    if pd.isna(row.get("class")):
        console.print("  no image that can be read")
        return
    probabilities = row[list(probability_columns(classes))]
    by_class = sorted(zip(probabilities, classes, strict=True), key=lambda pair: (pair[1] != row["class"], -pair[0]))
    print_prose(console, "  " + ", ".join(f"{other} {value:.3f}" for value, other in by_class), hang=4)
    others = row.drop([row.index[0], "class", "unreadable", *probabilities.index]).dropna()
    said = "; ".join(f"{str(column).replace('_', ' ')}: {_text(value)}" for column, value in others.items())
    print_prose(console, f"  {said}", hang=4)


def _text(value: object) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
