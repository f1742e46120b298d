"""Files that are written whole or not at all. Imports no torch, and NumPy where arrays are written."""

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
    """Have `write` make a file beside `path`, then give it that name: a reader finds the old file or the new one.

    Raises `StorageError`.
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
    """In UTF-8, as `write_whole` does."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, document: Any) -> None:
    """Indented by one, with a newline at the end, as `write_whole` does."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def save_arrays(arrays: "Mapping[str, np.ndarray]", path: Path) -> None:
    """A compressed .npz, as `write_whole` does."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    write_whole(path, write)
