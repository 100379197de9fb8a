"""The verdict of a search: which comparison it takes, and what it says on phantoms, with overlap, of old bundles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded_search import finished_search, with_test
from rich.console import Console

from lungct_tune.experiment.metrics import Figure, ReferenceAccuracy, WithoutOverlap
from lungct_tune.experiment.results import SearchResults, read_results
from lungct_tune.experiment.trial import Outcome
from lungct_tune.reporting.console import print_figures
from lungct_tune.reporting.model_card import model_card
from lungct_tune.reporting.search_section import about_the_search
from lungct_tune.reporting.verdict import verdict


def compared(name: str, low: float, high: float = 0.5) -> ReferenceAccuracy:
    """Another prediction, and the interval of the paired difference to it."""
    return ReferenceAccuracy(name, Figure(0.3, None), Figure((low + high) / 2, (low, high)))


def others(**lower_ends: float) -> dict[str, Any]:
    """All that a model is compared with: majority class, shortcuts by their rule, the published configuration."""
    ends = {"majority": 0.3, "file": 0.2, "histogram": 0.2, "border": 0.2, "pixels": 0.2, "published": 0.1} | lower_ends
    kinds = {"majority": "majority class", "published": "published"}
    return {kinds.get(name, f"shortcut: {name}"): compared(name, low) for name, low in ends.items()}


def conclusion(found: SearchResults, **more: Any) -> str:
    return verdict(with_test(found, **more))[2]


@pytest.fixture(scope="module")
def gained(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> SearchResults:
    """A finished search whose winner is another than the published configuration."""
    search = finished_search(tmp_path_factory.mktemp("finished"), phantoms)
    found = read_results(search.plan.experiment)
    assert found.winner is not None and found.winner.number != 0
    return found


def test_the_verdict_takes_the_hardest_comparison_by_its_paired_difference(gained: SearchResults) -> None:
    """Whatever the intervals of the single accuracies are: those of the fixture reach below all others."""
    clear = conclusion(gained, references=others())
    assert "better than every simple rule" in clear and "It is better than the published" in clear
    assert "no diagnosis" in clear
    for rule, title in (
        ("histogram", "the histogram of greys"),
        ("pixels", "the most similar image at 32 x 32 pixels"),
    ):
        easy = conclusion(gained, references=others(**{rule: -0.02}))
        assert f"not shown to be better than a rule that sees only {title}: +24.0 points of balanced" in easy
        assert "(95 % interval -2.0 to +50.0)" in easy and "do not show that the model recognises disease" in easy
        assert "hold for images" not in easy
    both = conclusion(gained, references=others(majority=-0.1, border=-0.05))
    assert both.startswith("The model is not shown to be better than always predicting majority: +20.0 points")


def test_the_verdict_says_when_the_search_found_nothing_better_than_the_published(gained: SearchResults) -> None:
    nothing = conclusion(gained, references=others(published=-0.01))
    assert "found nothing that is shown to be better than the published configuration" in nothing
    assert "+24.5 points of balanced accuracy (95 % interval -1.0 to +50.0)" in nothing
    without = {kind: other for kind, other in others().items() if kind != "published"}
    assert "not retrained, so the gain over it is not measured" in conclusion(gained, references=without)
    published = replace(gained, trials=gained.trials[:1], settings=gained.settings | {"trials": 5})
    assert "published" not in conclusion(published, references=without), "no other was tried"
    worse = replace(gained.trials[1], history=gained.trials[0].history)
    published = replace(gained, trials=[gained.trials[0], worse])
    assert "The search found nothing better than the published configuration." in conclusion(
        published, references=without
    )


def test_the_verdict_on_phantoms_is_a_verdict_too(gained: SearchResults) -> None:
    drawn = replace(gained, settings=gained.settings | {"data": None})
    easy = conclusion(drawn, references=others(histogram=-0.1, published=-0.1))
    assert easy.startswith("These are PHANTOMS")
    assert "not shown to be better than a rule that sees only the histogram of greys" in easy
    assert "found nothing that is shown to be better than the published configuration" in easy
    assert "disease" not in easy.removeprefix("These are PHANTOMS") and "hold for images" not in easy
    card = model_card("one", with_test(drawn, references=gained.test.references)).decode()
    assert verdict(drawn)[2] in card


def test_with_group_overlap_the_verdict_is_of_the_images_without(
    gained: SearchResults, capsys: pytest.CaptureFixture[str]
) -> None:
    leaking = gained.split.assign(group=gained.split["path"].where(gained.split["path"].rank() % 2 == 0, "one"))
    n = replace(gained, split=leaking).seen
    for references, said, too_high in (
        (others(), "The model is better than every simple rule", True),
        (others(file=-0.1), "The figures do not show that the model recognises disease", False),
        (others(majority=-0.1), "The model is not shown to be better than always predicting majority", False),
    ):
        clean = WithoutOverlap(16 - n, Figure(0.7, (0.4, 0.8)), references, Figure(0.6, (0.3, 0.7)))
        seen = replace(with_test(gained, references=others(), without_overlap=clean), split=leaking)
        told = verdict(seen)[2]
        assert told.startswith(said)
        assert ("The figures on all test images are too high." in told) == too_high
        assert f"For {n} of the 16 test images an image of the same group (a copy, or of the same" in told
        assert f"On the {16 - n} others the accuracy is 70.0" in told
    nothing = WithoutOverlap(0, Figure(None, None), others())
    all_seen = replace(with_test(gained, without_overlap=nothing), split=gained.split.assign(group=0))
    assert verdict(all_seen)[2].startswith("None: there is no test image without group overlap. For 16 of the 16 ")
    assert all_seen.test is not None
    print_figures(all_seen.test, Console())
    said = " ".join(capsys.readouterr().out.split())
    assert "the model was trained on the groups of all these images" in said and "not defined" not in said


def test_one_rule_is_not_every_rule(gained: SearchResults) -> None:
    """As in an evaluation on images from elsewhere, where no shortcut is tried."""
    always = {"majority class": others()["majority class"]}
    told = conclusion(gained, references=always)
    assert told.startswith("The model is better than always predicting majority: +40.0 points") and "every" not in told


def test_a_class_without_images_is_named(gained: SearchResults) -> None:
    """The balanced accuracy is then the mean of the other classes."""
    assert gained.test is not None
    first, *rest = gained.test.per_class
    emptied = gained.test.per_class | {first: replace(gained.test.per_class[first], n=0)}
    said = f"None of these images is of {first}: the figures say nothing about this class."
    assert said in verdict(with_test(gained, per_class=emptied))[1] and said not in verdict(gained)[1]
    clean = WithoutOverlap(9, Figure(0.7, None), others(), Figure(0.6, None), missing=tuple(rest[:2]))
    seen = replace(with_test(gained, without_overlap=clean), split=gained.split.assign(group=gained.split["label"]))
    assert f"None of these images is of {rest[0]} or {rest[1]}: the figures say nothing about these" in verdict(seen)[2]


def test_a_model_card_has_both_accuracies_without_group_overlap(gained: SearchResults) -> None:
    clean = WithoutOverlap(9, Figure(0.7, None), {}, Figure(0.6, None))
    card = model_card("one", with_test(gained, without_overlap=clean)).decode()
    assert "| accuracy on the 9 images without group overlap | 70.0" in card
    assert "| balanced accuracy on these | 60.0" in card


def test_a_published_configuration_that_did_not_run_to_its_end_has_no_figure_to_compare_with(
    gained: SearchResults,
) -> None:
    """After its first epochs any winner is far above it."""
    gain = "above the published configuration"
    assert any(gain in said for said in about_the_search(gained))
    first, *rest = gained.trials
    for outcome in (Outcome.RUNNING, Outcome.DIVERGED):
        cut = replace(gained, trials=[replace(first, outcome=outcome, history=first.history[:1]), *rest])
        assert not any(gain in said for said in about_the_search(cut)), outcome


def test_a_bundle_without_paired_differences_says_so(gained: SearchResults) -> None:
    old = {"majority class": ReferenceAccuracy("normal", Figure(0.3, None))}
    assert "an earlier version of lungct_tune made this bundle" in conclusion(gained, references=old)
