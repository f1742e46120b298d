"""The data set that training reads: uint8 images, labels, and a checksum that identifies them."""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

_CHUNK_BYTES = 64 * 2**20
_MAX_NUMBERED = 65_536


class Images(Protocol):
    """Images uint8 (N, C, H, W): an array, a memory map, or `PackedImages`, which decodes when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with labels, a name and a checksum.

    `images`: uint8 (N, C, H, W), an array, a read-only memory map, or decoded when indexed. `labels`: int64 (N,) or
    None. `name`: shown to people. `checksum`: sha256 over shape, pixels and labels, stored in checkpoints. `classes`:
    the names of the classes, in the order of their labels; None without labels.
    """

    images: Images
    labels: np.ndarray | None
    name: str
    checksum: str
    classes: tuple[str, ...] | None = None

    @staticmethod
    def of(images: Images, labels: np.ndarray | None, name: str, classes: tuple[str, ...] | None = None) -> "Dataset":
        """Return a data set, computing its checksum."""
        return Dataset(images, labels, name, checksum(images, labels), classes)


def class_names(labels: np.ndarray | None, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the names of the classes, None without labels.

    Labels without names, or beyond the names, are named by their numbers. With numbers of 65,536 and more the result is
    None, because they are no classes.
    """
    if labels is None:
        return None
    count = int(labels.max()) + 1
    if count > _MAX_NUMBERED:
        return None
    names = names or ()
    return names + tuple(map(str, range(len(names), count)))


class Checksum:
    """The sha256, hexadecimal, over shape, pixels in C order and labels, of images that are added part by part."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._digest = hashlib.sha256(repr(shape).encode())

    def add(self, images: np.ndarray) -> None:
        """Add the next images, uint8 (n, C, H, W), or one image (C, H, W)."""
        self._digest.update(np.ascontiguousarray(images).data)

    def result(self, labels: np.ndarray | None) -> str:
        """Return the checksum, after all images were added."""
        self._digest.update(b"no labels" if labels is None else np.ascontiguousarray(labels, dtype="<i8").data)
        return self._digest.hexdigest()


def checksum(images: Images, labels: np.ndarray | None) -> str:
    """Return the checksum of all images and their labels, reading 64 MiB of images at a time."""
    whole = Checksum(tuple(images.shape))
    rows = max(1, _CHUNK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, len(images), rows):
        whole.add(images[start : start + rows])
    return whole.result(labels)
