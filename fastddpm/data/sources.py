"""What `--data` may name, and which reader it goes to."""

import os
from pathlib import Path
from typing import Literal

from fastddpm.errors import DataError, UsageError

from . import cache as image_cache
from .cifar import IMAGE_SIZE, find_batches, read_batches
from .containers import Collection, folder_collection, parquet_collection, zip_collection
from .dataset import Dataset
from .decode import Resize, Rule
from .digits import load_digits

Split = Literal["train", "test"]


def open_dataset(
    source: str | os.PathLike[str] | None,
    *,
    image_size: int,
    channels: int,
    resize: Resize = "none",
    skip_bad: bool = False,
    split: Split = "train",
    cache: Path | None = None,
    report: image_cache.Report = print,
) -> Dataset:
    """The images at `source`, uint8 (N, channels, image_size, image_size).

    `source`: None for the embedded digits; CIFAR-10's Python or binary directory or its tar.gz; a parquet file
    or a directory of them (`train-*`, `test-*`); a folder or a zip of images, whose first-level folders are
    their classes. `resize`: see `decode.Rule`. `skip_bad`: leave out images that cannot be used, telling
    `report`, instead of raising DataError with their list. `cache`: where decoded images are kept,
    ~/.cache/fastddpm unless given. Raises UsageError for a path or a wish that cannot be, DataError for data
    that cannot be read.
    """
    if source is None:
        return Dataset.of(*load_digits(image_size, channels), "digits")
    path = Path(source)
    if not path.exists():
        raise UsageError(f"--data {path} does not exist")
    batches = find_batches(path)
    if batches is not None:
        if (image_size, channels) != (IMAGE_SIZE, 3):
            raise UsageError(
                f"CIFAR-10 is 32x32 in 3 channels; the model takes {image_size}x{image_size} in {channels}"
            )
        return Dataset.of(*read_batches(batches, split, path), str(path))
    rule = Rule(image_size, channels, resize)
    directory = cache or image_cache.default_directory()
    return image_cache.decoded(_collection(path, split), rule, skip_bad=skip_bad, directory=directory, report=report)


def _collection(path: Path, split: Split) -> Collection:
    if path.is_dir():
        tables = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
        if tables:
            of_split = [table for table in tables if table.name.startswith(split)]
            if not of_split and any(table.name.startswith(("train", "test", "validation")) for table in tables):
                raise DataError(f"{path} has no {split}-*.parquet; it has {', '.join(t.name for t in tables)}")
            return parquet_collection(of_split or tables)
        return folder_collection(path)
    if path.suffix.lower() == ".parquet":
        return parquet_collection([path])
    if path.suffix.lower() == ".zip":
        return zip_collection(path)
    raise UsageError(
        f"--data {path} is no known kind; a folder or .zip of images, .parquet, or CIFAR-10 (directory or .tar.gz) is"
    )
