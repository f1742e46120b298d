"""Open the data set that `--data` names, with the reader for its kind."""

import io
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.image_size import ImageSize, sides, size_text
from fastddpm.runtime.progress import announced, log

from . import cache as image_cache
from .dataset import Dataset
from .image import Preprocessing, Resize, fit
from .ingest import Report
from .pack.format import ENDING, Pack, open_pack
from .readers.cifar import IMAGE_SIZE, Batches, find_batches, read_batches
from .readers.digits import load_digits
from .readers.folder import folder_source
from .readers.hub import PREFIX, hub_source
from .readers.lmdb import lmdb_file, lmdb_source
from .readers.parquet import parquet_files, parquet_source
from .readers.source import EncodedImage, ImageSource, check_regular
from .readers.splits import require_split, split_files, split_of_shard
from .readers.tar import tar_source
from .readers.zip import zip_source

Split = Literal["train", "test"]
Keep = Literal["auto", "decoded", "encoded"]
DECODED_LIMIT_BYTES = 32 * 2**30
DIGITS_CLASSES = tuple("0123456789")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SHOWN_CLASSES = 10
ACCEPTED = (
    "a folder, .zip or .tar of images, .parquet (or a folder of these or of .tar), LSUN's LMDB, a .fdpack, "
    "hf:NAME, or CIFAR-10 (its folder or .tar.gz)"
)


def open_dataset(
    source: str | os.PathLike[str] | None,
    *,
    image_size: ImageSize,
    channels: int,
    resize: Resize = "none",
    background: str | None = None,
    skip_bad: float = False,
    split: Split = "train",
    keep: Keep = "auto",
    cache: Path | None = None,
    report: Report | None = None,
) -> Dataset:
    """Open the images at `source`, uint8 (N, channels, H, W); `image_size` is H = W, or (H, W).

    `source`: None for the embedded digits; CIFAR-10's Python or binary directory or its tar.gz; a folder, zip or tar
    of images, whose splits and classes are its folders (docs/data.md); a directory of tar shards; a parquet file or a
    directory of them (`train-*`, `test-*`); LSUN's LMDB; hf:NAME[:SPLIT]; a pack.
    `resize`: see `Preprocessing`. Unused for the digits, which have their own resizing, and for a pack, whose images
    are resized as chosen when it was made.
    `background`: see `Preprocessing`. Default: transparent images, CMYK and the like are bad images.
    `skip_bad`: leave out bad images after a report to `report`, all of them (True) or if they are at most that share of
    all. Default: raise DataError with their list.
    `split`: the split to open. A source without splits gives all its images for "train"; "test" is refused unless the
    source's own name says it.
    `keep`: "decoded" decodes once into an array. "encoded" keeps a pack, whose images the worker processes of
    `batches.Batches` decode in every epoch. Default "auto": encoded if the array would be larger than 32 GiB.
    `cache`: directory of the array or pack. Default: ~/.cache/fastddpm. `report`: takes one line of text at a time,
    among them what is left out and the names of the classes. Default: print it to stderr.

    Raises UsageError for a source or an option that does not fit, DataError for data that cannot be read, and
    StorageError for a pack that cannot be written.
    """
    if channels not in (1, 3) or min(sides(image_size)) < 1:
        raise UsageError(f"images have 1 or 3 channels and a positive size; got {channels} channels, size {image_size}")
    if source is None:
        if split == "test":
            raise UsageError(
                "the embedded digits have no test split: training takes all 5,000; use --split train, or name other "
                "images with --data"
            )
        with announced("reading the embedded digits", report or log):
            digits = Dataset.of(*load_digits(image_size, channels), "digits", DIGITS_CLASSES)
        if report is not None:
            _report_classes(digits, report)
        return digits
    preprocessing = Preprocessing(image_size, channels, resize, background)
    report = report or log
    with announced(f"looking for images in {source}", report):
        found = _locate(source, split)
    directory = cache or image_cache.default_directory()
    with announced(f"reading the images of {source}", report):
        if isinstance(found, ImageSource):
            large = found.count * math.prod(preprocessing.shape) > DECODED_LIMIT_BYTES
            make = image_cache.packed if keep == "encoded" or (keep == "auto" and large) else image_cache.decoded
            dataset = make(found, preprocessing, skip_bad=skip_bad, directory=directory, report=report)
        elif isinstance(found, Pack):
            dataset = _pack_dataset(found, preprocessing, keep, directory, report)
        else:
            dataset = _cifar_dataset(Path(source), found, preprocessing, split)
    _report_classes(dataset, report)
    return dataset


def _report_classes(dataset: Dataset, report: Report) -> None:
    """Report the number and the names of the classes: all up to ten, else the first nine and the last."""
    classes = dataset.classes
    if classes is not None:
        names = [name if name.isprintable() else repr(name) for name in classes]
        shown = names if len(names) <= _SHOWN_CLASSES else [*names[: _SHOWN_CLASSES - 1], "..", names[-1]]
        report(f"{len(names):,} class{'es' * (len(names) != 1)}: {', '.join(shown)}")
    elif dataset.labels is None:
        report("no classes: the images have no labels")
    else:
        report(f"labels are the numbers {dataset.labels.min()} to {dataset.labels.max()}")


