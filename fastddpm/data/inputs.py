"""Read the images and masks that commands take as input files. Imports no torch."""

import math
from pathlib import Path, PurePosixPath

import numpy as np

from fastddpm.errors import DataError, UsageError
from fastddpm.storage.reading import read_arrays, read_headers

from . import open_dataset
from .dataset import Images
from .image import BadImageError, Preprocessing, decode
from .readers.source import is_image, read_file

DIGITS = "digits"
_WHITE = 128  # a mask's pixels of this level and above are white
_MAX_BYTES = 2**32  # pixels of an .npz, which are all unpacked into memory


def read_images(source: str, preprocessing: Preprocessing) -> tuple[Images, np.ndarray | None]:
    """Read images, uint8 (N, C, H, W), and their labels, int64 (N,) or None.

    `source`: "digits" for the embedded digits (a folder of that name is "./digits"), an image file, an .npz with
    arrays `images` (and `labels`) as returned here, or any source of `open_dataset`. Raises `UsageError` and
    `DataError` as `open_dataset` does.
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
        background=preprocessing.background,
    )
    return dataset.images, dataset.labels


def read_hole(mask: str, preprocessing: Preprocessing) -> np.ndarray:
    """Read the pixels to inpaint, bool (H, W): a named region, or the white part (128 and above) of an image file.

    A mask of another size is resized or refused by `preprocessing`, as images are. Raises `UsageError` if `mask` is
    neither a region nor a file, and `DataError` if the file cannot be read.
    """
    _, height, width = preprocessing.shape
    regions: dict[str, tuple[slice, slice]] = {
        "left-half": np.s_[:, : width // 2],
        "right-half": np.s_[:, width // 2 :],
        "top-half": np.s_[: height // 2, :],
        "bottom-half": np.s_[height // 2 :, :],
        "center": np.s_[height // 4 : height - height // 4, width // 4 : width - width // 4],
        "every-other-row": np.s_[::2, :],
    }
    if mask in regions:
        hole = np.zeros((height, width), dtype=bool)
        hole[regions[mask]] = True
        return hole
    if not Path(mask).is_file():
        raise UsageError(f"--mask takes {', '.join(regions)}, or an image file; got {mask!r}")
    return _decoded(Path(mask), Preprocessing(preprocessing.image_size, 1, preprocessing.resize))[0] >= _WHITE


def _decoded(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    try:
        return decode(read_file(path), preprocessing)
    except (BadImageError, OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def _read_arrays(path: Path, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        headers = read_headers(path, ["images", "labels"])
        if "images" not in headers:
            raise DataError(f"{path} holds no array images")
        _check_arrays(path, *headers["images"], headers.get("labels"), preprocessing)
        arrays = read_arrays(path, list(headers), 2 * _MAX_BYTES)
    except DataError as error:
        raise DataError(f"{error}; expected an .npz with images uint8 (N, C, H, W)") from error
    return arrays["images"], arrays["labels"].astype(np.int64) if "labels" in arrays else None


def _check_arrays(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    label_header: tuple[tuple[int, ...], np.dtype] | None,
    preprocessing: Preprocessing,
) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[1:] != preprocessing.shape:
        wanted = ", ".join(map(str, preprocessing.shape))
        raise DataError(f"{path} must hold images uint8 (N, {wanted}); got {dtype} {shape}")
    if not 0 < math.prod(shape) <= _MAX_BYTES:
        raise DataError(
            f"{path} holds {shape[0]:,} images; 1 to {_MAX_BYTES // math.prod(preprocessing.shape):,} are read"
        )
    if label_header is not None:
        label_shape, label_dtype = label_header
        if label_shape != shape[:1] or label_dtype.kind not in "iu":
            raise DataError(f"{path} must hold labels of integers ({shape[0]},); got {label_dtype} {label_shape}")
