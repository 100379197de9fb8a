"""Fetches an experiment from the disk of a cluster's head, by `ray exec` and `ray rsync-down`."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml
from rich.console import Console

from lungct_tune.data.cache import default_cache
from lungct_tune.experiment.bundle import CHECKSUMS, FOLDER, SO_FAR
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study_mirror import DATABASE, JOURNAL
from lungct_tune.experiment.transfer import TRANSIENT, is_transient, locked, transfer_bar
from lungct_tune.files import read_text
from lungct_tune.filesystem import StorageError

ATTEMPTS = 3
"""How often rsync is run. It fails when a file vanishes meanwhile, as files of a running search do. The next run
fetches only the missing files."""


@contextmanager
def on_head(cluster: Path, name: str, storage: str | None, everything: bool, console: Console) -> Iterator[Experiment]:
    """Copies an experiment, or only its bundle, from a cluster's head to this machine.

    The copy is in the user's cache and is deleted after use. After an interruption the next attempt continues it.

    Args:
        cluster: the cluster file of `ray up`.
        storage: the --storage of the search on the head; by default `results`.

    Raises:
        FetchError: another pull is fetching it from there.
        StorageError: the head cannot be reached, or has no such experiment.
    """
    with ExitStack() as stack:
        try:
            config = yaml.safe_load(read_text(cluster))
            if not isinstance(config, dict) or "cluster_name" not in config:
                raise ValueError("it is no cluster file of `ray up`: it has no cluster_name")
            places = places_on_head(storage)
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"with it, SOURCE is an experiment's name, not {name!r}")
            copy = default_cache() / "pulled" / str(config["cluster_name"]) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            taken = f"another pull is fetching {name} from this cluster. Wait for it, then run the same command again"
            stack.enter_context(locked(copy.with_name(f".{name}.lock"), taken))
            own = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".yaml"))
            # rsync-down excludes what the cluster file excludes
            yaml.safe_dump(config | {"rsync_exclude": [*TRANSIENT, DATABASE], "rsync_filter": []}, own)
            own.flush()
            _find(own.name, places, name).fetch(copy, everything, console)
        except (OSError, ValueError, yaml.YAMLError, StorageError) as error:
            raise StorageError(f"--cluster {cluster}: {error}") from error
        yield Experiment(str(copy))
        shutil.rmtree(copy)


def places_on_head(storage: str | None) -> list[str]:
    """The folders on the head that a search's --storage may mean, quoted for a shell.

    A relative path is relative to the folder of the search. For a Ray job that is the home folder; otherwise it is
    usually the project's folder.

    Raises:
        ValueError: the storage is not on the head.
    """
    if storage and "://" in storage:
        raise ValueError(f"{storage} is not on the head; leave --cluster out to pull from there")
    if storage and storage.startswith("/"):
        return [shlex.quote(storage)]
    folder = shlex.quote(PurePosixPath((storage or "results").removeprefix("~/")).as_posix())
    return [f"~/{folder}"] if storage and storage.startswith("~/") else [f"~/{folder}", f"~/lungct_tune/{folder}"]


def _find(cluster: str, places: Sequence[str], name: str) -> _OnHead:
    """Finds the experiment of that name in the first folder that has one."""
    look = f"for kept in {' '.join(f'{place}/*/settings.yaml' for place in places)}; do echo found $kept; done"
    found = re.findall(r"^found (.+)/([^/*]+)/settings\.yaml\r*$", _ray("exec", cluster, look), re.MULTILINE)
    for folder, experiment in found:
        if experiment == name:
            return _OnHead(cluster, folder, name)
    names = sorted({experiment for _, experiment in found})
    there = f"there are: {', '.join(names)}" if names else "there are no experiments"
    raise StorageError(
        f"no experiment {name!r} on the head in {' or '.join(places)}; {there}. If the search was given a --storage, "
        "give it here too"
    )


def _ray(command: str, cluster: str, *arguments: str, meanwhile: Callable[[], None] = lambda: None) -> str:
    """Runs a command of Ray's launcher; returns its output, which may include a login shell's.

    Args:
        cluster: the cluster file.
        meanwhile: is called again and again until the command ends.

    Raises:
        StorageError: it failed; the message has the last lines of its output.
    """
    options = ("--log-style", "pretty", "--log-color", "false")
    words = [sys.executable, "-m", "ray.scripts.scripts", command, *options, cluster, *arguments]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,  # no pipe: ssh's master keeps it open for 10 s more
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
            meanwhile()
        log.seek(0)
        output = log.read()
    if process.returncode:
        lines = [line for line in output.splitlines() if line.strip() and "StrictHostKeyChecking" not in line]
        raise StorageError("\n".join([f"nothing was fetched from the head; `ray {command}` says", *lines[-3:]]))
    return output


@dataclass(frozen=True)
class _OnHead:
    """An experiment on the disk of a head."""

    cluster: str
    """The cluster file."""
    folder: str
    """The folder of the experiments."""
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
            else:  # settings.yaml shows that there is a search, though it has no bundle yet
                what = f"{SO_FAR}/" if any(path.startswith(f"{SO_FAR}/") for path in sizes) else "settings.yaml"
            wanted = {path: size for path, size in sizes.items() if path.startswith(what)}
            for old in copy.rglob("*"):
                if old.is_file() and str(old.relative_to(copy)) not in wanted:
                    old.unlink()
            copy.mkdir(parents=True, exist_ok=True)
            try:
                if everything and JOURNAL in sizes:  # first: the files that come later are of all trials ended in it
                    self._rsync(f"{self.name}/{JOURNAL}", f"{copy}/{JOURNAL}.first", sizes[JOURNAL], console)
                self._rsync(f"{self.name}/{what}", f"{copy}/{what}", sum(wanted.values()), console)
                break
            except StorageError:
                if attempt == ATTEMPTS:
                    raise
        if everything and JOURNAL in sizes:
            (copy / f"{JOURNAL}.first").replace(copy / JOURNAL)
        if everything and DATABASE in sizes:
            self._rsync(self._study_copy, f"{copy}/{DATABASE}", sizes[DATABASE], console)
            self._run(f"rm {self._study_copy}")

    def _list(self, copy_study: bool) -> dict[str, int]:
        """Lists the experiment's files with their sizes.

        Args:
            copy_study: first let SQLite copy an older search's study. Such a copy is consistent, even while the search
                writes. A journal only grows, so that rsync may copy it at any time.
        """
        study, copy = f"{self.name}/{DATABASE}", self._study_copy
        program = f'import sqlite3; sqlite3.connect("{study}").execute("VACUUM INTO ?", ["{copy}"])'
        copying = f"if test -f {study}; then rm -f {copy} && python3 -c '{program}' || exit 1; fi; "
        files = rf"cd {self.name} && find . -type f -printf 'found %s %P\n'"
        found = re.findall(r"^found (\d+) (.+?)\r*$", self._run((copying if copy_study else "") + files), re.MULTILINE)
        return {path: int(size) for size, path in found if not is_transient(path)}

    def _run(self, command: str) -> str:
        """Runs a command in the experiments' folder; returns its output."""
        return _ray("exec", self.cluster, f"cd {shlex.quote(self.folder)} && {{ {command}; }}")

    def _rsync(self, source: str, target: str, size: int, console: Console) -> None:
        with transfer_bar(console) as bar:
            task = bar.add_task(self.name, total=size)
            folder = Path(target).parent
            _ray(
                *("rsync-down", self.cluster, "--verbose", f"{self.folder}/{source}", target),
                meanwhile=lambda: bar.update(task, completed=_size(folder)),
            )


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # rsync renames finished files
            total += file.stat().st_size
    return total
