"""Slices written as DICOM, with identifiers in the tags; read with their window they have the very grey values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from lungct_tune.config.window import WINDOWS, Window

PLANTED = {
    "PatientName": "Zzyzxova^Quirina",
    "PatientBirthDate": "19310417",
    "PatientAddress": "Plantedstrasse 7",
    "OtherPatientIDs": "OTHER-PLANTED-ID",
    "AccessionNumber": "ACC-PLANTED-1",
    "StudyID": "STUDY-PLANTED",
    "ReferringPhysicianName": "Referrerplanted^Docplanted",
    "OperatorsName": "Operatorplanted^Opalplanted",
    "InstitutionName": "Hospital of Planted",
    "StationName": "STATIONPLANTED",
    "PatientComments": "commentplanted",
    "StudyDescription": "studyplanted",
    "SeriesDescription": "seriesplanted",
}
"""Values that must be in nothing that is written. A PatientID and the UIDs begin like these."""

PATIENT_ID, UID_ROOT = "PID-PLANTED-", "1.2.826.0.1.3680043.8.498.7777777."


def write_slice(
    path: Path,
    grey_HW: np.ndarray,
    *,
    window: Window | None = WINDOWS["lung"],
    signed: bool = False,
    bits: int = 12,
    slope: float = 1,
    intercept: float = -1400,
    syntax: str = ExplicitVRLittleEndian,
    without: tuple[str, ...] = (),
    **tags: Any,
) -> Path:
    """Writes an image; read with this window, it has these grey values.

    Args:
        grey_HW: uint8.
        window: is also written into the file; None stores the grey values themselves.
        without: elements to leave out.
        tags: other elements.
    """
    dataset = Dataset()
    dataset.SOPClassUID, dataset.Modality, dataset.ImageType = CTImageStorage, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(dataset, name, generate_uid(UID_ROOT))
    for name, value in PLANTED.items():
        setattr(dataset, name, value)
    dataset.Rows, dataset.Columns = grey_HW.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, tags.get("PhotometricInterpretation", "MONOCHROME2")
    shown_HW = 255.0 - grey_HW if dataset.PhotometricInterpretation == "MONOCHROME1" else grey_HW.astype(float)
    if window is not None:
        lowest = window.center - 0.5 - (window.width - 1) / 2  # DICOM PS3.3 C.11.2.1.2.1
        stored_HW = np.round((lowest + shown_HW * (window.width - 1) / 255 - intercept) / slope)
        dataset.WindowCenter, dataset.WindowWidth = window
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    else:
        stored_HW = shown_HW
    dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = int(signed), bits, bits - 1
    dataset.BitsAllocated = 8 if bits <= 8 else 16
    kind = np.dtype(f"{'i' if signed else 'u'}{dataset.BitsAllocated // 8}")
    dataset.PixelData = stored_HW.astype(kind).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    for name in without:
        delattr(dataset, name)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    encapsulated = pydicom.uid.UID(syntax).is_encapsulated
    if encapsulated:
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == pydicom.uid.ExplicitVRBigEndian:
            dataset["PixelData"].VR = "OW"
            dataset.PixelData = stored_HW.astype(kind.newbyteorder(">")).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def as_dicom(png: Path, root: Path) -> Path:
    """Writes a data set of PNGs with a groups.csv as DICOM: the group of an image becomes its PatientID and series."""
    import csv

    from PIL import Image

    with (png / "groups.csv").open() as file:
        rows = list(csv.DictReader(file))
    series = {row["group"]: generate_uid(UID_ROOT) for row in rows}
    for number, row in enumerate(rows):
        write_slice(
            (root / row["path"]).with_suffix(""),
            np.asarray(Image.open(png / row["path"]).convert("L")),
            PatientID=PATIENT_ID + row["group"],
            SeriesInstanceUID=series[row["group"]],
            **WAYS[number % len(WAYS)],
        )
    return root


WAYS: list[dict[str, Any]] = [
    {},
    {"slope": 0.5, "intercept": -1350},
    {"slope": 2.0},
    {"signed": True, "bits": 16, "intercept": 0},
    {"PhotometricInterpretation": "MONOCHROME1"},
    {"PhotometricInterpretation": "MONOCHROME1", "signed": True, "bits": 16, "intercept": -1024},
    {"syntax": pydicom.uid.RLELossless},
    {"syntax": pydicom.uid.JPEG2000Lossless},
    {"syntax": pydicom.uid.JPEG2000Lossless, "signed": True, "bits": 16, "intercept": 0},
    {"syntax": pydicom.uid.ImplicitVRLittleEndian},
    {"syntax": pydicom.uid.ExplicitVRBigEndian},
    {"syntax": pydicom.uid.DeflatedExplicitVRLittleEndian},
    {"window": WINDOWS["mediastinum"]},
    {"window": None, "bits": 8},
]
"""Ways to store a slice that must all give the same grey values."""
