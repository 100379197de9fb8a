"""Search spaces: what a file may say, and how a wrong one is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungct_tune.config.hyperparameters import PUBLISHED, Hyperparameters
from lungct_tune.config.search_space import LIMITS, SpaceError, parse_space, read_space
from lungct_tune.config.settings import SPACES


@pytest.mark.parametrize("file", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_spaces_that_ship_begin_with_the_published_configuration(file: Path) -> None:
    space = parse_space(read_space(file), str(file))
    assert space.fixed_trials[0] == PUBLISHED
    assert PUBLISHED.truncation_depth == 20 and PUBLISHED.dropout == 0.5
    assert file.read_text().startswith("# Question:")


def test_default_varies_what_matters_and_fixes_the_whole_network_too() -> None:
    space = parse_space(read_space(SPACES / "default.yaml"), "default")
    fixed = {"augmentation", "shift", "flip", "weight_decay"}
    assert set(space.distributions) == {field.name for field in fields(Hyperparameters)} - fixed
    assert [trial.truncation_depth for trial in space.fixed_trials] == [20, 49]
    assert space.deepest == 49


def test_card_varies_only_the_card() -> None:
    space = parse_space(read_space(SPACES / "card.yaml"), "card")
    assert set(space.distributions) == {"truncation_depth", "dropout", "augmentation"}


def test_every_parameter_has_limits() -> None:
    assert set(LIMITS) == {field.name for field in fields(Hyperparameters)}


def test_ranges_choices_and_constants() -> None:
    space = parse_space(
        "truncation_depth: [10, 20]\ndropout: {low: 0, high: 0.5}\nhead_lr: {low: 1e-4, high: 1e-2, log: true}\n"
        "augmentation: 0.2\nfixed_trials: [{dropout: 0.1}]",
        "x.yaml",
    )
    assert space.distributions["head_lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    assert space.constants == {"augmentation": 0.2}
    assert [trial.dropout for trial in space.fixed_trials] == [0.5, 0.1]
    configuration = space.hyperparameters({"truncation_depth": 10, "dropout": 0.3, "head_lr": 1e-3})
    assert (configuration.truncation_depth, configuration.augmentation) == (10, 0.2)
    assert configuration.weight_decay == PUBLISHED.weight_decay
    assert space.deepest == 20


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected lines"),
        ("- 3", "expected lines"),
        ("a: [", "not YAML"),
        ("depth: {low: 1, high: 2}", "depth: no such parameter; the parameters are truncation_depth"),
        ("dropout: {low: 0.5, high: 0.1}", "dropout: low 0.5 is above high 0.1"),
        ("dropout: {low: 0.5}", "dropout: a range needs high"),
        ("dropout: {low: 0, high: 0.5, step: 1}", "dropout: ['step'] not understood"),
        ("dropout: {low: 0, high: 1}", "dropout: 1 is not allowed; it must be a number from 0 to 0.95"),
        ("dropout: {low: 0, high: x}", "dropout: 'x' is not allowed"),
        ("weight_decay: {low: 0, high: 1, log: true}", "weight_decay: a logarithmic range must begin above 0"),
        ("frozen_share: {low: 0.1, high: 1, log: true}", "frozen_share: a logarithmic range cannot include 0"),
        ("weight_decay: {low: 0.1, high: 1, log: 3}", "weight_decay: log is 3"),
        ("truncation_depth: {low: 1, high: 50}", "truncation_depth: 50 is not allowed; it must be a whole number"),
        ("truncation_depth: {low: 1.5, high: 9}", "truncation_depth: 1.5 is not allowed"),
        ("truncation_depth: []", "truncation_depth: the choices [] do not include [20]"),
        ("truncation_depth: [4, 5]", "the choices [4, 5] do not include [20], which the published"),
        ("dropout: 0.3", "varies no parameter"),
        ("dropout: {low: 0, high: 0.5}\nfixed_trials: 3", "fixed_trials: expected a list"),
        ("dropout: {low: 0, high: 0.5}\nfixed_trials: [{deep: 3}]", "fixed_trials[0]: deep: no such parameter"),
        (
            "dropout: {low: 0, high: 0.5}\nfixed_trials: [{}, {dropout: 2}]",
            "fixed_trials[1]: dropout: 2 is not allowed",
        ),
    ],
)
def test_a_malformed_space_is_refused_with_file_key_and_reason(text: str, says: str) -> None:
    with pytest.raises(SpaceError) as refusal:
        parse_space(text, "mine.yaml")
    assert str(refusal.value).startswith("mine.yaml: ")
    assert says in str(refusal.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"nowhere\.yaml"):
        read_space(Path("nowhere.yaml"))


@given(st.integers(1, 49), st.floats(0, 1))
def test_frozen_depth_stays_within_the_cut(depth: int, share: float) -> None:
    assert 0 <= Hyperparameters(truncation_depth=depth, frozen_share=share).frozen_depth <= depth


def test_a_file_that_is_not_there_is_answered_with_the_folder_of_those_that_are() -> None:
    with pytest.raises(SpaceError, match=f"no.yaml: cannot be read .*; {SPACES}/ has spaces"):
        read_space(Path("no.yaml"))
