"""What training reads: uint8 images, labels, and a checksum that names them."""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

_CHUNK_BYTES = 64 * 2**20


class Images(Protocol):
    """uint8 (N, C, H, W): an array, a memory map, or what decodes images when it is indexed (`PackedImages`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images uint8 (N, C, H, W), perhaps a read-only memory map, perhaps decoded when indexed. `labels`: int64 (N,) or
    None.

    `name` is for people; `checksum` is the sha256 over shape, pixels and labels that a checkpoint remembers.
    """

    images: Images
    labels: np.ndarray | None
    name: str
    checksum: str

    @staticmethod
    def of(images: Images, labels: np.ndarray | None, name: str) -> "Dataset":
        """A data set with its checksum computed."""
        return Dataset(images, labels, name, checksum(images, labels))


class Checksum:
    """sha256 over the shape, the pixels in C order and the labels, hexadecimal; the images come in parts."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._digest = hashlib.sha256(repr(shape).encode())

    def add(self, images: np.ndarray) -> None:
        """The next images, uint8 (n, C, H, W), or one, (C, H, W)."""
        self._digest.update(np.ascontiguousarray(images).data)

    def result(self, labels: np.ndarray | None) -> str:
        """The checksum, once all images are in."""
        self._digest.update(b"no labels" if labels is None else np.ascontiguousarray(labels, dtype="<i8").data)
        return self._digest.hexdigest()


def checksum(images: Images, labels: np.ndarray | None) -> str:
    """The checksum of all images and their labels."""
    whole = Checksum(tuple(images.shape))
    rows = max(1, _CHUNK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, len(images), rows):
        whole.add(images[start : start + rows])
    return whole.result(labels)
