"""Images to complete, and what of them is missing, as files hold them. Imports no torch."""

import math
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from fastddpm.errors import DataError, UsageError

from . import open_dataset
from .dataset import Images
from .image import BadImageError, Preprocessing, decode
from .readers.source import is_image

DIGITS = "digits"
_WHITE = 128  # and above
_MAX_BYTES = 2**32  # of pixels in an .npz, all of which are unpacked


def read_images(source: str, preprocessing: Preprocessing) -> tuple[Images, np.ndarray | None]:
    """Images, uint8 (N, C, S, S), and their labels, int64 (N,), or None.

    `source`: `DIGITS` (a folder of that name is "./digits"), an image file, an .npz that holds `images` (and `labels`)
    as they are returned, or what `open_dataset` takes. Raises `UsageError` and `DataError` as that does.
    """
    path = Path(source)
    if source != DIGITS and path.is_file() and path.suffix.lower() == ".npz":
        return _read_arrays(path, preprocessing)
    if source != DIGITS and path.is_file() and is_image(PurePosixPath(path.name)):
        return _decoded(path, preprocessing)[None], None
    dataset = open_dataset(
        None if source == DIGITS else source,
        image_size=preprocessing.image_size,
        channels=preprocessing.channels,
        resize=preprocessing.resize,
    )
    return dataset.images, dataset.labels


def read_hole(mask: str, preprocessing: Preprocessing) -> np.ndarray:
    """What is to be drawn, bool (S, S): a place by its name, or the white part of an image file.

    A file of another size is treated as an image would be. Raises `UsageError` for what is neither, `DataError` for a
    file that cannot be read.
    """
    size = preprocessing.image_size
    half, quarter = size // 2, size // 4
    places: dict[str, tuple[slice, slice]] = {
        "left-half": np.s_[:, :half],
        "right-half": np.s_[:, half:],
        "top-half": np.s_[:half, :],
        "bottom-half": np.s_[half:, :],
        "center": np.s_[quarter : size - quarter, quarter : size - quarter],
        "every-other-row": np.s_[::2, :],
    }
    if mask in places:
        hole = np.zeros((size, size), dtype=bool)
        hole[places[mask]] = True
        return hole
    if not Path(mask).is_file():
        raise UsageError(f"--mask takes {', '.join(places)}, or an image file; got {mask!r}")
    return _decoded(Path(mask), Preprocessing(size, 1, preprocessing.resize))[0] >= _WHITE


def _decoded(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    try:
        return decode(path.read_bytes(), preprocessing)
    except (BadImageError, OSError) as error:
        raise DataError(f"{path}: {error}") from error


def _read_arrays(path: Path, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            shape, dtype = _header(archive, "images.npy")
            num_labels = _header(archive, "labels.npy") if "labels.npy" in archive.namelist() else None
        _check_arrays(path, shape, dtype, num_labels, preprocessing)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["images"], None if num_labels is None else arrays["labels"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no images that can be read: {error}") from error


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, before any of it is unpacked."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def _check_arrays(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    labels: tuple[tuple[int, ...], np.dtype] | None,
    preprocessing: Preprocessing,
) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[1:] != preprocessing.shape:
        wanted = ", ".join(map(str, preprocessing.shape))
        raise DataError(f"{path} must hold images uint8 (N, {wanted}); got {dtype} {shape}")
    if not 0 < math.prod(shape) <= _MAX_BYTES:
        raise DataError(
            f"{path} holds {shape[0]:,} images; 1 to {_MAX_BYTES // math.prod(preprocessing.shape):,} are read"
        )
    if labels is not None and (labels[0] != shape[:1] or labels[1].kind not in "iu"):
        raise DataError(f"{path} must hold labels of integers ({shape[0]},); got {labels[1]} {labels[0]}")
