"""Atomic writes: a file is written completely or not at all. Imports no torch, and NumPy only to write arrays."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.errors import StorageError

if TYPE_CHECKING:
    import numpy as np


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: `write` creates a temporary file beside `path`, which is then renamed to `path`.

    Readers find either the old file or the new one. Raises `StorageError` if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, with `write_whole`."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, document: Any) -> None:
    """Write JSON, indented by one space and ending in a newline, with `write_whole`."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def save_arrays(arrays: "Mapping[str, np.ndarray]", path: Path) -> None:
    """Write a compressed .npz, with `write_whole`."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    write_whole(path, write)
