"""The experiment's folder and the bundle in it: whole or not at all, and checked when read."""

from __future__ import annotations

import os
import pickle
import resource
from pathlib import Path

import optuna
import pytest

from lungct_tune.experiment.bundle import (
    BundleError,
    as_json,
    find_bundle,
    has_bundle,
    verify,
    write_bundle,
    write_so_far,
)
from lungct_tune.experiment.folder import Experiment, locate
from lungct_tune.experiment.study import load_study, sqlite_storage
from lungct_tune.filesystem import StorageError

FILES = {"model.safetensors": b"weights", "config.json": as_json({"a": 1})}


@pytest.mark.parametrize("scheme", ["", "file://", "fsspec+file://"])
def test_files_come_back_and_go(tmp_path: Path, scheme: str) -> None:
    experiment = Experiment.at(f"{scheme}{tmp_path}", "one")
    assert not experiment.exists() and experiment.read("a/b.txt") is None
    experiment.write("a/b.txt", b"first")
    experiment.write("a/b.txt", b"second")
    travelled = pickle.loads(pickle.dumps(experiment))
    assert travelled.read("a/b.txt") == b"second"
    assert (tmp_path / "one" / "a" / "b.txt").read_bytes() == b"second"
    assert list((tmp_path / "one" / "a").iterdir()) == [tmp_path / "one" / "a" / "b.txt"]
    assert experiment.files() == {"a/b.txt": 6} == experiment.files("a")
    assert experiment.info("a/b.txt").size == 6
    assert b"".join(experiment.chunks("a/b.txt", start=3)) == b"ond"
    experiment.delete("a/b.txt")
    experiment.delete("a/b.txt")
    assert experiment.files("a") == {} == experiment.files("nowhere")
    experiment.delete_folder("a")
    experiment.delete_folder("a")
    assert not experiment.exists("a/b.txt")


def test_a_relative_storage_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Experiment.at("./results", "one").uri == f"{tmp_path}/results/one"


def test_an_experiment_may_be_called_as_bundles_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: by path or URI, an experiment called as the folder above was looked for."""
    monkeypatch.chdir(tmp_path)
    for name in ("best", "one"):
        Experiment.at("results", name).write("settings.yaml", b"")
        uri = f"{tmp_path}/results/{name}"
        for source in (name, f"results/{name}", f"results/{name}/", f"results/{name}/best", f"file://{uri}/best"):
            assert locate(source, "results").uri == uri


def test_a_search_that_was_copied_here_and_is_called_by_its_name_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is looked for in ./results, and `pull --all` makes ./NAME."""
    monkeypatch.chdir(tmp_path)
    Experiment.at(".", "one").write("settings.yaml", b"")
    assert locate("one", "./results").similar() == " (did you mean ./one?)"


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"cannot write a\.txt"):
        Experiment.at(str(tmp_path / "file"), "one").write("a.txt", b"")


def test_a_file_that_cannot_be_written_whole_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    """States that do not fit a full disk would keep it full."""
    experiment, before = Experiment.at(str(tmp_path), "one"), resource.getrlimit(resource.RLIMIT_FSIZE)
    experiment.write("states/1.pt", b"whole")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write states/1\.pt"):
            experiment.write("states/1.pt", bytes(2**22))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert experiment.files() == {"states/1.pt": 5}


def test_an_unknown_kind_of_storage_is_named() -> None:
    with pytest.raises(StorageError, match="nosuch://x/one: not understood"):
        Experiment.at("nosuch://x", "one").write("a.txt", b"")


def test_a_bundle_is_whole_and_verified(tmp_path: Path) -> None:
    experiment = Experiment.at(str(tmp_path), "one")
    assert not has_bundle(experiment)
    write_bundle(experiment, FILES)
    assert has_bundle(experiment)
    folder = tmp_path / "one" / "best"
    assert {path.name for path in folder.iterdir()} == {*FILES, "checksums.txt"}
    verify(folder)


@pytest.mark.parametrize("earlier", range(3))
def test_whoever_looks_for_a_bundle_at_the_moment_it_is_there_finds_none_or_all_of_it(
    tmp_path: Path, earlier: int
) -> None:
    """Found: `report` and `pull` said that it had no checksums."""
    waits = [None] * earlier

    class Storage(Experiment):
        def arrive(self) -> None:
            if waits:
                waits.pop()
            elif not Path(self.uri, "best").exists():
                write_bundle(Experiment(self.uri), FILES)

        def exists(self, path: str = "") -> bool:
            found = super().exists(path)
            self.arrive()
            return found

        def files(self, folder: str = "") -> dict[str, int]:
            found = super().files(folder)
            self.arrive()
            return found

    storage = Storage.at(str(tmp_path), "one")
    assert find_bundle(storage) in ("best", None)
    assert find_bundle(storage) == "best"


