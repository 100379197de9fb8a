"""The deployment that has the model: it reads images and classifies them, as `predict` does."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd
import ray
from PIL import Image
from ray import serve

from lungct_tune.data.cache import decoding_threads
from lungct_tune.data.inputs import ReadImage, Unreadable
from lungct_tune.evaluation.classifier import BATCH, Classifier
from lungct_tune.reporting.heat_maps import PIXELS, overlay
from lungct_tune.reporting.html import data_uri

QUALITY = 90
"""Of the pictures, WebP."""


@dataclass(frozen=True)
class Upload:
    """A file of a request."""

    name: str
    content: bytes
    pictures: bool
    """Whether the answer has the pictures of `Model`."""


class Model:
    """A replica. It classifies one upload for each call, and those that wait together.

    The answer is the row of `Classifier.classify_files` as a dict, with None for missing values, and if pictures are
    asked for, `picture` (what the network sees) and `heat_map` (see `lungct_tune.reporting.heat_maps`) as data URIs.

    Args:
        classifier: in Ray's object store, once for all replicas.
        device: as torch names it.
    """

    def __init__(self, classifier: ray.ObjectRef[Classifier], device: str) -> None:
        self._classifier = replace(ray.get(classifier), device=device)
        size = self._classifier.image_size
        self._classifier.classify(np.zeros((1, size, size), np.uint8))  # the first image takes longer than others
        self._readers = ThreadPoolExecutor(decoding_threads(), "read")

    async def __call__(self, upload: Upload) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        file = await loop.run_in_executor(self._readers, read_upload, upload, self._classifier)
        answer: dict[str, Any] = await self._classify_together((upload, file))
        return answer

    # without a wait: what arrives while a batch is computed is the next batch
    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def _classify_together(self, files: list[tuple[Upload, ReadImage | Unreadable]]) -> list[dict[str, Any]]:
        return await asyncio.to_thread(answers, self._classifier, files)


def read_upload(upload: Upload, classifier: Classifier) -> ReadImage | Unreadable:
    """Reads an upload as `Classifier.read` reads a file. The end of its name is kept, if it is a usual one."""
    suffix = PurePath(upload.name).suffix
    with tempfile.NamedTemporaryFile(suffix=suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,8}", suffix) else "") as copy:
        copy.write(upload.content)
        copy.flush()
        return classifier.read(copy.name)


def answers(classifier: Classifier, files: Sequence[tuple[Upload, ReadImage | Unreadable]]) -> list[dict[str, Any]]:
    """The answer for each file, see `Model`."""
    rows = classifier.tabulate([upload.name for upload, _ in files], [file for _, file in files])
    answered: list[dict[Any, Any]] = rows.astype(object).where(rows.notna(), None).to_dict("records")
    drawn = [i for i, (upload, file) in enumerate(files) if upload.pictures and isinstance(file, ReadImage)]
    if not drawn:
        return answered
    images_NHW = classifier.stack([files[i][1] for i in drawn])
    maps_Nhw: Sequence[np.ndarray | None] = [None] * len(drawn)
    if classifier.features is not None:  # else there is no scale
        classes_N = pd.Index(classifier.classes).get_indexer(pd.Index(rows["class"].iloc[drawn]))
        maps_Nhw = list(classifier.heat_maps(images_NHW, classes_N))
    for i, image_HW, map_hw in zip(drawn, images_NHW, maps_Nhw, strict=True):
        picture = Image.fromarray(image_HW).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
        answered[i]["picture"] = data_uri(picture, QUALITY)
        answered[i]["heat_map"] = None if map_hw is None else data_uri(overlay(image_HW, map_hw), QUALITY)
    return answered
