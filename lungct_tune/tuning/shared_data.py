"""Shares images and pretrained weights with the workers: once for each node, in shared memory or a mapped file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from lungct_tune.filesystem import StorageError

if TYPE_CHECKING:
    import torch

    from lungct_tune.config.hyperparameters import Hyperparameters
    from lungct_tune.config.settings import Settings
    from lungct_tune.data import ImageSet
    from lungct_tune.training.trainer import Trainer


@dataclass(frozen=True)
class SharedDataset:
    """Images, labels and pretrained weights for a group of workers. Pickling it copies only references.

    It has only some of the images. That of a search's slots has those of train and validation, so no slot can read a
    test image. Images are always identified by their rows in the whole data set.
    """

    images: ray.ObjectRef[np.ndarray] | Path | np.ndarray
    """uint8 NHW: in the object store, or if they are too large for it in a .npy file that every node can open."""
    rows: np.ndarray
    """The rows of the images that are here, ascending."""
    labels_N: np.ndarray
    """The labels of these images."""
    classes: int
    backbone: ray.ObjectRef[dict[str, torch.Tensor]] | None
    normalisation: str
    batch_size: int
    epochs: int
    """The length of the learning-rate schedule."""

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """The positions of these rows of the data set among the images that are here.

        Raises:
            ValueError: one of the rows is not here.
        """
        positions = np.searchsorted(self.rows, rows)
        if len(rows) and (positions.max() == len(self.rows) or (self.rows[positions] != rows).any()):
            raise ValueError("asked for an image that was not shared with these workers")
        return positions

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.labels_N[self.positions(rows)])

    def trainer(
        self,
        hyperparameters: Hyperparameters,
        train_rows: np.ndarray,
        seed: int,
        device: torch.device,
        alone: bool = False,
    ) -> Trainer:
        """A training of these hyperparameters on these rows, by all workers of a group together or by one `alone`."""
        import torch

        from lungct_tune.training.trainer import Trainer

        return Trainer(
            hyperparameters,
            images_NHW=self.images_on(device),
            labels_N=torch.from_numpy(self.labels_N),
            train_indices=torch.from_numpy(self.positions(train_rows)),
            classes=self.classes,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
            normalisation=self.normalisation,
            backbone_state=self._backbone,
            device=device,
            alone=alone,
        )

    def images_on(self, device: torch.device) -> torch.Tensor:
        """The images on the device if they need at most a quarter of its memory; else on the CPU, moved by batch."""
        import torch

        if device not in self._tensors:  # decided once: later, the images themselves take some of the free memory
            fits = device.type != "cuda" or self._array.nbytes <= torch.cuda.mem_get_info(device)[0] / 4
            place = device if fits and not isinstance(self.images, Path) else torch.device("cpu")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # read-only memory, and nobody writes to it
                self._tensors[device] = torch.from_numpy(self._array).to(place)
        return self._tensors[device]

    @cached_property
    def _tensors(self) -> dict[torch.device, torch.Tensor]:
        return {}

    @cached_property
    def _array(self) -> np.ndarray:
        if isinstance(self.images, Path):
            return np.asarray(np.load(self.images, mmap_mode="r"))
        return self.images if isinstance(self.images, np.ndarray) else ray.get(self.images)

    @cached_property
    def _backbone(self) -> Any:
        return None if self.backbone is None else ray.get(self.backbone)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


def share_dataset(
    settings: Settings,
    images: ImageSet,
    rows: np.ndarray,
    backbone: ray.ObjectRef[dict[str, torch.Tensor]] | None,
    path: Path | None = None,
    besides: SharedDataset | None = None,
) -> SharedDataset:
    """Shares some of the images with the workers.

    Args:
        rows: the rows of these images; the workers get no others.
        backbone: pretrained weights.
        path: see `share_images`.
        besides: other images that have been shared already.

    Raises:
        StorageError: see `share_images`.
    """
    assert settings.epochs is not None and settings.batch_size is not None  # decided by for_data()
    in_store = besides is not None and not isinstance(besides.images, Path)
    taken = len(besides.rows) * images.images_NHW[0].nbytes if besides is not None and in_store else 0
    return SharedDataset(
        images=share_images(images.images_NHW, rows, path, object_store_room() - taken),
        rows=rows,
        labels_N=images.table["label"].to_numpy()[rows],
        classes=len(images.classes),
        backbone=backbone,
        normalisation=settings.normalisation,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
    )


def share_images(
    images_NHW: np.ndarray, rows: np.ndarray, path: Path | None, room: int
) -> ray.ObjectRef[np.ndarray] | Path:
    """Puts some of the images into the object store, or if they do not fit into a file that the workers map.

    Args:
        images_NHW: uint8, may be memory-mapped and larger than memory.
        rows: the rows of these images; the workers get no others.
        path: the file (.npy), in a folder that every node can open; None if there is no such folder.
        room: how many bytes of the object store they may use.

    Raises:
        StorageError: they do not fit, and `path` is None.
    """
    if len(rows) * images_NHW[0].nbytes <= room:
        return ray.put(images_NHW[rows])
    if path is None:
        raise StorageError(
            f"{len(rows)} images need {len(rows) * images_NHW[0].nbytes / 2**30:.1f} GiB. They may use "
            f"{room / 2**30:.1f} GiB of the smallest node's object store, and the nodes have no common folder to map "
            "them from. Give --storage on a shared file system, a smaller --image-size, or nodes with more memory"
        )
    shape = (len(rows), *images_NHW.shape[1:])
    shared = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    for start in range(0, len(rows), 1024):
        shared[start : start + 1024] = images_NHW[rows[start : start + 1024]]
    shared.flush()
    return path


def object_store_room() -> int:
    """Half of the smallest node's object store, in bytes. The other half is for the other objects."""
    stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    return int(min(stores) / 2)