def test_a_crash_while_writing_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    experiment = Experiment.at(str(tmp_path), "one")
    with pytest.raises(StorageError):
        write_bundle(experiment, FILES | {"n" * 300: b"a name that no file system takes"})
    assert (tmp_path / "one" / "best.part" / "config.json").exists()
    assert not (tmp_path / "one" / "best").exists()
    write_bundle(experiment, FILES)  # and the next attempt is not disturbed
    verify(tmp_path / "one" / "best")


def test_an_altered_missing_or_unfinished_bundle_is_refused(tmp_path: Path) -> None:
    write_bundle(Experiment.at(str(tmp_path), "one"), FILES)
    folder = tmp_path / "one" / "best"
    (folder / "config.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"config\.json: not the file that was written"):
        verify(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BundleError, match=r"config\.json: missing"):
        verify(folder)
    (folder / "checksums.txt").unlink()
    with pytest.raises(BundleError, match=r"no complete bundle; fetch the bundle again$"):
        verify(folder)
    (tmp_path / "one" / "settings.yaml").write_bytes(b"")  # it is the search's own
    with pytest.raises(BundleError, match=r"move .*/best away, and the search writes it again: --resume one$"):
        verify(folder)


def test_a_file_that_was_added_to_a_bundle_is_refused_unless_a_file_manager_left_it(tmp_path: Path) -> None:
    write_bundle(Experiment.at(str(tmp_path), "one"), FILES)
    folder = tmp_path / "one" / "best"
    (folder / ".DS_Store").write_bytes(b"")
    verify(folder)
    (folder / "model.pickle").write_bytes(b"")
    with pytest.raises(BundleError, match=r"model\.pickle: not named in checksums\.txt"):
        verify(folder)


def test_a_path_that_is_no_bundle_is_told_from_a_damaged_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(path: str) -> str:
        with pytest.raises(BundleError) as refused:
            verify(Path(path))
        return str(refused.value)

    monkeypatch.chdir(tmp_path)
    search = Experiment.at("results", "one")
    search.write("settings.yaml", b"")
    Path("slice.png").touch()
    for path in ("nosuch", "nosuch/best", "slice.png"):
        assert refusal(path).startswith(f"there is no folder {path}; give the folder of a bundle")
    for path in ("results/oen", "results/oen/best"):
        assert refusal(path).startswith(f"there is no folder {path} (did you mean one?);")
    for path in ("results/one", "results/one/best"):
        assert refusal(path) == "results/one is a search; no trial has completed yet, so it has no bundle"
    write_so_far(search, FILES, 12)
    for path in ("results/one", "results/one/best"):
        assert refusal(path) == "results/one is a search; give results/one/so_far/000012"
    write_bundle(search, FILES)
    assert refusal("results/one") == "results/one is a search; give results/one/best"
    verify(Path("results/one/best"))


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "..", "a/b"])
def test_a_bundle_vouches_only_for_files_of_its_own_folder(tmp_path: Path, name: str) -> None:
    write_bundle(Experiment.at(str(tmp_path), "one"), FILES)
    sums = tmp_path / "one" / "best" / "checksums.txt"
    sums.write_text(f"{'0' * 64}  {name}\n" + sums.read_text())
    with pytest.raises(BundleError, match="not the checksum of a file beside it"):
        verify(sums.parent)


@pytest.mark.parametrize("kept", ["config.json", "model.safetensors", "nothing"])
def test_a_bundle_without_a_model_or_how_to_build_it_is_refused(tmp_path: Path, kept: str) -> None:
    write_bundle(Experiment.at(str(tmp_path), "one"), {name: FILES[name] for name in FILES if name == kept})
    with pytest.raises(BundleError, match="missing"):
        verify(tmp_path / "one" / "best")


@pytest.mark.parametrize("name", ["lung%2Fmain", "100%", "what?", "a#b", "{x}", "ü ö", "a b&c=d"])
def test_a_study_may_be_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    optuna.create_study(storage=sqlite_storage(folder / "study.db"), study_name="one").set_user_attr("wall_s", 3.0)
    assert (folder / "study.db").stat().st_size > 0
    assert load_study(folder / "study.db", "one").user_attrs == {"wall_s": 3.0}
    experiment = Experiment.at(str(tmp_path), name)
    experiment.write("x", b"content")
    assert (folder / "x").read_bytes() == experiment.read("x") == b"content"


def test_no_pipe_and_no_giant_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(10**12)
    for name in ("pipe", "giant"):
        with pytest.raises(StorageError, match=f"cannot read {name}"):
            Experiment.at(str(tmp_path.parent), tmp_path.name).read(name)
