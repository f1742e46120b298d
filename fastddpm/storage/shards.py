"""Shards of many images in a directory, filled by several processes and completed when the command is run again.

    sampling.json       the settings that determine the images; other settings are refused
    shard-00000.npz     images uint8 (n, C, H, W), seeds int64 (n,), and labels int64 (n,) if any

A shard is written completely or not at all. Shard i belongs to rank i modulo the world size, so no process waits for
another, and the images do not depend on the world size.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastddpm.errors import DataError, StorageError, UsageError

from .documents import read_object
from .files import save_arrays, sweep, temporary_beside
from .locks import locked
from .reading import read_arrays

SETTINGS = "sampling.json"
_VERSION = 1
_DIGEST = re.compile("[0-9a-f]{64}")
_RANGES = re.compile(r"\d{1,19}(-\d{1,19})?(,\d{1,19}(-\d{1,19})?)*")
_MAX_NUMBERS = 10_000_000
_MAX_TEXT = 500_000  # characters of seeds or labels in the settings
# What a checksum that differs alone means to a reader.
_TOLD = {
    "timesteps": "timesteps of another spacing (--spacing, --steps-offset)",
    "coefficients": "coefficients of other steps (--eta, or the schedule)",
}
_SLACK = 2**16  # bytes for the headers of a shard's arrays


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

        A directory whose seeds (and labels) are the first ones of these is extended. Raises `UsageError`, naming the
        first setting that differs (checksums last), and changes nothing. Raises `DataError` if the settings in the
        directory are damaged, and `StorageError` if they cannot be written.
        """
        described = json.loads(json.dumps({"version": _VERSION, **settings, **self._described()}))
        path = self.directory / SETTINGS
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            sweep(self.directory)
            temporary = temporary_beside(path)
            try:
                temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
                with contextlib.suppress(FileExistsError):  # by another process or an earlier run; compared below
                    os.link(temporary, path)
                found = read_object(path)
                if found != described and self._extends(found, described):
                    os.replace(temporary, path)
                    return
            finally:
                temporary.unlink(missing_ok=True)
        except DataError as error:
            raise DataError(f"{path} is damaged; {self._otherwise} ({error})") from None
        except OSError as error:
            raise StorageError(f"{path} cannot be written ({error.strerror}); {self._otherwise}") from error
        differing = [name for name in dict.fromkeys([*described, *found]) if described.get(name) != found.get(name)]
        if differing:
            # Checksums say little to a reader.
            named = [name for name in differing if not _DIGEST.fullmatch(str(found.get(name)))]
            name = (named or differing)[0]
            if name in _TOLD:
                raise UsageError(f"{self.directory} holds {self._holds} with {_TOLD[name]}; {self._otherwise}")
            raise UsageError(
                f"{self.directory} holds {self._holds} with {name} {_short(found.get(name))}, not "
                f"{_short(described.get(name))}; {self._otherwise}"
            )

    def _extends(self, found: Mapping[str, Any], described: Mapping[str, Any]) -> bool:
        """Return whether these shards are those described by `found` and more, with the same settings."""
        seeds = numbers(found.get("seeds"))
        if seeds is None or not 0 < len(seeds) < len(self.seeds):
            return False
        fewer = replace(
            self, seeds=self.seeds[: len(seeds)], labels=None if self.labels is None else self.labels[: len(seeds)]
        )
        return dict(found) == {**described, **json.loads(json.dumps(fewer._described()))}

    def _described(self) -> dict[str, Any]:
        """Return the settings of these shards; seeds and labels as ranges, as there may be millions."""
        return {
            "seeds": _bounded(ranges(self.seeds)),
            "labels": None if self.labels is None else _bounded(ranges(self.labels)),
            "shard_size": self.size,
            "shape": self.shape,
        }

    @contextlib.contextmanager
    def locked(self, rank: int, on_wait: Callable[[], object] | None = None) -> Iterator[None]:
        """Lock the shards of `rank` inside the block.

        If another process holds the lock, raises `UsageError`, or with `on_wait` calls that and waits for the lock.
        """

        def in_use(who: str) -> str:
            return f"{who} is sampling into {self.directory} as rank {rank}; wait for it or stop it"

        with locked(self.directory / f".rank-{rank}.lock", in_use, on_wait):
            yield

    def missing(self, rank: int, world_size: int) -> tuple[list[int], list[str]]:
        """Return the shards that `rank` still has to draw, and messages about existing ones that are unusable.

        There is one message for each reason.
        """
        wanted: list[int] = []
        damaged: dict[str, list[Path]] = {}
        for index in range(rank, len(self), world_size):
            problem = self._problem(index)
            if problem is not None:
                wanted.append(index)
                if problem:
                    damaged.setdefault(problem, []).append(self.path(index))
        return wanted, [
            f"{paths[0]} {'' if len(paths) == 1 else f'and {len(paths) - 1} more: '}{problem}: drawn again"
            for problem, paths in damaged.items()
        ]

    def _problem(self, index: int) -> str | None:
        """Return why the file of a shard cannot be used, "" if there is none, or None if it can."""
        try:
            found = self.arrays(index)
        except FileNotFoundError:
            return ""
        except DataError as error:
            return str(error).removeprefix(f"{self.path(index)} ")
        return self._mismatch(index, found)

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """Return the arrays of a shard, verified by the archive's checksums.

        Raises `FileNotFoundError` if it does not exist, and `DataError` if it is damaged or larger than it can be.
        """
        limit = self._num_bytes(len(self.part(index)[0])) + _SLACK
        return read_arrays(self.path(index), self._names(), limit)

    def _num_bytes(self, num: int) -> int:
        """Return the bytes of the arrays of a shard of `num` images."""
        return num * (math.prod(self.shape) + 16)

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
        """Return the images of a shard. Raises as `arrays` does."""
        return self.arrays(index)["images"]


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text, as options take them: 0-63, or 1,5,10-19."""
    if isinstance(numbers, range) and numbers.step == 1:
        return f"{numbers[0]}-{numbers[-1]}"
    values = np.asarray(numbers, dtype=np.int64)
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 2) != 1)
    ends = np.append(starts[1:], len(values)) - 1
    pairs = zip(values[starts].tolist(), values[ends].tolist(), strict=True)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def numbers(text: object) -> "range | list[int] | None":
    """Return the numbers of a text that `ranges` made, at most 10 million, or None for anything else."""
    if not isinstance(text, str) or not _RANGES.fullmatch(text):
        return None
    pairs = [(int(low), int(high or low)) for low, _, high in (part.partition("-") for part in text.split(","))]
    if any(high < low for low, high in pairs) or sum(high - low + 1 for low, high in pairs) > _MAX_NUMBERS:
        return None
    if len(pairs) == 1:
        return range(pairs[0][0], pairs[0][1] + 1)
    return [number for low, high in pairs for number in range(low, high + 1)]


def _bounded(text: str) -> str:
    """Return the text, or the checksum of one that is too long for a document."""
    return text if len(text) <= _MAX_TEXT else hashlib.sha256(text.encode()).hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}.."
