"""Counts how many searches have evaluated their model on the same test split.

A test split tells how accurate a model is only as long as no choice was made with it. Whoever searches again after the
test figures are known, and keeps the better of two searches, has chosen with them (Dwork et al., Science 2015). So each
finished search leaves a mark on its storage, and the report says how many there are.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from lungct_tune.data.split import DataSplit
from lungct_tune.experiment.folder import Experiment

FOLDER = "test-looks"
"""Beside the experiments on a storage: a folder for each test split, with an empty file for each finished search."""


def count_look(experiment: Experiment, split: DataSplit, began: datetime | None) -> int:
    """Notes that a search evaluates its final model on its test split.

    Args:
        began: when its first trial did. A later search of the same name, in place of a deleted one, is another search.

    Returns:
        How many searches on this storage have done so with the same test images, this one included.

    Raises:
        StorageError: the storage refuses.
    """
    digests = sorted(split.images.table["digest"].to_numpy()[split.test_rows])
    fingerprint = hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]
    looks = Experiment(f"{experiment.uri.rpartition('/')[0]}/{FOLDER}")
    looks.write(f"{fingerprint}/{experiment.name}{f'-{began:%Y%m%dT%H%M%S}' if began else ''}", b"")
    return len(looks.files(fingerprint))
