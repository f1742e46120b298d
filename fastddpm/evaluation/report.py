"""The results of an evaluation: metrics.json, which every call adds to, and a table with the paper's numbers."""

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm import __version__
from fastddpm.errors import DataError, UsageError
from fastddpm.storage.documents import read_object
from fastddpm.storage.files import write_json
from fastddpm.storage.locks import locked

from .context import EvaluationContext

FILE = "metrics.json"
_VERSION = 1

# The paper's numbers, tables 1 to 3 and section 4.1, by preset, metric and split. A split of None: any split.
_PAPER: dict[tuple[str, str, str | None], str] = {
    ("cifar10", "fid", "train"): "3.17",
    ("cifar10", "fid", "test"): "5.24",
    ("cifar10", "inception_score", None): "9.46 ± 0.11",
    ("cifar10", "bpd", "train"): "≤ 3.72",
    ("cifar10", "bpd", "test"): "≤ 3.75",
    ("cifar10", "rate-distortion", "test"): "1.78 bits/dim at RMSE 0.95",
    ("lsun256", "fid", "train"): "Church 7.89, Bedroom 6.36, Cat 19.75",
    ("lsun256-large", "fid", "train"): "Bedroom 4.90",
}


class Report:
    """The file metrics.json of a directory, which holds results of one network's weights.

    {"version": 1, "checkpoint": {..}, "train" and "test": {metric: {..}}, "pictures": {name: {..}}}. Several commands
    may add to it at once. Raises `UsageError` if the file holds results of other weights, and `DataError` if it is
    damaged.
    """

    def __init__(self, context: EvaluationContext, checkpoint: Path) -> None:
        self._path = context.out / FILE
        self._preset = context.name
        self._network: str = context.sampler.settings()["network"]
        self._checkpoint = {"path": str(checkpoint), "preset": self._preset, "network": self._network}
        self._added: list[tuple[str, str]] = []  # part and name of each result of this command
        self._document = self._read()

    def _read(self) -> dict[str, Any]:
        """Return the content of the file, or that of a new one. Raises as the class does."""
        try:
            found = read_object(self._path)
            _check(found, self._path)
        except FileNotFoundError:
            return {"version": _VERSION, "checkpoint": self._checkpoint}
        except DataError as error:
            raise DataError(f"{error}; choose another --out, or move the file away") from None
        network = found["checkpoint"]["network"]
        if network != self._network:
            raise UsageError(
                f"{self._path} holds results of network {network[:12]}, not {self._network[:12]}; choose another --out"
            )
        return found

    def add(self, part: str, name: str, record: dict[str, Any]) -> None:
        """Add a metric of the split `part`, or a picture, to the file, which is replaced atomically.

        An older result of the same name is overwritten; what other commands have added meanwhile stays.
        """
        lock = self._path.with_name(f".{FILE}.lock")
        with locked(lock, str, on_wait=lambda: None):
            self._document = self._read()
            self._document.setdefault(part, {})[name] = record | {
                "versions": {
                    "fastddpm": __version__,
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                    "python": platform.python_version(),
                },
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            write_json(self._path, self._document)
        self._added.append((part, name))

    def table(self) -> str:
        """Return a Markdown table of the metrics that were added, with the paper's numbers for its presets.

        A line below it names the earlier metrics in the file with their dates. Without metrics there is no table.
        """
        rows, earlier = [], []
        for split in ("train", "test"):
            for name, record in self._document.get(split, {}).items():
                if (split, name) not in self._added:
                    earlier.append(f"{name}, {split} ({record['date'].partition('T')[0]})")
                    continue
                paper = _PAPER.get((self._preset, name, split)) or _PAPER.get((self._preset, name, None)) or ""
                rows.append(f"| {name}, {split} | {_measured(name, record)} | {paper} | {_data(record)} |")
        lines = ["| metric | measured | paper | data |", "|---|---|---|---|", *rows] if rows else []
        if earlier:
            lines.append(f"{self._path} also holds, of earlier commands: {'; '.join(earlier)}")
        return "\n".join(lines)


def _measured(name: str, record: dict[str, Any]) -> str:
    """Format the value of a metric, with its error if it has one."""
    if name == "bpd":
        error = record["standard_error"]  # None for a single image
        return _number(record["bits_per_dim"]) + (f" ± {error:.4f}" if error is not None else "") + " bits/dim"
    if name == "rate-distortion":
        return f"{_number(record['rate'])} bits/dim at RMSE {_number(record['rmse'])}"
    return f"{record['value']:.5g}" + (f" ± {record['std']:.3g}" if "std" in record else "")


def _number(value: float | None) -> str:
    """Format with four decimals. None stands for NaN and infinity, which JSON cannot hold."""
    return "not finite" if value is None else f"{value:.4f}"


def _data(record: dict[str, Any]) -> str:
    """Describe the images and samples that were measured."""
    data = record["data"]["name"]
    if "samples" not in record:
        return f"{record['num_images']:,} images of {data}"
    sampling = record["sampling"]
    chain = f"{record['samples']:,} samples, {sampling['method']}, {sampling['steps']} steps"
    count = record["reference_images"]  # None if only statistics are known, and not of how many images
    return f"{chain}; {data}" if count is None else f"{chain}; {count:,} images of {data}"


def _check(document: dict[str, Any], path: Path) -> None:
    """Raise `DataError` unless a metrics.json has the fields, of the types, that the table is made of."""
    checkpoint = document.get("checkpoint")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("network"), str):
        raise DataError(f"{path} is damaged: it does not name its network")
    for part in ("train", "test", "pictures"):
        records = document.get(part, {})
        if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
            raise DataError(f"{path} is damaged: {part} holds no results by name")
        for name, record in records.items() if part != "pictures" else ():
            try:
                _measured(name, record)
                _data(record)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path} is damaged: {part} has no valid {name} ({error!r:.100})") from error
