"""The manifest of a checkpoint directory: sizes and checksums by which damage to any file is detected.

    manifest.json      {"version": 1, "step": ..., "files": {"model.safetensors": {"size": ..., "sha256": "..."}, ...}}
    manifest.sha256    checksum of manifest.json, in the format of `sha256sum -c`

Checksums detect damage, not tampering.
"""

import errno
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastddpm.errors import DataError

from .documents import MAX_JSON_BYTES, parse_json
from .files import sync
from .reading import open_regular

NAMES = ("manifest.json", "manifest.sha256")
_VERSION = 1
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\.(safetensors|json)")


@dataclass(frozen=True)
class Entry:
    """An entry of the manifest: the size of a file in bytes, and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


def write_file(path: Path, data: bytes) -> Entry:
    """Write a new file, sync it to disk, and return its entry for `seal`."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # drop it from the page cache, so that `seal` reads it from disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Entry(len(data), hashlib.sha256(data).hexdigest())


def entry_of(path: Path) -> Entry:
    """Return the entry of an existing file, for `seal`."""
    return Entry(path.stat().st_size, _digest(path))


def seal(directory: Path, step: int, files: dict[str, Entry]) -> None:
    """Write the manifest of `files`, then read every file back. Raises `OSError` if one is not as it was written."""
    data = json.dumps(
        {"version": _VERSION, "step": step, "files": {name: asdict(entry) for name, entry in files.items()}}, indent=1
    ).encode()
    files = files | {
        "manifest.json": write_file(directory / "manifest.json", data),
        "manifest.sha256": write_file(directory / "manifest.sha256", _sum_line(data)),
    }
    sync(directory)
    for name, entry in files.items():
        if _digest(directory / name) != entry.sha256:
            raise OSError(errno.EIO, f"{name} reads back differently from what was written")


def read(directory: Path) -> tuple[int, dict[str, Entry]]:
    """Return the step and the entries of a directory. Raises `DataError` if the manifest is damaged or lacks a file."""
    path = directory / "manifest.json"
    data = _read(path, MAX_JSON_BYTES)
    if _read(directory / "manifest.sha256", 1024) != _sum_line(data):
        raise DataError(f"{path} is damaged: it does not match manifest.sha256")
    content = parse_json(data, path)
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise DataError(f"{path} is not of format version {_VERSION}, the only one that this version of fastddpm reads")
    step, entries = content.get("step"), content.get("files")
    if type(step) is not int or step < 0 or not isinstance(entries, dict):
        raise DataError(f"{path} has no valid step and files")
    files = {name: _entry(path, name, entry) for name, entry in entries.items()}
    try:
        extra = sorted(set(os.listdir(directory)).difference(files, NAMES))
    except OSError as error:
        raise DataError(f"{directory} cannot be read: {error.strerror or error}") from error
    if extra:
        raise DataError(f"{directory / extra[0]} is not in the manifest (remove it if it was put there by hand)")
    return step, files


def read_file(path: Path, entry: Entry) -> bytes:
    """Return the content of a file, verified. Raises `DataError` if it is missing or damaged."""
    data = _read(path, entry.size)
    if len(data) != entry.size:
        raise DataError(f"{path} is damaged: it has {len(data):,} bytes, and {entry.size:,} were written")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DataError(f"{path} is damaged: its SHA-256 is not the manifest's")
    return data


def check(path: Path, entry: Entry) -> None:
    """Verify a file block by block, without loading it. Raises `DataError` if it is missing or damaged."""
    try:
        found = entry_of(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is {error}") from error
    if found.size != entry.size:
        raise DataError(f"{path} is damaged: it has {found.size:,} bytes, and {entry.size:,} were written")
    if found.sha256 != entry.sha256:
        raise DataError(f"{path} is damaged: its SHA-256 is not the manifest's")


def _entry(path: Path, name: str, entry: Any) -> Entry:
    if not _FILE.fullmatch(name):
        raise DataError(f"{path} lists {name[:100]!r}, which is not a valid file name")
    size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        raise DataError(f"{path} has no valid size and SHA-256 for {name}")
    if name.endswith(".json") and size > MAX_JSON_BYTES:
        raise DataError(f"{path.with_name(name)}: {size:,} bytes of JSON; at most {MAX_JSON_BYTES:,} are read")
    return Entry(size, digest)


def _read(path: Path, limit: int) -> bytes:
    """Return the content of a file. Raises `DataError` if it is missing, not a regular file, or longer than `limit`."""
    try:
        with open_regular(path) as file:
            data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is {error}") from error
    if len(data) > limit:
        raise DataError(f"{path} is damaged: it is longer than the {limit:,} bytes expected")
    return data


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sum_line(data: bytes) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  manifest.json\n".encode()
