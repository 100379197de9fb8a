"""The sections of a report: charts of parameters, data, cancer against normal, mistakes, checklist, model card."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from recorded_search import finished_search

from lungct_tune.auditing.findings import Unreadable
from lungct_tune.data.folders import LeftAside
from lungct_tune.evaluation.inference import build_model
from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.experiment.metrics import Figure
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.experiment.results import SearchResults, read_results
from lungct_tune.experiment.trial import Outcome
from lungct_tune.reporting.cancer_section import cancer_section
from lungct_tune.reporting.checklist import checklist
from lungct_tune.reporting.data_section import data_section
from lungct_tune.reporting.html import markdown, pairs_of_copies
from lungct_tune.reporting.mistakes_section import UNFOLDED, mistakes_section
from lungct_tune.reporting.report_page import report_page
from lungct_tune.reporting.search_section import edge, search_charts
from lungct_tune.reporting.test_charts import cancer_roc, precision_recall, roc, worth
from lungct_tune.reporting.test_section import Network, Pictures


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> SearchResults:
    return read_results(finished_search(tmp_path_factory.mktemp("finished"), phantoms).plan.experiment)


@pytest.fixture(scope="module")
def content(found: SearchResults) -> bytes:
    return report_page("one", found, Pictures())


def test_curves_of_images_of_one_class_have_no_legend_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    """As `evaluate` draws them where a hospital has cancers only."""
    labels_N, probabilities_NC = np.zeros(6, dtype=int), np.tile([0.7, 0.3], (6, 1))
    test = evaluate_predictions(labels_N, probabilities_NC, ("cancer", "normal"), np.arange(6))
    assert test.cancer_vs_normal is not None
    for chart in (
        roc(labels_N, probabilities_NC, test.per_class),
        precision_recall(labels_N, probabilities_NC, test.per_class),
        cancer_roc(labels_N == 0, probabilities_NC[:, 0], test.cancer_vs_normal),
    ):
        assert chart.startswith("<")
    assert [str(warning.message) for warning in recwarn if "legend" in str(warning.message)] == []


def test_a_long_path_leaves_room_for_the_chart(recwarn: pytest.WarningsRecorder) -> None:
    path = f"/data/{'a folder with a long name/' * 6}one/best"
    chart = worth([(path, 0.5, (0.4, 0.6), True), ("two", 0.5, None, False)])
    assert "…" in chart and "a long name/one/best: 50.0 %" in chart
    assert [str(warning.message) for warning in recwarn] == []


def test_charts_of_parameters_wait_until_there_are_enough_completed_trials(found: SearchResults) -> None:
    few = search_charts(found)
    assert few is not None and few["parallel"] == "" and few["slices"] == [] and few["importances"] == ""
    assert "4 trials ran to their end" in few["few"] and "from 15 on" in few["few"] and "from 20 on" in few["few"]
    *_, completed = [trial for trial in found.trials if trial.outcome is Outcome.COMPLETED]
    for n, parallel, importance in ((14, False, False), (15, True, False), (20, True, True)):
        rng = np.random.default_rng(0)
        trials = [
            replace(
                completed,
                number=number,
                hyperparameters=replace(completed.hyperparameters, backbone_lr=float(rng.uniform(1e-3, 9e-3))),
                history=(replace(completed.history[-1], balanced_accuracy=float(rng.uniform(0.3, 0.6))),),
            )
            for number in range(n)
        ]
        drawn = search_charts(replace(found, trials=trials))
        assert drawn is not None
        assert bool(drawn["parallel"]) == bool(drawn["slices"]) == parallel and bool(drawn["importances"]) == importance
        assert ("from 20 on" in drawn["few"]) == (not importance)


def test_a_page_states_the_rule_for_cancer_and_why_it_differs_from_the_confusion_matrix() -> None:
    classes = ("adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma")
    labels_N = np.array([0, 0, 2, 2])
    probabilities_NC = np.array(
        [[0.3, 0.2, 0.4, 0.1], [0.6, 0.2, 0.1, 0.1], [0.3, 0.2, 0.4, 0.1], [0.0, 0.1, 0.8, 0.1]]
    )
    predictions = Predictions(classes, np.arange(4).astype(str), labels_N, probabilities_NC, np.arange(4))
    test = evaluate_predictions(labels_N, probabilities_NC, classes, np.arange(4), threshold=0.55)
    section = cancer_section(test, predictions)
    assert section is not None
    assert "above 55.0" in section["rule"] and "chosen on other images" in section["rule"]
    assert "2 of 2 normal images are predicted as normal, and 1 of 2 images of cancer" in section["difference"]
    assert "by this rule 1 and 2" in section["difference"]
    assert "slope" in section["calibration"]
    for svg in (section["roc"], section["decision"]):
        ElementTree.fromstring(svg)
    assert (
        "<title>operating point: 55.0 %; sensitivity 100.0" in section["roc"] and "specificity 50.0" in section["roc"]
    )
    assert "<title>2 images of cancer, 2 normal images: AUROC 87.5" in section["roc"]
    same = evaluate_predictions(labels_N, np.eye(4)[labels_N], classes, np.arange(4))
    agreeing = cancer_section(same, replace(predictions, probabilities_NC=np.eye(4)[labels_N]))
    assert agreeing is not None and agreeing["difference"] == "" and "is one half" in agreeing["rule"]


def test_a_curve_has_a_text_with_its_area_and_its_interval(found: SearchResults, content: bytes) -> None:
    assert found.test is not None
    drawn = html.unescape(content.decode())

    def shown(f: Figure) -> str:
        assert f.value is not None and f.ci95 is not None
        low, high = (f"{100 * end:.1f}" for end in f.ci95)
        return f"{100 * f.value:.1f}\N{NO-BREAK SPACE}% (95 % interval {low} to {high}\N{NO-BREAK SPACE}%)"

    for name, rates in found.test.per_class.items():
        for area, f in (("AUROC", rates.auroc), ("average precision", rates.average_precision)):
            assert f"<title>{name}, {rates.n} images: {area} {shown(f)}</title>" in drawn
    cancer = found.test.cancer_vs_normal
    assert cancer is not None
    assert f"normal images: AUROC {shown(cancer.auroc)}</title>" in drawn
    rates = f"sensitivity {shown(cancer.sensitivity)}, specificity {shown(cancer.specificity)}"
    assert f"<title>operating point: {100 * cancer.threshold:.1f} %; {rates}</title>" in drawn


def test_slices_of_a_group_share_a_card_and_many_mistakes_are_folded(found: SearchResults) -> None:
    n = 40
    predictions = Predictions(
        ("a", "b"),
        np.array([f"{i}.png" for i in range(n)]),
        np.zeros(n, dtype=int),
        np.tile([0.3, 0.7], (n, 1)),
        np.arange(n) // 2,
    )
    assert found.bundle is not None
    network = Network(build_model(found.bundle.config, found.bundle.weights), ("a", "b"), "unit")
    section = mistakes_section(predictions, Pictures(), network, 0)
    assert [len(card) for card in section["wrong"]] == [2] * (UNFOLDED // 2)
    assert sum(map(len, section["folded"])) == n - UNFOLDED
    assert [case["path"] for case in section["wrong"][0]] == ["0.png", "1.png"]


def test_the_data_are_counted_from_the_files_to_the_groups_of_each_part(found: SearchResults) -> None:
    assert found.audit is not None
    inventory = replace(
        found.audit.inventory,
        left_aside=[LeftAside("videos", 3, "a.mp4")],
        unreadable=[Unreadable("b.png", "damaged")],
    )
    section = data_section(replace(found, audit=replace(found.audit, inventory=inventory)))
    assert section["left_out"] == [("videos", 3), ("cannot be read", 1)]
    assert section["files"] == len(found.split) + 4
    for part, images, groups in section["parts"]:
        rows = found.split[found.split["split"] == part]
        assert (images, groups) == (len(rows), rows["group"].nunique())
    for name, counts in section["by_class"].items():
        rows = found.split[(found.split["label"] == name) & (found.split["split"] == "test")]
        assert counts[-2:] == [len(rows), rows["group"].nunique()]


def test_the_checklist_says_what_the_user_has_to_add(found: SearchResults, content: bytes) -> None:
    items = {item: state for item, state, _ in checklist(found)}
    assert items["ethics approval and consent"] == "from you" and items["figures with intervals"] == "reported"
    assert items["test on data of another source"] == "unknown"
    drawn = checklist(replace(found, settings=found.settings | {"data": None}))
    assert "ethics approval and consent" not in [item for item, *_ in drawn], "phantoms are no patients"
    page = html.unescape(content.decode())
    assert all(f">{item}</th>" in page for item in items)


def test_the_model_card_is_part_of_the_page_and_safe(found: SearchResults, content: bytes) -> None:
    card = content.partition(b'<section id="card">')[2].decode()
    assert "<h3>Model card: one</h3>" in card and "<td>balanced accuracy</td>" in card
    assert "<img" not in markdown("<img src=x> [x](javascript:alert(1))") and "javascript:" in markdown("javascript:")
    assert 'href="javascript' not in markdown("[x](javascript:alert(1))")


def test_a_pair_of_copies_whose_file_is_no_image_any_more_is_shown_without_it(
    found: SearchResults, phantoms: Path, tmp_path: Path
) -> None:
    assert found.audit is not None
    (tmp_path / "text.png").write_text("no image")
    pair = found.audit.copies.pairs[0]
    pair = replace(pair, first=replace(pair.first, path="text.png"))
    copies = replace(found.audit.copies, pairs=[pair])
    (shown,) = pairs_of_copies(replace(found.audit, copies=copies), tmp_path, 1)
    assert [picture for _, picture in shown["sides"]] == ["", ""]


@given(st.floats(1e-4, 1e-2))
def test_an_edge_is_an_edge_on_the_parameters_own_scale(value: float) -> None:
    where = edge(value, FloatDistribution(1e-4, 1e-2, log=True))
    share = np.log(value / 1e-4) / np.log(100)
    assert where == ("the lower end" if share <= 0.02 else "the upper end" if share >= 0.98 else "")
    assert edge(2e-2, FloatDistribution(1e-4, 1e-2)) == "outside"
