"""No input ends a command in a traceback or by a signal, fills the memory, or changes a file."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import resource
import signal
import tarfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from cases import SECRET, Case
from corpus import corpus

from lungct_tune.cli import COMMANDS

MOST_S, MOST_BYTES = 20, 2 * 10**9  # seconds of the CPU, since other tests may run beside
HANGS_S = 60
ARCHIVE = Path(__file__).parents[1] / "experiment" / "f89f17a.tar.xz"
CONTROLS = {chr(code) for code in range(32)} - set("\n\t\r") | {"\x7f", "\u202e"}


def snapshot(folder: Path) -> dict[str, str]:
    """All files below a folder; those that cannot be read by their kind."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and path.stat().st_size < 10**9 and not path.is_symlink()
        else str(path.lstat().st_mode)
        for path in folder.rglob("*")
        if path.name != ".lock"  # of a resumed search
    }


def out_of_time(*_: object) -> None:
    raise TimeoutError(f"no end after {HANGS_S} s")


def import_all() -> None:
    """Once a process: an alarm during an import would leave half a module."""
    for name in (*COMMANDS, "auditing.audit", "evaluation.external", "reporting.report_page", "tuning.cluster"):
        import_module(f"lungct_tune.{name}")


def run(number: int, storage: Path, here: Path) -> list[str]:
    """Runs a case in this process; returns its faults."""
    case = corpus()[number]
    here.mkdir()
    case.prepare(here, storage)
    before = snapshot(here)
    out, err = io.StringIO(), io.StringIO()
    os.chdir(here)
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(HANGS_S)
    faults = []
    begun, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status: object = None
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main = import_module(f"lungct_tune.{case.command}").main
            status = main([word.replace("HERE", str(here)) for word in case.arguments])
    except SystemExit as end:
        status = end.code
    except BaseException:
        faults.append(traceback.format_exc(limit=-3))
    finally:
        signal.alarm(0)
    said, told = out.getvalue() + err.getvalue(), err.getvalue()
    if 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) > MOST_BYTES:
        faults.append("much memory")
    if time.process_time() - begun > MOST_S:
        faults.append("much time")
    if status != 2 and not faults:
        faults.append(f"status {status}: {said[-300:]}")
    if "error:" not in told or case.says.replace("HERE", str(here)) not in told or "cannot be joined" in told:
        faults.append(f"does not name {case.says!r}: {told[-300:]}")
    if "Traceback" in said or SECRET in said or CONTROLS & set(said):
        faults.append(f"a traceback, a secret or a control character: {said[-300:]!r}")
    after = snapshot(here)
    if touched := [path for path, content in before.items() if after.get(path) != content]:
        faults.append(f"changed {touched}")
    return faults


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and an experiment of version 0.1, which is finished."""
    folder = tmp_path_factory.mktemp("given")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for file in folder.glob("results/*/settings.yaml"):
        settings = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump(settings | {"data": str(folder / "data")}, sort_keys=False))
    return folder


@pytest.mark.long
def test_hostile_inputs_end_in_a_sentence(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # an input that is accepted gets no further
    cases: list[Case] = corpus()
    before = snapshot(storage)
    faults: dict[str, list[str]] = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), import_all) as pool:
        results = [pool.submit(run, number, storage, tmp_path / str(number)) for number in range(len(cases))]
        for case, result in zip(cases, results, strict=True):
            try:
                if found := result.result():
                    faults[case.name] = found
            except Exception as error:  # the process died
                faults[case.name] = [repr(error)]
    with capsys.disabled():
        print(f"\n{len(cases)} hostile inputs, {len(faults)} faults")
    assert snapshot(storage) == before
    assert not faults, "\n".join(f"{name}: {' | '.join(found)}" for name, found in faults.items())
    assert len(cases) >= 300
