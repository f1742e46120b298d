"""The checksum of a data set, by which a run that is resumed knows its images."""

import hashlib
import struct

import numpy as np
import pytest
from helpers.image_folder import PLANES

from fastddpm.data import Dataset
from fastddpm.data import dataset as dataset_module
from fastddpm.data.dataset import checksum


def test_the_checksum_is_sha256_of_shape_pixels_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints remember it: it must be the same for an array in memory, a map, a view, and in every version."""
    pixels = b"".join(bytes([value]) for value in PLANES.ravel().tolist())
    labelled = hashlib.sha256(b"(30, 3, 8, 8)" + pixels + struct.pack("<30q", *range(30))).hexdigest()
    unlabelled = hashlib.sha256(b"(30, 3, 8, 8)" + pixels + b"no labels").hexdigest()
    for chunk_bytes in (1, 1000, 2**26):
        monkeypatch.setattr(dataset_module, "_CHUNK_BYTES", chunk_bytes)
        for images in (PLANES, np.ascontiguousarray(PLANES)):
            assert checksum(images, np.arange(30)) == labelled
            assert checksum(images, None) == unlabelled


def test_the_checksum_names_shape_pixels_and_labels() -> None:
    images, labels = PLANES.copy(), np.arange(30)
    base = checksum(images, labels)
    assert checksum(images, labels.astype(np.int32)) == base == Dataset.of(images, labels, "another name").checksum
    others = [
        checksum(images, None), checksum(images, labels + 1), checksum(images.reshape(30, 1, 24, 8), labels),
        checksum(images[:29], labels[:29]), checksum(images[::-1], labels), checksum(images[:, ::-1], labels),
    ]  # fmt: skip
    images[17, 1, 2, 3] ^= 1
    others.append(checksum(images, labels))
    assert len({base, *others}) == 1 + len(others)
