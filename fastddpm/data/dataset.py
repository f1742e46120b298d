"""What training reads: uint8 images, labels, and a checksum that names them."""

import hashlib
from dataclasses import dataclass

import numpy as np

_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Dataset:
    """Decoded images. `images`: uint8 (N, C, H, W), perhaps a read-only memory map. `labels`: int64 (N,) or None.

    `name` is for people; `checksum` is the sha256 over shape, pixels and labels that a checkpoint remembers.
    """

    images: np.ndarray
    labels: np.ndarray | None
    name: str
    checksum: str

    @staticmethod
    def of(images: np.ndarray, labels: np.ndarray | None, name: str) -> "Dataset":
        """A data set with its checksum computed."""
        return Dataset(images, labels, name, checksum(images, labels))


def checksum(images: np.ndarray, labels: np.ndarray | None) -> str:
    """sha256 over the shape, the pixels in C order and the labels, hexadecimal."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    rows = max(1, _CHUNK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, len(images), rows):
        digest.update(np.ascontiguousarray(images[start : start + rows]).data)
    digest.update(b"no labels" if labels is None else np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()
