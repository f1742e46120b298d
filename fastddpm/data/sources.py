"""What `--data` may name, and which reader it goes to."""

import os
import sys
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fastddpm.errors import DataError, UsageError

from . import cache as image_cache
from .archive import zip_collection
from .cifar import IMAGE_SIZE, Batches, find_batches, read_batches
from .collection import Collection
from .dataset import Dataset
from .decode import Resize, Rule, fit
from .decoding import Report
from .digits import load_digits
from .folder import folder_collection
from .parquet import parquet_collection, parquet_files

Split = Literal["train", "test"]
_ACCEPTED = "a folder or .zip of images, .parquet (or a folder of them), or CIFAR-10 (its folder or .tar.gz)"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def open_dataset(
    source: str | os.PathLike[str] | None,
    *,
    image_size: int,
    channels: int,
    resize: Resize = "none",
    skip_bad: bool = False,
    split: Split = "train",
    cache: Path | None = None,
    report: Report | None = None,
) -> Dataset:
    """The images at `source`, uint8 (N, channels, image_size, image_size).

    `source`: None for the embedded digits; CIFAR-10's Python or binary directory or its tar.gz; a parquet file
    or a directory of them (`train-*`, `test-*`); a folder or a zip of images, whose first-level folders are
    their classes. `split` chooses where the source has splits; one that has none gives all its images.
    `resize`: see `decode.Rule`; the digits have a rule of their own. `skip_bad`: leave out images that cannot be
    used, telling `report`, instead of raising DataError with their list. `cache`: where decoded images are kept,
    ~/.cache/fastddpm unless given. `report` gets one line at a time, stderr unless given. Raises UsageError for a
    path or a wish that cannot be, DataError for data that cannot be read.
    """
    if channels not in (1, 3) or image_size < 1:
        raise UsageError(f"images have 1 or 3 channels and a positive size; got {channels} channels, size {image_size}")
    if source is None:
        return Dataset.of(*load_digits(image_size, channels), "digits")
    rule = Rule(image_size, channels, resize)
    path = _existing(source)
    try:
        batches = find_batches(path)
        if batches is not None:
            return _cifar(path, batches, rule, split)
        collection = _collection(path, split)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    directory = cache or image_cache.default_directory()
    return image_cache.decoded(collection, rule, skip_bad=skip_bad, directory=directory, report=report or _to_stderr)


def _existing(source: str | os.PathLike[str]) -> Path:
    """`source` as a path to a file or folder; reading anything else, such as a pipe, could block."""
    name = os.fspath(source)
    if not name or not os.path.exists(name):
        raise UsageError(f"--data {name!r} does not exist")
    path = Path(name)
    if not (path.is_dir() or path.is_file()):
        raise UsageError(f"--data {path} is neither a file nor a folder; it may be {_ACCEPTED}")
    return path


def _cifar(path: Path, batches: Batches, rule: Rule, split: Split) -> Dataset:
    size = f"{IMAGE_SIZE}x{IMAGE_SIZE}"
    if rule.channels != 3:
        raise UsageError(f"CIFAR-10 is in colour; the model has {rule.channels} channel: use --image-channels 3")
    if rule.image_size != IMAGE_SIZE and rule.resize == "none":
        raise UsageError(
            f"CIFAR-10 is {size}; the model takes {rule.image_size}x{rule.image_size}: "
            f"use --image-size {IMAGE_SIZE}, or --resize area"
        )
    images, labels = read_batches(batches, split, path)
    if rule.image_size != IMAGE_SIZE:
        pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        images = np.stack([np.asarray(fit(Image.fromarray(image), rule)) for image in pixels]).transpose(0, 3, 1, 2)
        images = np.ascontiguousarray(images)
    return Dataset.of(images, labels, str(path))


def _collection(path: Path, split: Split) -> Collection:
    if path.is_dir():
        tables = parquet_files(path, split)
        return parquet_collection(tables) if tables else folder_collection(path, split)
    if path.suffix.lower() == ".parquet":
        return parquet_collection([path])
    if path.suffix.lower() == ".zip":
        return zip_collection(path, split)
    raise UsageError(f"--data {path} is a {path.suffix or 'nameless kind of'} file; it may be {_ACCEPTED}")
