"""Shards of many images in a directory, filled by several processes and completed when the command is run again.

    sampling.json       the settings that determine the images; other settings are refused
    shard-00000.npz     images uint8 (n, C, H, W), seeds int64 (n,), and labels int64 (n,) if any

A shard is written completely or not at all. Shard i belongs to rank i modulo the world size, so no process waits for
another, and the images do not depend on the world size.
"""

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastddpm.errors import DataError, StorageError, UsageError

from .files import save_arrays, temporary_beside

SETTINGS = "sampling.json"
_VERSION = 1
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Shards:
    """A directory of shards with the images of `seeds`.

    `labels`: the class of each seed, or None. `size`: images per shard; the last one may have fewer. `shape`: (C, H, W)
    of the images, which are uint8.
    """

    directory: Path
    seeds: Sequence[int]
    labels: Sequence[int] | None
    size: int
    shape: tuple[int, int, int]

    # Words for messages; subclasses that store something else override them.
    _holds = "images"
    _otherwise = "sample into another --out"

    def __len__(self) -> int:
        """Return the number of shards."""
        return -(-len(self.seeds) // self.size)

    def part(self, index: int) -> tuple[Sequence[int], Sequence[int] | None]:
        """Return the seeds and labels of a shard."""
        chosen = slice(index * self.size, (index + 1) * self.size)
        return self.seeds[chosen], None if self.labels is None else self.labels[chosen]

    def path(self, index: int) -> Path:
        """Return the path of a shard, whether or not it exists."""
        return self.directory / f"shard-{index:05d}.npz"

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write the settings that determine the images, or compare them with those in the directory.

        Raises `UsageError`, naming the first setting that differs (checksums last), and changes nothing. Raises
        `DataError` if the settings in the directory are damaged, and `StorageError` if they cannot be written.
        """
        described = json.loads(json.dumps({"version": _VERSION, **settings, **self._described()}))
        path = self.directory / SETTINGS
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            temporary = temporary_beside(path)
            try:
                temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
                with contextlib.suppress(FileExistsError):  # by another process or an earlier run; compared below
                    os.link(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{path} is damaged; {self._otherwise}") from None
        except OSError as error:
            raise StorageError(f"{path} cannot be written ({error.strerror}); {self._otherwise}") from error
        differing = [name for name in dict.fromkeys([*described, *found]) if described.get(name) != found.get(name)]
        if differing:
            # Checksums say little to a reader.
            named = [name for name in differing if not _DIGEST.fullmatch(str(found.get(name)))]
            name = (named or differing)[0]
            raise UsageError(
                f"{self.directory} holds {self._holds} with {name} {found.get(name)}, not {described.get(name)}; "
                f"{self._otherwise}"
            )

    def _described(self) -> dict[str, Any]:
        """Return the settings of these shards; seeds and labels as ranges, as there may be millions."""
        return {
            "seeds": ranges(self.seeds),
            "labels": None if self.labels is None else ranges(self.labels),
            "shard_size": self.size,
            "shape": self.shape,
        }

    @contextlib.contextmanager
    def locked(self, rank: int, on_wait: Callable[[], object] | None = None) -> Iterator[None]:
        """Lock the shards of `rank` inside the block.

        If another process holds the lock, raises `UsageError`, or with `on_wait` calls that and waits for the lock.
        """
        try:
            import fcntl
        except ModuleNotFoundError:  # Windows: without a lock two processes may draw the same images
            yield
            return
        with open(self.directory / f".rank-{rank}.lock", "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if on_wait is None:
                    raise UsageError(
                        f"another process is sampling into {self.directory} as rank {rank}; wait for it or stop it"
                    ) from None
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def missing(self, rank: int, world_size: int) -> tuple[list[int], list[str]]:
        """Return the shards that `rank` still has to draw, and messages about existing ones that are unusable.

        There is one message for each reason.
        """
        wanted: list[int] = []
        damaged: dict[str, list[Path]] = {}
        for index in range(rank, len(self), world_size):
            path = self.path(index)
            problem = None if path.exists() else ""
            if problem is None:
                problem = self._problem(index)
            if problem is not None:
                wanted.append(index)
                if problem:
                    damaged.setdefault(problem, []).append(path)
        return wanted, [
            f"{paths[0]} {'' if len(paths) == 1 else f'and {len(paths) - 1} more: '}{problem}: drawn again"
            for problem, paths in damaged.items()
        ]

    def _problem(self, index: int) -> str | None:
        """Return why the file of a shard cannot be used, or None if it can."""
        try:
            with np.load(self.path(index), allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in self._names()}  # this verifies the archive's checksums
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            return f"cannot be read ({type(error).__name__})"
        return self._mismatch(index, found)

    def _names(self) -> list[str]:
        """Return the names of the arrays that a shard must have."""
        return ["images", "seeds"] if self.labels is None else ["images", "seeds", "labels"]

    def _mismatch(self, index: int, found: Mapping[str, np.ndarray]) -> str | None:
        """Return how the arrays `found` differ from those expected in the shard, or None."""
        seeds, labels = self.part(index)
        images = found["images"]
        if images.shape != (len(seeds), *self.shape) or images.dtype != np.uint8:
            return f"has images {images.dtype} {images.shape}"
        if not np.array_equal(found["seeds"], seeds) or (
            labels is not None and not np.array_equal(found["labels"], np.array(labels))
        ):
            return "has other seeds or labels"
        return None

    def write(self, index: int, images: np.ndarray) -> None:
        """Write the images of a shard, as `put_arrays` does."""
        self.put_arrays(index, {"images": images})

    def put_arrays(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the file of a shard, with its seeds and labels, atomically, and sync it to disk.

        Raises `StorageError` if it cannot be written.
        """
        seeds, labels = self.part(index)
        named = {**arrays, "seeds": np.asarray(seeds, dtype=np.int64)}
        if labels is not None:
            named["labels"] = np.asarray(labels, dtype=np.int64)
        try:
            save_arrays(named, self.path(index), compress=False, durable=True)
        except StorageError as error:
            raise StorageError(
                f"{error}; the shards before it are complete: free some space and run the same command again"
            ) from error

    def read(self, index: int) -> np.ndarray:
        """Return the images of a shard."""
        with np.load(self.path(index), allow_pickle=False) as arrays:
            images: np.ndarray = arrays["images"]
        return images

    def forget_temporaries(self, rank: int, world_size: int) -> None:
        """Remove the temporary files of a killed process of this rank."""
        for index in range(rank, len(self), world_size):
            for left in self.directory.glob(f".{self.path(index).name}.*.tmp"):
                left.unlink(missing_ok=True)


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text, as options take them: 0-63, or 1,5,10-19."""
    if isinstance(numbers, range) and numbers.step == 1:
        return f"{numbers[0]}-{numbers[-1]}"
    values = np.asarray(numbers, dtype=np.int64)
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 2) != 1)
    ends = np.append(starts[1:], len(values)) - 1
    pairs = zip(values[starts].tolist(), values[ends].tolist(), strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)
