"""Many images: a directory of shards that several processes fill, and that a killed one finishes when it runs again.

    sampling.json       what determines the images; another setting is refused
    shard-00000.npz     images uint8 (n, C, H, W), seeds int64 (n,), and labels int64 (n,) if any

A shard is written whole or not at all. Shard i belongs to process i modulo their number: no process waits for another,
and the images are the same whatever their number is.
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

from . import manifest

SETTINGS = "sampling.json"
_VERSION = 1
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Shards:
    """`seeds`, with the class of each in `labels` or None, in shards of `size`; images uint8 of `shape` (C, H, W)."""

    directory: Path
    seeds: Sequence[int]
    labels: Sequence[int] | None
    size: int
    shape: tuple[int, int, int]

    # Where shards of something else say so.
    _holds = "images"
    _otherwise = "sample into another --out"

    def __len__(self) -> int:
        return -(-len(self.seeds) // self.size)

    def part(self, index: int) -> tuple[Sequence[int], Sequence[int] | None]:
        """Seeds and labels of a shard."""
        chosen = slice(index * self.size, (index + 1) * self.size)
        return self.seeds[chosen], None if self.labels is None else self.labels[chosen]

    def path(self, index: int) -> Path:
        return self.directory / f"shard-{index:05d}.npz"

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write what determines the images, or compare it with what is there.

        `UsageError`, naming the first difference that can be read, for another; then nothing is written.
        """
        described = json.loads(json.dumps({"version": _VERSION, **settings, **self._described()}))
        path = self.directory / SETTINGS
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{SETTINGS}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
            with contextlib.suppress(FileExistsError):  # another process, or an earlier run: it must say the same
                os.link(temporary, path)
            temporary.unlink()
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{path} is damaged; {self._otherwise}") from None
        except OSError as error:
            raise StorageError(f"{path} cannot be written ({error.strerror}); {self._otherwise}") from error
        differing = [name for name in dict.fromkeys([*described, *found]) if described.get(name) != found.get(name)]
        if differing:
            named = [name for name in differing if not _DIGEST.fullmatch(str(found.get(name)))]  # steps, not its digest
            name = (named or differing)[0]
            raise UsageError(
                f"{self.directory} holds {self._holds} with {name} {found.get(name)}, not {described.get(name)}; "
                f"{self._otherwise}"
            )

    def _described(self) -> dict[str, Any]:
        """In a few words: the seeds may be millions."""
        return {
            "seeds": ranges(self.seeds),
            "labels": None if self.labels is None else ranges(self.labels),
            "shard_size": self.size,
            "shape": self.shape,
        }

    @contextlib.contextmanager
    def locked(self, rank: int, waits: Callable[[], object] | None = None) -> Iterator[None]:
        """Nobody else draws the shards of this process; where somebody does, `UsageError`.

        Or, with `waits`, call that and wait until it is done.
        """
        try:
            import fcntl
        except ModuleNotFoundError:  # not on Windows: there two processes would draw the same images twice
            yield
            return
        with open(self.directory / f".rank-{rank}.lock", "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if waits is None:
                    raise UsageError(f"another process is sampling into {self.directory} as rank {rank}") from None
                waits()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def missing(self, rank: int, processes: int) -> tuple[list[int], list[str]]:
        """The shards that process `rank` still has to draw, and a line about each that is there but cannot be used."""
        wanted, damaged = [], []
        for index in range(rank, len(self), processes):
            path = self.path(index)
            problem = None if path.exists() else ""
            if problem is None:
                problem = self._problem(index)
            if problem is not None:
                wanted.append(index)
                if problem:
                    damaged.append(f"{path} {problem}: drawn again")
        return wanted, damaged

    def _problem(self, index: int) -> str | None:
        """What is wrong with a shard, or None."""
        try:
            with np.load(self.path(index), allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in self._names()}  # reads them whole: the archive has checksums
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            return f"cannot be read ({type(error).__name__})"
        return self._mismatch(index, found)

    def _names(self) -> list[str]:
        """The arrays that a shard must have."""
        return ["images", "seeds"] if self.labels is None else ["images", "seeds", "labels"]

    def _mismatch(self, index: int, found: Mapping[str, np.ndarray]) -> str | None:
        """In what these arrays are not those of the shard, or None."""
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
        """The images of a shard; as `put_arrays`."""
        self.put_arrays(index, {"images": images})

    def put_arrays(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        """The file of a shard, with its seeds and labels, onto the disk itself, whole or not at all.

        `StorageError` where that fails.
        """
        seeds, labels = self.part(index)
        named = {**arrays, "seeds": np.asarray(seeds, dtype=np.int64)}
        if labels is not None:
            named["labels"] = np.asarray(labels, dtype=np.int64)
        path = self.path(index)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **named)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            manifest.sync(self.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise StorageError(
                f"{path} cannot be written ({error.strerror}); the shards before it are whole: make room and run the "
                "same command again"
            ) from error

    def read(self, index: int) -> np.ndarray:
        """The images of a shard."""
        with np.load(self.path(index), allow_pickle=False) as arrays:
            images: np.ndarray = arrays["images"]
        return images

    def forget_temporaries(self, rank: int, processes: int) -> None:
        """Remove what a killed process of this rank had begun to write."""
        for index in range(rank, len(self), processes):
            for left in self.directory.glob(f".{self.path(index).name}.*.tmp"):
                left.unlink(missing_ok=True)


def ranges(numbers: Sequence[int]) -> str:
    """As the commands take them: 0-63, or 1,5,10-19."""
    if isinstance(numbers, range) and numbers.step == 1:
        return f"{numbers[0]}-{numbers[-1]}"
    values = np.asarray(numbers, dtype=np.int64)
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 2) != 1)
    ends = np.append(starts[1:], len(values)) - 1
    pairs = zip(values[starts].tolist(), values[ends].tolist(), strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)
