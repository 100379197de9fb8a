"""Images at a URI are copied into the cache once, also for searches that start at the same time."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pyarrow.fs
import pytest
from test_dataset import two_classes

from lungct_tune.data import fetch_images


def test_a_folder_of_this_machine_is_not_copied(tmp_path: Path) -> None:
    images = two_classes(tmp_path / "my images")
    for name in (images, str(images), images.as_uri()):
        assert fetch_images(name, tmp_path / "cache") == images
    assert not (tmp_path / "cache").exists()


def test_what_another_search_fetches_meanwhile_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, fetched = f"fsspec+file://{two_classes(tmp_path / 'images')}", list[str]()
    copy_files, flock = pyarrow.fs.copy_files, fcntl.flock

    def fetch(source: str, *arguments: object, **options: object) -> None:
        fetched.append(source)
        copy_files(source, *arguments, **options)

    def wait(*arguments: object) -> None:
        """The other search has the lock first."""
        monkeypatch.setattr(fcntl, "flock", flock)
        fetch_images(uri, tmp_path / "cache")
        flock(*arguments)

    monkeypatch.setattr(pyarrow.fs, "copy_files", fetch)
    monkeypatch.setattr(fcntl, "flock", wait)
    copy = fetch_images(uri, tmp_path / "cache")
    assert len(fetched) == len(list(copy.rglob("*.png"))) == 4
