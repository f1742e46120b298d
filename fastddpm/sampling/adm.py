"""Arrays as the evaluators of ADM and of other tools for FID read them: arr_0, uint8 (N, H, W, 3)."""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fastddpm.storage.files import write_whole

FILE = "adm.npz"


def write_adm(images: Iterable[np.ndarray], num: int, labels: Sequence[int] | None, path: Path) -> None:
    """Write `num` images, uint8 (n, C, H, W) in parts, as arr_0, uint8 (num, H, W, 3); grey is repeated three times.

    `labels`, if any, are arr_1, int64 (num,). One part is in memory at a time. Raises `StorageError` if the file cannot
    be written.
    """

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                written = 0
                for part in images:
                    pixels = np.ascontiguousarray(part.transpose(0, 2, 3, 1))
                    pixels = pixels.repeat(3, axis=3) if pixels.shape[3] == 1 else pixels
                    if not written:
                        header = {"descr": "|u1", "fortran_order": False, "shape": (num, *pixels.shape[1:])}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(pixels.tobytes())
                    written += len(pixels)
            assert written == num
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64), allow_pickle=False)

    write_whole(path, write)
