"""The images of a pack, decoded when they are asked for."""

import os
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fastddpm.errors import DataError

from .decode import BadImageError, Rule, decode

INDEX = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])


class PackedImages:
    """Like a uint8 array (N, C, S, S) to index, but decoded from `path` at every access.

    `index`: where each encoded image lies, dtype `INDEX` (N,). `rule`: what they are decoded by. An index may be a
    number, a slice or an array of numbers; DataError names an image that is damaged.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, index: np.ndarray, rule: Rule) -> None:
        self.path, self.index, self.rule = path, index, rule
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.rule.shape)

    @property
    def nbytes(self) -> int:
        """Of the decoded images."""
        return len(self.index) * int(np.prod(self.rule.shape))

    def __getitem__(self, key: Any) -> np.ndarray:
        rows = np.asarray(self.index[key])
        images = np.empty((rows.size, *self.rule.shape), np.uint8)
        for place, row in enumerate(rows.ravel()):
            try:
                images[place] = decode(read_record(self._descriptor, row), self.rule)
            except (BadImageError, OSError) as error:
                number = int(np.arange(len(self))[key].ravel()[place])
                raise DataError(damaged(self.path, number, error)) from error
        return images.reshape(*rows.shape, *self.rule.shape)

    def encoded(self, number: int) -> bytes:
        """An image as it is stored; BadImageError if it is not what was written."""
        return read_record(self._descriptor, self.index[number])


def read_record(descriptor: int, row: Any) -> bytes:
    """The encoded image that a row of the index names; BadImageError if it is not what was written."""
    data = os.pread(descriptor, int(row["length"]), int(row["offset"]))
    if len(data) != row["length"] or zlib.crc32(data) != row["crc32"]:
        raise BadImageError("its checksum differs from what was written")
    return data


def damaged(path: Path, number: int, reason: object) -> str:
    """What to say about an image of a pack that cannot be decoded."""
    return f"{path}: image {number}: {reason}; python -m fastddpm.data verify {path} lists all that is damaged"
