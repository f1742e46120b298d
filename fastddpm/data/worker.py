"""The program of a worker process, which decodes images of a pack into shared memory (`workers.py` starts it)."""

import mmap
import os
import struct
import warnings
from multiprocessing.connection import Connection

import numpy as np

from .image import BadImageError, Preprocessing, decode
from .pack.format import INDEX, read_record

TASK = struct.Struct("<III")  # to a worker: slot, first image, last image + 1
DONE = struct.Struct("<I")  # its answer: slot; if an image is damaged, PLACE and the reason as text follow
PLACE = struct.Struct("<I")  # an image's place in the slot


def views(memory: mmap.mmap, slots: int, rows: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the two arrays in the shared memory.

    First the records to decode, dtype `INDEX` (slots, rows), then the pixels, uint8 (slots, rows, C, H, W).
    """
    tasks = np.ndarray((slots, rows), INDEX, memory)
    return tasks, np.ndarray((slots, rows, *shape), np.uint8, memory, tasks.nbytes)


def num_bytes(slots: int, rows: int, shape: tuple[int, int, int]) -> int:
    """Return the bytes of shared memory that `views` needs."""
    return slots * rows * (INDEX.itemsize + int(np.prod(shape)))


def main(path: str, connection: int, memory: int, slots: int, rows: int, preprocessing: dict[str, object]) -> None:
    """Decode the images that `connection` asks for, until it is closed.

    `connection`, `memory`: inherited file descriptors. `preprocessing`: the fields of `Preprocessing`.
    """
    warnings.simplefilter("ignore")  # Pillow warns of large images; `decode` has a limit of its own
    file = os.open(path, os.O_RDONLY)
    decoded_by = Preprocessing(**preprocessing)  # type: ignore[arg-type]
    shared = mmap.mmap(memory, num_bytes(slots, rows, decoded_by.shape))
    tasks, pixels = views(shared, slots, rows, decoded_by.shape)
    with Connection(connection) as parent:
        while True:
            try:
                slot, first, end = TASK.unpack(parent.recv_bytes())
                parent.send_bytes(DONE.pack(slot) + _decode(file, tasks[slot], pixels[slot], first, end, decoded_by))
            except (EOFError, ConnectionError):  # the training process has ended
                return


def _decode(
    file: int, tasks: np.ndarray, pixels: np.ndarray, first: int, end: int, preprocessing: Preprocessing
) -> bytes:
    """Decode images first..end - 1 of a slot; return b"", or the place and reason of the first damaged one."""
    for place in range(first, end):
        try:
            pixels[place] = decode(read_record(file, tasks[place]), preprocessing)
        except (BadImageError, OSError) as error:
            return PLACE.pack(place) + str(error).encode()[:1000]
    return b""
