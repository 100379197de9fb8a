"""An experiment on the disk of a cluster's head, fetched as `ray exec` and `ray rsync-down` do it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from rich.console import Console

from lungct_tune.bundle import CHECKSUMS, FOLDER, SO_FAR
from lungct_tune.data.cache import default_cache
from lungct_tune.experiment import Experiment
from lungct_tune.fetch import TRANSIENT, is_transient
from lungct_tune.storage import StorageError
from lungct_tune.terminal import transfer_bar

ATTEMPTS = 3
"""rsync fails when a file vanishes under its hands, as a search's do; what it has it does not fetch again."""


@contextmanager
def on_head(cluster: Path, name: str, storage: str | None, everything: bool, console: Console) -> Iterator[Experiment]:
    """A copy on this machine of an experiment on a cluster's head: of its bundle, or of everything.

    It lies in the user's cache, where an attempt that was cut off goes on, and is deleted when it has been used.

    Args:
        cluster: the file that `ray up` was given.
        storage: the folder of the experiments as the head sees it; by default `results` in the project's folder.

    Raises:
        StorageError: the head cannot be reached, or has no such experiment.
    """
    try:
        config = yaml.safe_load(cluster.read_text())
        folder = results_on_head(config, storage)
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"with it, SOURCE is an experiment's name, not {name!r}")
        copy = default_cache() / "pulled" / str(config["cluster_name"]) / name
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as own:
            # rsync-down leaves out what the file has `ray up` leave out
            yaml.safe_dump(config | {"rsync_exclude": [*TRANSIENT, "study.db"], "rsync_filter": []}, own)
            own.flush()
            _Head(own.name, folder, name).fetch(copy, everything, console)
    except (OSError, ValueError, KeyError, AttributeError, yaml.YAMLError, StorageError) as error:
        raise StorageError(f"--cluster {cluster}: {error}") from error
    yield Experiment(str(copy))
    shutil.rmtree(copy)


def results_on_head(config: dict[str, Any], storage: str | None) -> str:
    """The folder of the experiments on the head of a `ray up` cluster.

    Args:
        config: the cluster file's content.
        storage: what the search was given there; relative to the project's folder.

    Raises:
        ValueError: it cannot be told; the message says what to do.
    """
    if storage and "://" in storage:
        raise ValueError(f"{storage} is not on the head; leave --cluster out to pull from there")
    if storage and storage.startswith(("/", "~")):
        return storage
    for there, here in (config.get("file_mounts") or {}).items():
        if Path(here).expanduser().joinpath("lungct_tune").is_dir():
            return str(PurePosixPath(there, storage or "results"))
    raise ValueError(
        "none of its file_mounts is this project, as seen from here; run this in the folder that you run `ray up` in, "
        "or say where the experiments lie on the head: --storage /FOLDER"
    )


@dataclass(frozen=True)
class _Head:
    """An experiment on the head of a cluster."""

    cluster: str
    folder: str
    name: str

    @property
    def _study_copy(self) -> str:
        return f".{self.name}.db"

    def fetch(self, copy: Path, everything: bool, console: Console) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            sizes = self._list(copy_study=everything)
            if everything:
                what = ""
            elif f"{FOLDER}/{CHECKSUMS}" in sizes:
                what = f"{FOLDER}/"
            else:  # settings.yaml tells a search that has no bundle yet from none
                what = f"{SO_FAR}/" if any(path.startswith(f"{SO_FAR}/") for path in sizes) else "settings.yaml"
            wanted = {path: size for path, size in sizes.items() if path.startswith(what)}
            for old in copy.rglob("*"):
                if old.is_file() and str(old.relative_to(copy)) not in wanted:
                    old.unlink()
            (copy / what).parent.mkdir(parents=True, exist_ok=True)
            try:
                self._rsync(f"{self.name}/{what}", f"{copy}/{what}", sum(wanted.values()), console)
                break
            except StorageError:
                if attempt == ATTEMPTS:
                    raise
        if everything and "study.db" in sizes:
            self._rsync(self._study_copy, f"{copy}/study.db", sizes["study.db"], console)
            self._run(f"rm {self._study_copy}")

    def _list(self, copy_study: bool) -> dict[str, int]:
        """The experiment's files with their sizes.

        Args:
            copy_study: have SQLite make a copy of the study first, as it is between two writes of the search.
        """
        study, copy = f"{self.name}/study.db", self._study_copy
        program = f'import sqlite3; sqlite3.connect("{study}").execute("VACUUM INTO ?", ["{copy}"])'
        copying = f"if test -f {study}; then rm -f {copy} && python3 -c '{program}' || exit 1; fi; "
        files = rf"find . -type f \( -path './{self.name}/*' -o -path './*/settings.yaml' \) -printf 'found %s %P\n'"
        found = re.findall(r"^found (\d+) (.+?)\r*$", self._run((copying if copy_study else "") + files), re.MULTILINE)
        sizes = {path: int(size) for size, path in found}
        if f"{self.name}/settings.yaml" not in sizes:
            names = sorted(path.split("/")[0] for path in sizes if path.endswith("/settings.yaml"))
            there = f"there are: {', '.join(names)}" if names else "there is none at all"
            raise StorageError(f"no experiment {self.name!r} in {self.folder} on the head; {there}")
        inside = f"{self.name}/"
        own = {path.removeprefix(inside): size for path, size in sizes.items() if path.startswith(inside)}
        return {path: size for path, size in own.items() if not is_transient(path)}

    def _run(self, command: str) -> str:
        """A command's output, and whatever a login shell says besides; in the experiments' folder, if there is one."""
        home, rest = ("~/", self.folder[2:]) if self.folder.startswith("~/") else ("", self.folder)
        return self._ray("exec", f"cd {home}{shlex.quote(rest)} || exit 0; {command}")

    def _rsync(self, source: str, target: str, size: int, console: Console) -> None:
        with transfer_bar(console) as bar:
            task = bar.add_task(self.name, total=size)
            folder = Path(target).parent
            self._ray(
                *("rsync-down", "--verbose", f"{self.folder}/{source}", target),
                meanwhile=lambda: bar.update(task, completed=_size(folder)),
            )

    def _ray(self, command: str, *arguments: str, meanwhile: Callable[[], None] = lambda: None) -> str:
        options = ("--log-style", "pretty", "--log-color", "false")
        words = [sys.executable, "-m", "ray.scripts.scripts", command, *options, self.cluster, *arguments]
        with (
            tempfile.TemporaryFile("w+", errors="replace") as said,  # no pipe: ssh's master keeps it open for 10 s more
            subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT) as process,
        ):
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
                meanwhile()
            said.seek(0)
            output = said.read()
        if process.returncode:
            lines = [line for line in output.splitlines() if line.strip() and "StrictHostKeyChecking" not in line]
            raise StorageError(
                "\n".join([f"{self.folder}/{self.name}: not fetched from the head; `ray {command}` says", *lines[-3:]])
            )
        return output


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # rsync renames what it has finished
            total += file.stat().st_size
    return total
