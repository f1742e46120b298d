"""What was measured: metrics.json, which every run of the command adds to, and the table with the paper's figures."""

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm import __version__
from fastddpm.errors import DataError, UsageError
from fastddpm.storage.files import write_json

from .context import EvaluationContext

FILE = "metrics.json"
_VERSION = 1

# Tables 1 to 3 of the paper and section 4.1; by preset, figure and split. A split of None: the same for each.
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
    """metrics.json of a directory, for one network's weights.

    {"version": 1, "checkpoint": {..}, "train" and "test": {figure: {..}}, "pictures": {name: {..}}}. Raises
    `UsageError` where the directory holds figures of other weights, and `DataError` for a file that cannot be read.
    """

    def __init__(self, context: EvaluationContext, checkpoint: Path) -> None:
        self._path = context.out / FILE
        self._preset = context.model.preset.name
        network = context.sampler.settings()["network"]
        self._document: dict[str, Any] = {
            "version": _VERSION,
            "checkpoint": {"path": str(checkpoint), "preset": self._preset, "network": network},
        }
        if self._path.exists():
            self._document |= self._found(network)

    def _found(self, network: str) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            of = found["checkpoint"]["network"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._path} cannot be read ({type(error).__name__}); choose another --out") from error
        if of != network:
            raise UsageError(f"{self._path} is of network {of[:12]}, not {network[:12]}; choose another --out")
        return dict(found)

    def add(self, part: str, name: str, record: dict[str, Any]) -> None:
        """Put a figure of a split, or a picture, into the file, in place of an older one; it is whole at any moment."""
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

    def table(self) -> str:
        """All figures of the file in Markdown, the paper's beside them where the preset is one of the paper's."""
        lines = ["| figure | measured | paper | of |", "|---|---|---|---|"]
        for split in ("train", "test"):
            for name, record in self._document.get(split, {}).items():
                paper = _PAPER.get((self._preset, name, split)) or _PAPER.get((self._preset, name, None)) or ""
                lines.append(f"| {name}, {split} | {_measured(name, record)} | {paper} | {_of(record)} |")
        return "\n".join(lines)


def _measured(name: str, record: dict[str, Any]) -> str:
    if name == "bpd":
        error = record["standard_error"]  # one image alone has none
        return _number(record["bits_per_dim"]) + (f" ± {error:.4f}" if error is not None else "") + " bits/dim"
    if name == "rate-distortion":
        return f"{_number(record['rate'])} bits/dim at RMSE {_number(record['rmse'])}"
    return f"{record['value']:.5g}" + (f" ± {record['std']:.3g}" if "std" in record else "")


def _number(value: float | None) -> str:
    """With four decimals; None stands in the file for NaN and infinity, which JSON does not have."""
    return "not finite" if value is None else f"{value:.4f}"


def _of(record: dict[str, Any]) -> str:
    data = record["data"]["name"]
    if "samples" not in record:
        return f"{record['num_images']:,} images of {data}"
    sampling = record["sampling"]
    chain = f"{record['samples']:,} samples, {sampling['method']}, {sampling['steps']} steps"
    return f"{chain}; {record['reference_images']:,} images of {data}"
