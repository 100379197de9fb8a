"""The report of a search that has finished, failed, was interrupted or had one trial: what it says and shows."""

from __future__ import annotations

import errno
import html
import io
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from recorded_search import Search, finished_search, with_test

from lungct_tune.auditing.audit import audit_images
from lungct_tune.data import read_images, split_images
from lungct_tune.data.split import read_split
from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.experiment import bundle
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.metrics import Figure, RatesAt, SeedComparison, SeedScores
from lungct_tune.experiment.predictions import Predictions, read_predictions
from lungct_tune.experiment.results import SearchResults, read_results
from lungct_tune.report import main
from lungct_tune.reporting.mistakes_section import MOST_SHOWN
from lungct_tune.reporting.model_card import model_card
from lungct_tune.reporting.report_page import command, report_page
from lungct_tune.reporting.search_section import about_the_search, over_seeds
from lungct_tune.reporting.test_section import Pictures, find_pictures

if TYPE_CHECKING:
    from collections.abc import Callable


class Page(HTMLParser):
    """A page as a browser reads it: text, tags that are never closed, addresses that it would fetch."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.text, self.fetched, self.open, self.images = "", [], [], 0
        self.scripts = self.uncaptioned = 0
        self.sections: list[str] = []
        self.feed(content.decode())
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.images += tag == "image"
        if tag == "section":
            self.sections.append(given["id"] or "")
        if tag == "svg":
            assert given["aria-label"] and given["role"] == "img"
        assert tag not in ("iframe", "link")
        self.scripts += tag == "script"
        self.uncaptioned += (tag == "table") - (tag == "caption")
        self.fetched += [given[key] for key in ("src", "href") if key in given]
        if tag not in ("meta", "br", "hr", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title", "script"):
            self.text += data + " "


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Search:
    return finished_search(tmp_path_factory.mktemp("finished"), phantoms)


@pytest.fixture(scope="module")
def found(finished: Search) -> SearchResults:
    return read_results(finished.plan.experiment)


@pytest.fixture(scope="module")
def content(found: SearchResults) -> bytes:
    return report_page("one", found, find_pictures(found, None, is_local=True))


def test_a_page_stands_alone_and_is_well_formed(content: bytes) -> None:
    page = Page(content)
    assert page.open == []
    assert all(address.startswith(("#", "data:image/")) for address in page.fetched)
    assert b"url(http" not in content and b"@import" not in content
    assert page.sections == ["verdict", "data", "search", "winner", "test", "mistakes", "checklist", "card", "again"]
    assert page.scripts == 2, "that which sorts the trials, and that which shows the texts of marks"
    ours, _, card = content.partition(b'<section id="card">')
    assert page.uncaptioned == card.count(b"<table"), "tables of the model card are Markdown's, which has no captions"
    assert not re.search(rb"<th(?! scope)[ >]", ours)
    assert b"<title>Report of the search one</title>" in content
    for number, svg in enumerate(content.decode().split("<svg")[1:]):
        drawn = "<svg" + svg.split("</svg>")[0] + "</svg>"
        ElementTree.fromstring(drawn.replace("xlink:href", "href")), number
    assert b"#0a0b" not in content  # every colour of a chart has become one of the page's


def test_a_page_says_the_figures_that_were_judged(found: SearchResults, content: bytes) -> None:
    text = Page(content).text
    test = found.test
    assert test is not None
    accuracy = f"{100 * test.accuracy.value:.1f} %"
    assert f"is right on {accuracy} of 16 test images" in text
    assert "4 completed, 1 failed" in text and "trial 3: failed: a <slot> died" in text
    assert "fixed before the search began" in text
    assert found.settings["fingerprint"] in text
    for row in test.confusion_matrix:
        assert all(f" {n} " in text for n in row)
    assert test.by_likeness is not None
    least = test.by_likeness.least
    assert f"least like the training images 8 {least.similarity:.2f} {100 * least.accuracy.value:.1f}" in text


def test_a_page_and_its_card_have_the_audits_verdict(found: SearchResults, content: bytes) -> None:
    assert found.audit is not None
    text, card = Page(content).text, html.unescape(model_card("one", found).decode())
    for said in [found.audit.verdict.headline, *found.audit.verdict.reasons]:
        assert said in text and said in card
    assert "in grouped cross-validation, by rules" in text  # its figures, folded away


def test_every_wrong_test_image_is_shown_with_what_spoke_for_either_class(found: SearchResults, content: bytes) -> None:
    assert found.bundle is not None and found.bundle.predictions is not None
    predictions = pd.read_csv(io.BytesIO(found.bundle.predictions.as_csv()))
    wrong = predictions[predictions["predicted"] != predictions["class"]]
    page = Page(content)
    assert 0 < len(wrong) < MOST_SHOWN
    for path, truth, said in zip(wrong["path"], wrong["class"], wrong["predicted"], strict=True):
        assert f"{truth}, predicted as {said} {path}" in page.text
    shown = page.text.count(", predicted as ") + page.text.count(", correct ")
    assert shown <= page.images <= 3 * shown
    assert f"predicts the same class for {shown} of {shown}" in page.text


def test_without_its_images_a_page_lists_the_mistakes_and_says_what_to_do(found: SearchResults, tmp_path: Path) -> None:
    (tmp_path / "normal").mkdir()
    pictures = find_pictures(found, tmp_path, is_local=True)
    assert "--data DIR" in pictures.missing
    page = Page(report_page("one", found, pictures))
    assert page.images == 0 and "--data DIR" in page.text and ", predicted as " in page.text


def test_other_images_than_the_searchs_are_not_shown(found: SearchResults, phantoms: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(phantoms, tmp_path / "copy")
    shutil.copy(next(copy.glob("train/normal/*")), next(copy.glob("test/normal/*")))
    assert "are not those of the search" in find_pictures(found, copy, is_local=True).missing
    assert find_pictures(found, f"file://{phantoms}", is_local=True).images is not None
    missing = find_pictures(found, None, is_local=False).missing  # others may have written the path there
    assert "give the folder of the images with --data DIR" in missing


def test_a_model_card_has_the_runs_figures_and_is_not_for_diagnosis(found: SearchResults) -> None:
    card = model_card("one", found).decode()
    assert found.test is not None
    assert "Not a medical device; not for diagnosis" in card
    assert f"| accuracy | {100 * found.test.accuracy.value:.1f}" in card
    assert "| normal | " in card and "## Limits" in card and "None" not in card
    halves = found.test.by_likeness
    assert halves is not None
    for half, said in ((halves.least, "look least like the training images |"), (halves.most, "on the other 8 |")):
        assert f"{said} {100 * half.balanced_accuracy.value:.1f}" in card


def test_a_model_card_says_that_split_and_groups_were_given(
    found: SearchResults, phantoms: Path, tmp_path: Path
) -> None:
    images = read_images(phantoms, 32, progress=False)
    rows = pd.DataFrame({"path": images.table["path"], "split": split_images(images, "grouped", 0)})
    rows["group"] = [f"patient {group}" for group in images.table["group"]]
    rows.to_csv(tmp_path / "split.csv", index=False)
    images = replace(images, table=images.table.assign(is_listed=False))  # without groups.csv
    audit = audit_images(*read_split(images, tmp_path / "split.csv"), "file")
    given = replace(found, settings=found.settings | {"split_file": "split.csv"}, audit=audit)
    card = model_card("one", given).decode()
    assert "known patients; split by a given file." in card and "One data set, split by a given file:" in card
    assert "a split file or PatientIDs (DICOM), joined where images are copies." in card
    assert "image similarity" not in card and "at random" not in card and "`grouped`" not in card
    assert not any("groups.csv" in advice for advice in audit.verdict.advice)
    assert "split at random by groups." in model_card("one", found).decode()


@pytest.mark.parametrize(("folds", "where"), [(None, "on validation"), (5, "in 5-fold cross-validation")])
def test_a_model_card_says_where_the_threshold_was_chosen(found: SearchResults, folds: int | None, where: str) -> None:
    assert found.test is not None and found.test.cancer_vs_normal is not None
    rates = RatesAt(0.4, Figure(0.7, None), Figure(0.9, None))
    cancer = replace(found.test.cancer_vs_normal, at_95_specificity=rates)
    judged = with_test(replace(found, settings=found.settings | {"folds": folds}), cancer_vs_normal=cancer)
    assert (
        f"At the threshold with 95 % specificity {where}, 0.40: sensitivity 70.0" in model_card("one", judged).decode()
    )


@pytest.mark.parametrize(
    ("trials", "steps", "expected", "sections"),
    [
        (2, [lambda s: s.run(2)], "has not ended: 0 of 2 trials", []),
        (3, [lambda s: s.run(), lambda s: s.run(1)], "has not ended: 1 of 3", ["winner"]),
        (2, [lambda s: s.run(0, "no <room>")] * 2, "The search failed", []),
        (1, [lambda s: s.run()], "has not been retrained and evaluated", ["winner"]),
        (
            1,
            [lambda s: s.run(), Search.finish],
            "no other was tried",
            ["winner", "test", "mistakes", "checklist", "card"],
        ),
    ],
    ids=["no trial completed yet", "interrupted", "failed", "not judged", "one trial"],
)
def test_a_report_at_every_point_of_a_search(
    trials: int,
    steps: list[Callable[[Search], None]],
    expected: str,
    sections: list[str],
    phantoms: Path,
    tmp_path: Path,
) -> None:
    search = Search(tmp_path, phantoms, trials)
    for step in steps:
        step(search)
    out = tmp_path / "page.html"
    assert main([str(search.folder), "--out", str(out)]) == 0
    page = Page(out.read_bytes())
    assert expected in page.text
    assert page.sections == ["verdict", "data", "search", *sections, "again"]
    found = read_results(search.plan.experiment)
    if found.has_failed:
        assert "failed: no <room>" in page.text and "there is no model" in page.text


def test_phantoms_are_called_phantoms_loudly(found: SearchResults) -> None:
    drawn = replace(found, settings=found.settings | {"data": None})
    text = Page(report_page("one", drawn, Pictures())).text
    assert text.count("These are PHANTOMS, drawn by a program") >= 2
    assert "PHANTOMS" in model_card("one", drawn).decode()


def test_names_of_files_cannot_become_part_of_the_page(found: SearchResults) -> None:
    assert found.bundle is not None and found.bundle.predictions is not None
    said = found.bundle.predictions
    evil = replace(said, paths_N=np.array([path + "<script>alert(1)</script>.png" for path in said.paths_N]))
    page = report_page("<img src=x>", replace(found, bundle=replace(found.bundle, predictions=evil)), Pictures())
    assert page.count(b"<script") == 2 and b"<script>alert" not in page
    assert b"<img" not in page and b"&lt;script&gt;" in page
    assert b"<script" not in model_card("<script>", found)


def test_names_of_classes_are_drawn_as_they_are() -> None:
    from lungct_tune.reporting.test_charts import precision_recall, roc, worth

    names = ("$\\frac{a$ & <b>", "plain")
    labels_N, probabilities_NC = np.array([0, 1, 1]), np.array([[0.6, 0.4], [0.3, 0.7], [0.7, 0.3]])
    per_class = evaluate_predictions(labels_N, probabilities_NC, names, np.arange(3)).per_class
    drawn = [draw(labels_N, probabilities_NC, per_class) for draw in (roc, precision_recall)]
    for svg in [*drawn, worth([(names[0], 0.5, None, True)])]:
        text = "".join(ElementTree.fromstring(svg).itertext())
        assert names[0] in text


def test_classes_may_be_called_what_tables_take_for_something_else() -> None:
    names = ["1", "None", "True"]
    paths = ["NA", "a, b.png", "nan"]
    written = Predictions(tuple(names), np.array(paths), np.arange(3), np.eye(3)[[1, 2, 0]], np.array([0, 1, 1]))
    said = read_predictions(written.as_csv(), names)
    assert [list(said.labels_N), list(said.predicted_N), list(said.paths_N)] == [[0, 1, 2], [1, 2, 0], paths]


def test_the_card_has_no_entities_of_html(found: SearchResults) -> None:
    assert not re.search("&(?!lt;)", model_card("one", found).decode())


def test_a_file_of_the_users_is_never_overwritten(
    finished: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sealed = (finished.folder / "best" / "checksums.txt").read_bytes()
    Path("report.html").write_text("<html>my own</html>")
    assert main([str(finished.folder)]) == 2
    assert "was not made by lungct_tune" in capsys.readouterr().err
    assert Path("report.html").read_text() == "<html>my own</html>"
    assert main([str(finished.folder), "--out", "."]) == 2
    assert main([str(finished.folder), "--out", "nowhere/page.html"]) == 2
    assert "there is no folder nowhere; make it first" in capsys.readouterr().err
    assert main([str(finished.folder), "--out", str(finished.folder / "best" / "report.html")]) == 2
    assert "is a bundle, whose checksums are final" in capsys.readouterr().err
    assert main(["one", "--storage", str(finished.folder.parent), "--out", "page.html"]) == 0
    first = Path("page.html").stat().st_mtime_ns
    assert main([str(finished.folder / "best"), "--out", "page.html"]) == 0  # the page that was made before
    assert Path("page.html").stat().st_mtime_ns > first
    assert (finished.folder / "best" / "checksums.txt").read_bytes() == sealed
    bundle.verify(finished.folder / "best")


def test_a_full_disk_leaves_the_page_that_was_there_also_behind_a_link(
    finished: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, link, write = tmp_path / "page.html", tmp_path / "link.html", Path.write_bytes
    link.symlink_to(page)
    assert main([str(finished.folder), "--out", str(link)]) == 0
    assert link.is_symlink() and page.is_file()
    before = page.read_bytes()

    def full(path: Path, content: bytes) -> int:
        if path.name != page.name:
            return write(path, content)
        write(path, content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main([str(finished.folder), "--out", str(link)]) == 2
    assert f"{link} cannot be written (No space left on device); choose another --out" in capsys.readouterr().err
    assert page.read_bytes() == before and sorted(tmp_path.iterdir()) == [link, page]
    assert main([str(finished.folder), "--out", "/dev/null"]) == 2, "a device would be replaced"


def test_hardware_that_is_not_known_is_said_to_be(content: bytes) -> None:
    assert b"<dt>hardware</dt><dd>not noted</dd>" in content


@pytest.mark.parametrize("lost", [bundle.MODEL, bundle.CONFIG, bundle.METRICS, bundle.PREDICTIONS])
def test_a_bundle_that_has_lost_a_file_is_not_taken_for_a_search_without_a_model(
    lost: str, finished: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished.folder, tmp_path / "one")
    (copy / "best" / lost).unlink()
    assert main([str(copy), "--out", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert str(copy / "best") in said and "missing" in said and lost in said and not (tmp_path / "page.html").exists()


def test_a_bundle_of_the_best_so_far_may_be_replaced_while_it_is_read(finished: Search, tmp_path: Path) -> None:
    copy = shutil.copytree(finished.folder, tmp_path / "one")
    (copy / "so_far").mkdir()
    (copy / "best").rename(copy / "so_far" / "000005")
    (copy / "so_far" / "000005" / bundle.MODEL).unlink()
    assert read_results(Experiment.at(str(tmp_path), "one")).bundle is None


def test_what_is_no_search_is_refused(finished: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "x.html")]) == 2
    assert "no search in" in capsys.readouterr().err
    shutil.copytree(finished.folder / "best", tmp_path / "pulled")
    assert main([str(tmp_path / "pulled"), "--out", str(tmp_path / "x.html")]) == 2
    assert "pulled bundle" in capsys.readouterr().err
    shutil.copytree(finished.folder, tmp_path / "broken")
    (tmp_path / "broken" / "study.journal").write_bytes(b"no journal\n")
    assert main([str(tmp_path / "broken"), "--out", str(tmp_path / "x.html")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_the_command_runs_the_same_search_again(found: SearchResults) -> None:
    from lungct_tune.config.settings import read_settings

    on_cpu = found.settings | {"gpus_per_worker": 0.0}  # not what is decided where nothing is said
    settings, _ = read_settings(command(on_cpu).split()[3:])
    kept = {name: value for name, value in on_cpu.items() if name not in ("name", "storage", "fingerprint")}
    assert {name: value for name, value in settings.model_dump(mode="json").items() if name in kept} == kept


def test_a_class_that_trials_were_not_judged_on_is_named(found: SearchResults) -> None:
    split = found.split[(found.split["label"] != "normal") | (found.split["split"] != "valid")]
    (judged,) = [
        said for said in about_the_search(replace(found, split=split)) if said.startswith("Trials were evaluated")
    ]
    assert "There was no image of normal." in judged and "has 0 of them" not in judged


def test_seeds_compare_winner_and_published_configuration() -> None:
    of_winner = SeedComparison([0.8, 0.7], mean=0.75, sd=0.07)
    alone = over_seeds(of_winner)
    assert "2 other seeds, the winner reached 75.0" in alone and "published" not in alone
    published = SeedScores([0.7, 0.65], mean=0.675, sd=0.035)
    both = over_seeds(replace(of_winner, published=published, difference=Figure(0.075, (-0.2, 0.35))))
    assert "published configuration reached 67.5" in both
    assert "paired by seed: +7.5 points of balanced accuracy (95 % interval -20.0 to +35.0)" in both
