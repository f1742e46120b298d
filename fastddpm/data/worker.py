"""A process that decodes images of a pack into memory it shares with the training process (`workers.py`)."""

import mmap
import os
import struct
import warnings
from multiprocessing.connection import Connection

import numpy as np

from .image import BadImageError, Preprocessing, decode
from .pack.format import INDEX, read_record

TASK = struct.Struct("<III")  # slot, first and last + 1 of the images to decode in it
DONE = struct.Struct("<I")  # slot; then, if an image is damaged, its place in the slot and the reason as text
PLACE = struct.Struct("<I")


def views(memory: mmap.mmap, slots: int, rows: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The shared memory: what to decode, dtype `INDEX` (slots, rows), and the pixels uint8 (slots, rows, C, H, W)."""
    tasks = np.ndarray((slots, rows), INDEX, memory)
    return tasks, np.ndarray((slots, rows, *shape), np.uint8, memory, tasks.nbytes)


def num_bytes(slots: int, rows: int, shape: tuple[int, int, int]) -> int:
    """How much memory `views` takes."""
    return slots * rows * (INDEX.itemsize + int(np.prod(shape)))


def main(path: str, connection: int, memory: int, slots: int, rows: int, preprocessing: dict[str, object]) -> None:
    """Decode what `connection` asks for until it is closed. `connection`, `memory`: file descriptors to inherit."""
    warnings.simplefilter("ignore")  # `decode` has limits of its own
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
    """Nothing, or the place and the reason of the first image that is damaged."""
    for place in range(first, end):
        try:
            pixels[place] = decode(read_record(file, tasks[place]), preprocessing)
        except (BadImageError, OSError) as error:
            return PLACE.pack(place) + str(error).encode()[:1000]
    return b""