def open_image_source(source: str | os.PathLike[str], split: Split = "train") -> ImageSource:
    """Open the encoded images at `source`, any source of `open_dataset` but None; CIFAR-10's are encoded as PNG.

    Raises UsageError and DataError as `open_dataset` does.
    """
    with announced(f"looking for images in {source}"):
        found = _locate(source, split)
    if isinstance(found, ImageSource):
        return found
    if isinstance(found, Pack):
        return found.image_source()
    images, labels = read_batches(found, split, Path(source))

    def items() -> Iterator[EncodedImage]:
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            yield EncodedImage(f"image {number}", label, _as_png(image))

    return ImageSource(str(source), len(images), [], items, classes=CIFAR10_CLASSES)


def _locate(source: str | os.PathLike[str], split: Split) -> ImageSource | Pack | Batches:
    """Return the images at `source`: a pack, CIFAR-10's batch files, or the source of any other kind."""
    name = os.fspath(source)
    if name.startswith(PREFIX) and not os.path.exists(name):
        return hub_source(name, split)
    path = _existing(name)
    try:
        if path.is_file() and path.suffix.lower() == ENDING:
            require_split(split, path, "one set of images")
            return open_pack(path)
        batches = find_batches(path)
        return _image_source(path, split) if batches is None else batches
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _existing(name: str) -> Path:
    """Return `name` as the path of a file or folder; anything else is refused, because reading a pipe could block."""
    if not name or not os.path.exists(name):
        raise UsageError(f"{name!r} does not exist; images may be {ACCEPTED}")
    path = Path(name)
    if not (path.is_dir() or path.is_file()):
        raise UsageError(f"{path} is neither a file nor a folder; images may be {ACCEPTED}")
    return path


def _image_source(path: Path, split: Split) -> ImageSource:
    """Choose the reader by file name or folder content."""
    database = lmdb_file(path)
    if database:
        require_split(split, path, "one LMDB")
        return lmdb_source(database)
    if path.is_dir():
        tables, notes = parquet_files(path, split)
        if tables:
            return replace(parquet_source(tables), notes=notes)
        shards, notes, named = split_files(sorted(path.glob("*.tar")), split, path, "tar")
        for shard in shards:
            check_regular(shard)
        if not shards:
            return folder_source(path, split)
        found = tar_source(shards, split, named=named)
        return replace(found, notes=(*notes, *found.notes))
    if path.suffix.lower() == ".parquet":
        require_split(split, path, "one table", shard=True)
        return parquet_source([path])
    if path.suffix.lower() == ".zip":
        return zip_source(path, split)
    if path.suffix.lower() == ".tar":
        return tar_source([path], split, named=split_of_shard(path.name) in ("test", "val"))
    kind = f"is a {path.suffix} file" if path.suffix else "has no file extension"
    raise UsageError(f"{path} {kind}; images may be {ACCEPTED}")


def _pack_dataset(pack: Pack, preprocessing: Preprocessing, keep: Keep, directory: Path, report: Report) -> Dataset:
    """Open a pack as a data set, decoded into the cache or kept encoded.

    Raises UsageError if the model has another image size or number of channels.
    """
    packed = pack.preprocessing
    if (packed.image_size, packed.channels) != (preprocessing.image_size, preprocessing.channels):
        raise UsageError(
            f"{pack.path} was packed at {size_text(packed.image_size)} with {packed.channels} channels; the "
            f"model takes {size_text(preprocessing.image_size)} with "
            f"{preprocessing.channels}: pack the images for it"
        )
    dataset = pack.dataset()
    if keep == "encoded" or (keep == "auto" and dataset.images.nbytes > DECODED_LIMIT_BYTES):
        return dataset
    decoded_by = pack.images().preprocessing
    return image_cache.decoded(pack.image_source(), decoded_by, skip_bad=False, directory=directory, report=report)


def _cifar_dataset(path: Path, batches: Batches, preprocessing: Preprocessing, split: Split) -> Dataset:
    """Read CIFAR-10, resized if asked. Raises UsageError if its size or colour does not suit the model."""
    size = f"{IMAGE_SIZE}x{IMAGE_SIZE}"
    if preprocessing.channels != 3:
        raise UsageError(
            f"CIFAR-10 is in colour; the model has {preprocessing.channels} channel: use --image-channels 3"
        )
    if preprocessing.image_size != IMAGE_SIZE and preprocessing.resize == "none":
        raise UsageError(
            f"CIFAR-10 is {size}; the model takes {size_text(preprocessing.image_size)}: "
            f"use --image-size {IMAGE_SIZE}, or --resize area"
        )
    images, labels = read_batches(batches, split, path)
    if preprocessing.image_size != IMAGE_SIZE:
        pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        images = np.stack([np.asarray(fit(Image.fromarray(image), preprocessing)) for image in pixels]).transpose(
            0, 3, 1, 2
        )
        images = np.ascontiguousarray(images)
    return Dataset.of(images, labels, str(path), CIFAR10_CLASSES)


def _as_png(image: np.ndarray) -> Callable[[], bytes]:
    """Return a function that encodes an image, uint8 (3, H, W), as PNG."""

    def read() -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, "PNG", compress_level=1)
        return file.getvalue()

    return read
