"""What a file says of its images and of what its bits depend on, read from a stranger's JSON."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from fastddpm.errors import DataError

VERSION = 1
MOST_IMAGES = 2**31
_MOST_LANES = 2**16
_MOST_STEPS = 100_000
_MOST_PIXELS = 2**26  # of the images that are coded side by side
_TEXTS = ("conditioning", "network", "process", "outputs", "made", "pixels")
CONDITIONINGS = ("none", "unknown", "coded")


@dataclass(frozen=True)
class Run:
    """`repeats` chunks of `size` images that are coded side by side, in `lanes` lanes."""

    repeats: int
    size: int
    lanes: int


@dataclass(frozen=True)
class Header:
    """`shape`: (C, H, W). `levels`: values of a pixel. `timesteps`: descending. `runs`: the images in groups, in order.

    `decoder`: deviation of p(x_0 | first state), None for the model's own.
    `conditioning`: "none", a network without classes; "unknown", its null label; "coded", the labels are in the stream.
    `network`, `process`, `pixels`: checksums of the weights, of the chain's tables, of the images that come out.
    `outputs`: that of some outputs of the network, `made`: by what machinery.
    """

    shape: tuple[int, int, int]
    levels: int
    timesteps: tuple[int, ...]
    runs: tuple[Run, ...]
    decoder: float | None
    conditioning: str
    network: str
    process: str
    outputs: str
    made: str
    pixels: str

    @property
    def num_images(self) -> int:
        return sum(run.repeats * run.size for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; of the timesteps the first, and how far down each next one is."""
        downwards = [self.timesteps[0], *(-np.diff(self.timesteps)).tolist()]
        runs = [[run.repeats, run.size, run.lanes] for run in self.runs]
        return {"version": VERSION} | asdict(self) | {"timesteps": downwards, "runs": runs}

    @staticmethod
    def of(data: dict[str, Any], where: str) -> "Header":
        """The inverse of `to_dict`; `DataError` unless every field is there, of its type and within bounds."""
        if data.get("version") != VERSION:
            raise DataError(f"{where} has version {data.get('version')!r} of the format; version {VERSION} is read")
        names = {f.name for f in fields(Header)}
        if set(data) != names | {"version"}:
            raise DataError(f"{where}: the header must have the fields {', '.join(sorted(names))}")
        for name in _TEXTS:
            if not isinstance(data[name], str) or not data[name].isprintable() or len(data[name]) > 200:
                raise DataError(f"{where}: {name} must be text of at most 200 characters")
        if data["conditioning"] not in CONDITIONINGS:
            raise DataError(f"{where}: conditioning must be one of {', '.join(CONDITIONINGS)}")
        shape = _numbers(data["shape"], "shape", where, 3, 3)
        levels = _numbers([data["levels"]], "levels", where, 1, 1)[0]
        if not 2 <= levels <= 256:
            raise DataError(f"{where}: levels must be in 2..256; got {levels}")
        downwards = _numbers(data["timesteps"], "timesteps", where, 2, _MOST_STEPS)
        timesteps = tuple((downwards[0] - np.cumsum([0, *downwards[1:]])).tolist())
        if timesteps[-1] < 0:
            raise DataError(f"{where}: the timesteps go below 0")
        runs = tuple(Run(*_numbers(run, "a run", where, 3, 3)) for run in _list(data["runs"], "runs", where, 1, 1000))
        decoder = data["decoder"]
        if decoder is not None and not (type(decoder) is float and 1e-6 < decoder < 10):
            raise DataError(f"{where}: decoder must be a deviation in 1e-6..10 or null")
        texts = {name: data[name] for name in _TEXTS}
        header = Header((shape[0], shape[1], shape[2]), levels, timesteps, runs, decoder, **texts)
        header._check_sizes(where)
        return header

    def _check_sizes(self, where: str) -> None:
        """`DataError` for groups that no encoder makes and that would take memory without end."""
        pixels = self.shape[0] * self.shape[1] * self.shape[2]
        if any(run.lanes > _MOST_LANES or run.lanes & (run.lanes - 1) for run in self.runs):
            raise DataError(f"{where}: lanes must be a power of two, at most {_MOST_LANES}")
        if any(run.size * pixels > _MOST_PIXELS for run in self.runs):
            raise DataError(f"{where}: more than {_MOST_PIXELS:,} pixels are coded side by side")
        if self.num_images > MOST_IMAGES:
            raise DataError(f"{where}: {self.num_images:,} images; at most {MOST_IMAGES:,} are in one file")


def _list(value: Any, name: str, where: str, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise DataError(f"{where}: {name} must be a list of {least} to {most} entries")
    return value


def _numbers(value: Any, name: str, where: str, least: int, most: int) -> list[int]:
    """Positive whole numbers below 2^31."""
    entries = _list(value, name, where, least, most)
    if not all(type(entry) is int and 0 < entry < 2**31 for entry in entries):
        raise DataError(f"{where}: {name} must hold positive whole numbers below 2^31")
    return entries
