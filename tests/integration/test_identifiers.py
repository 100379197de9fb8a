"""No identifier of a patient is in anything that a search, an audit, an evaluation or a prediction writes."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import SMALL
from dicom_files import PATIENT_ID, PLANTED, UID_ROOT, as_dicom, write_slice
from processes import searching

from lungct_tune.data import make_phantoms

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("cluster")]

NUMBERS = [f"{PATIENT_ID}phantom-{n:03d}" for n in range(24)]
NAMES = [part for value in PLANTED.values() for part in value.split("^")] + [PATIENT_ID, UID_ROOT]
HASHES = [hashlib.new(how, number.encode()).hexdigest()[:12] for how in ("md5", "sha1", "sha256") for number in NUMBERS]


def contents(file: Path) -> Iterator[bytes]:
    """The bytes of a file, also as they are before they are compressed."""
    content = file.read_bytes()
    yield content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield from map(archive.read, archive.namelist())
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)
    if file.suffix == ".parquet":
        yield pd.read_parquet(file).to_csv().encode()


def named(text: bytes) -> list[str]:
    """What of the identifiers is in it, in any case, also as UTF-16."""
    lower = text.lower()
    spelled = {name: (name.lower().encode(), name.lower().encode("utf-16-le")) for name in NAMES + HASHES}
    return [name for name, forms in spelled.items() if any(form in lower for form in forms)]


def found_in(folder: Path) -> dict[str, list[str]]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    found = {str(path): sorted({name for content in contents(path) for name in named(content)}) for path in files}
    return {path: names for path, names in found.items() if names}


def test_planted_identifiers_are_in_nothing_that_is_written(tmp_path: Path, space: Path, cluster: None) -> None:
    data = as_dicom(make_phantoms(tmp_path / "drawn", seed=1, patients=24, size=48), tmp_path / "data")
    grey_HW = np.zeros((32, 32), np.uint8)
    tags = {"PatientID": NUMBERS[0]}
    write_slice(data / "train/normal/scout", grey_HW, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **tags)
    write_slice(data / "train/normal/frames", grey_HW, NumberOfFrames=3, **tags)
    write_slice(data / "train/normal/broken", grey_HW, PhotometricInterpretation="ACC-PLANTED-1", **tags)
    whole = next((data / "train/normal").glob("*"))
    (data / "train/normal/cut").write_bytes(whole.read_bytes()[:-500])
    assert set(NAMES) <= set(named(whole.read_bytes()))  # they would be found

    written, storage = tmp_path / "written", tmp_path / "written/storage"
    written.mkdir()
    environment = os.environ | {"XDG_CACHE_HOME": str(written / "cache")}
    said = []

    def run(command: str, *words: object) -> None:
        done = subprocess.run(
            [sys.executable, "-m", f"lungct_tune.{command}", *map(str, words)],
            env=environment,
            cwd=written,
            capture_output=True,
            text=True,
        )
        said.append(done.stdout + done.stderr)
        assert done.returncode in (0, 1), said[-1]

    what = ["--data", str(data), "--window", "lung", "--skip-unreadable"]
    how = ["--space", str(space), "--trials", "3", "--epochs", "2", "--storage", str(storage), "--name", "one"]
    with searching(*what, *how, *SMALL, environment=environment, folder=written) as search:
        said.append(search.communicate(timeout=600)[0])
    assert search.returncode == 0, said[-1]
    assert "DICOM localisers: 1" in said[-1] and "frames: has several frames" in said[-1]
    best = storage / "one/best"
    run("audit", *what, "--html", "audit.html", "--json", "audit.json", "--image-size", 32)
    assert "groups come from the PatientIDs of" in said[-1]
    run("report", storage / "one", "--out", "report.html")
    run("predict", best, data, "--out", "predictions.parquet", "--heatmaps", "maps")
    run("predict", best, data, "--by", "patient", "--out", "patients.csv")
    series = pd.DataFrame(
        [
            (str(pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID), path.parent.name.split("_")[0])
            for path in sorted((data / "test").rglob("*"))
            if path.is_file()
        ],
        columns=["SeriesInstanceUID", "class"],
    ).drop_duplicates()
    series.to_csv(tmp_path / "table.csv", index=False)
    run("evaluate", best, "--data", data, "--table", tmp_path / "table.csv", "--skip-unreadable", "--out", "judged")
    (tmp_path / "table.csv").write_text(f"SeriesInstanceUID,class\n{UID_ROOT}1,normal\n{UID_ROOT}2,x\n")
    wrong = subprocess.run(
        [sys.executable, "-m", "lungct_tune.audit", "--data", data, "--table", tmp_path / "table.csv"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2 and "no file of this series" in wrong.stderr
    said.append(wrong.stdout + wrong.stderr)

    assert (written / "patients.csv").is_file() and (best / "model.safetensors").is_file()
    assert len(pd.read_csv(written / "patients.csv")) == 24
    assert found_in(written) == {}
    assert [names for text in said if (names := named(text.encode()))] == []
    logs = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray/session_latest/logs").resolve()
    assert logs.is_dir() and found_in(logs) == {}
