"""The results of an evaluation: metrics.json, which every call adds to, and a table with the paper's numbers."""

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm import __version__
from fastddpm.errors import DataError, UsageError
from fastddpm.pretrained.scores import FILE, check, in_paper, measured, measured_data
from fastddpm.storage.documents import read_object
from fastddpm.storage.files import write_json
from fastddpm.storage.locks import locked

from .context import EvaluationContext

_VERSION = 1


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
        self._checkpoint = {
            "path": str(checkpoint),
            "preset": self._preset,
            "step": context.steps,
            "network": self._network,
        }
        self._added: list[tuple[str, str]] = []  # part and name of each result of this command
        self._document = self._read()

    def _read(self) -> dict[str, Any]:
        """Return the content of the file, or that of a new one. Raises as the class does."""
        try:
            found = read_object(self._path)
            check(found, self._path)
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
                cells = (measured(name, record), in_paper(self._preset, name, split), measured_data(record))
                rows.append(f"| {name}, {split} | {' | '.join(cells)} |")
        lines = ["| metric | measured | paper | data |", "|---|---|---|---|", *rows] if rows else []
        if earlier:
            lines.append(f"{self._path} also holds, of earlier commands: {'; '.join(earlier)}")
        return "\n".join(lines)
