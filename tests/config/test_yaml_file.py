"""YAML that somebody brings is read once, word by word, or refused."""

from __future__ import annotations

import time

import pytest

from lungct_tune.config.yaml_file import parse_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trials: 3\nseed: 1\ntrials: 4\n", "line 3: the key 'trials' is there twice"),
        (BOMB, "aliases"),
        ("a: &x {b: *x}", "aliases"),
        ("? [1, 2]\n: 3", "a key is no word"),
        ("a: [1, 2", "line 1"),
        ("a: " + "[" * 100_000, "too deep"),
        ("a: 1\n" * 200_000, "at most"),
        ("a: \x00", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 2026-99-99", "."),
    ],
)
def test_what_repeats_unfolds_or_has_no_end_is_refused_at_once(content: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match=message):
        parse_yaml(content)
    assert time.monotonic() - begun < 10


def test_keys_stay_as_they_are_written() -> None:
    assert parse_yaml("map: {0: a, 1: b, yes: c, 1.50: d, null: e}") == {
        "map": {"0": "a", "1": "b", "yes": "c", "1.50": "d", "null": "e"}
    }


def test_an_error_repeats_no_value() -> None:
    with pytest.raises(ValueError, match="line 2") as error:
        parse_yaml("study: 'postgresql://me:hunter2@host/db\ntrials: [")
    assert "hunter2" not in str(error.value)
