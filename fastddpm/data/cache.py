"""Decoded once: a collection of encoded images as an array on disk, checked by its checksum whenever it is opened."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from fastddpm.errors import DataError

from .containers import Collection, Item
from .dataset import Dataset, checksum
from .decode import BadImageError, Rule, decode

Report = Callable[[str], None]
_VERSION = 1
_CHUNK = 2048
_SHOWN_PROBLEMS = 20


def default_directory() -> Path:
    """$XDG_CACHE_HOME/fastddpm, or ~/.cache/fastddpm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm"


def decoded(collection: Collection, rule: Rule, *, skip_bad: bool, directory: Path, report: Report) -> Dataset:
    """The collection's images, from the cache in `directory`, or decoded into it now.

    Raises DataError that lists every image that cannot be used, unless `skip_bad`, and always when none can.
    A cache that is damaged is made again; one that cannot be written is done without, with a line to `report`.
    """
    entry = directory / _key(collection, rule, skip_bad)
    cached = _open(entry, collection.name, report)
    if cached is not None:
        return cached
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=directory))
    except OSError as error:
        report(f"cache {directory} cannot be written ({error.strerror}); images are decoded in memory each time")
        images: np.ndarray = np.empty((collection.count, rule.channels, rule.image_size, rule.image_size), np.uint8)
        return Dataset.of(*_decode_all(collection, rule, images, skip_bad, report), collection.name)
    try:
        shape = (collection.count, rule.channels, rule.image_size, rule.image_size)
        images = np.lib.format.open_memmap(temporary / "all.npy", mode="w+", dtype=np.uint8, shape=shape)
        images, labels = _decode_all(collection, rule, images, skip_bad, report)
        np.save(temporary / "images.npy", images)
        if labels is not None:
            np.save(temporary / "labels.npy", labels)
        meta = {"source": collection.name, "rule": asdict(rule), "checksum": checksum(images, labels)}
        del images
        (temporary / "all.npy").unlink()
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(entry, ignore_errors=True)
        try:
            os.rename(temporary, entry)
        except OSError:
            if not entry.exists():  # otherwise another process has just made the same entry
                raise
    except OSError as error:
        raise DataError(f"decoding {collection.name} into {directory} failed: {error}; free space there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    made = _open(entry, collection.name, report)
    if made is None:
        raise DataError(f"{entry} was just written but cannot be read back; the disk may be failing")
    return made


def _key(collection: Collection, rule: Rule, skip_bad: bool) -> str:
    identity = [_VERSION, str(Path(collection.name).resolve()), collection.listing, asdict(rule), skip_bad]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _open(entry: Path, name: str, report: Report) -> Dataset | None:
    if not entry.exists():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text())
        images = np.load(entry / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = None
        if (entry / "labels.npy").exists():
            labels = np.load(entry / "labels.npy", allow_pickle=False)
        if checksum(images, labels) != meta["checksum"]:
            raise ValueError("checksum differs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        report(f"cache entry {entry} is damaged ({error}); decoding again")
        return None
    return Dataset(images, labels, name, meta["checksum"])


def _decode_all(
    collection: Collection, rule: Rule, images: np.ndarray, skip_bad: bool, report: Report
) -> tuple[np.ndarray, np.ndarray | None]:
    """Fill `images`, the good ones first, and return that part of it with their labels."""
    labels: list[int | None] = []
    problems: list[str] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for chunk in _chunks(collection.items()):
            for item, result in zip(chunk, pool.map(lambda item: _try(item, rule), chunk), strict=True):
                if isinstance(result, str):
                    problems.append(f"{item.name}: {result}")
                else:
                    images[len(labels)] = result
                    labels.append(item.label)
    if problems:
        text = _problem_text(collection, problems)
        if not skip_bad or not labels:
            raise DataError(text + ("" if labels else "\nno image is left"))
        report(text + "\nleft out, as --skip-bad asks")
    known = [label for label in labels if label is not None]
    if known and len(known) < len(labels):
        raise DataError(f"{collection.name}: {len(labels) - len(known)} images have no label, the others do")
    return images[: len(labels)], np.array(known, dtype=np.int64) if known else None


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(islice(items, _CHUNK)):
        yield chunk


def _try(item: Item, rule: Rule) -> np.ndarray | str:
    try:
        return decode(item.read(), rule)
    except BadImageError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"cannot be read: {error}"


def _problem_text(collection: Collection, problems: list[str]) -> str:
    lines = [f"{len(problems)} of {collection.count} images in {collection.name} cannot be used:"]
    lines += [f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        path = Path(tempfile.mkstemp(prefix="fastddpm-bad-images-", suffix=".txt")[1])
        path.write_text("\n".join(problems) + "\n", encoding="utf-8", errors="backslashreplace")
        lines.append(f"  and {len(problems) - _SHOWN_PROBLEMS} more; the whole list is in {path}")
    lines.append("mend or remove them, or use --skip-bad to leave them out")
    return "\n".join(lines)
