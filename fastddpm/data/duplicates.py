"""Which images of a very long row are equal, in memory that does not grow with it."""

import tempfile
from collections.abc import Iterator
from hashlib import blake2b
from types import TracebackType

import numpy as np
from PIL import Image

from fastddpm.errors import StorageError

_ROW = np.dtype([("number", "<u8"), ("high", "<u8"), ("low", "<u8")])
_DIGEST_BYTES = 16
_AT_ONCE = 2**20  # digests sorted at a time, about 100 MB with what sorting takes
_BLOCK = 2**16


def digest(image: Image.Image) -> bytes:
    """128 bits that name an image by its size and its pixels as RGB."""
    pixels = image.convert("RGB").tobytes()
    return blake2b(pixels, digest_size=_DIGEST_BYTES, salt=b"%dx%d" % image.size).digest()


class Duplicates:
    """Digests of images as they come, kept in a file without a name: 24 bytes for each."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._count = 0

    def __enter__(self) -> "Duplicates":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def add(self, number: int, digest: bytes) -> None:
        """An image and its digest; StorageError when there is no room for temporary files."""
        try:
            self._file.write(number.to_bytes(8, "little") + digest)
        except OSError as error:
            raise StorageError(f"cannot write a temporary file in {tempfile.gettempdir()}: {error.strerror}") from error
        self._count += 1

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(first, later) for each image that equals an earlier one: the numbers of the first of its kind, and its own.

        The file is read once for each 2^20 images; digests are evenly spread, so each time takes about as many.
        """
        parts = -(-self._count // _AT_ONCE)
        for part in range(parts):
            rows = self._within(part, parts)
            rows = rows[np.lexsort((rows["number"], rows["low"], rows["high"]))]
            new = np.append(True, (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1]))
            first = np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))
            yield from zip(rows["number"][first[~new]].tolist(), rows["number"][~new].tolist(), strict=True)

    def _within(self, part: int, parts: int) -> np.ndarray:
        """The rows whose digests lie in a part of all possible ones."""
        self._file.seek(0)
        chosen = [np.empty(0, _ROW)]
        while data := self._file.read(_BLOCK * _ROW.itemsize):
            rows = np.frombuffer(data, _ROW)
            chosen.append(rows[(rows["high"] >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32) == part])
        return np.concatenate(chosen)
