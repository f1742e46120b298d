"""Steps that were not finite: counted on the device without waiting for it, and reported with their examples."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

_KEPT = 64  # bad steps told at most between two looks


class Tally:
    """Losses since the last line of the log, and bad steps in a row: kept on the device, part of a checkpoint."""

    def __init__(self, device: torch.device, loss_sum: float = 0.0, steps: int = 0, bad_in_a_row: int = 0) -> None:
        self._values = torch.tensor([loss_sum, steps, bad_in_a_row], dtype=torch.float64, device=device)

    def add(self, loss: Tensor, applied: Tensor) -> None:
        """Count one step; 0-d tensors, not waited for."""
        good = applied.to(torch.float64)
        self._values[0] += torch.where(applied, loss, 0.0)
        self._values[1] += good
        self._values[2] = (self._values[2] + 1) * (1 - good)

    def read(self) -> tuple[float, int, int]:
        """(sum of the losses of good steps, their number, bad steps in a row); waits for the device."""
        loss_sum, steps, bad = self._values.tolist()
        return loss_sum, int(steps), int(bad)


class BadSteps:
    """The latest steps that were left out because their loss or gradient was not finite; kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._steps = torch.full((_KEPT,), -1, dtype=torch.int64, device=device)
        self._told = -1

    def add(self, step: int, applied: Tensor) -> None:
        """Note whether `step` was applied, a 0-d bool, not waited for."""
        self._steps = torch.where(
            applied, self._steps, torch.cat([self._steps[1:], torch.full_like(self._steps[:1], step)])
        )

    def new(self) -> list[int]:
        """Those not returned before; waits for the device."""
        found = [step for step in self._steps.tolist() if step > self._told]
        self._told = max([self._told, *found])
        return found


def report(run: Path, steps: dict[int, list[int]]) -> None:
    """Tell of bad steps, each with the examples of its batch: a line on stderr, and one in `run`/not_finite.jsonl."""
    path = run / "not_finite.jsonl"
    with path.open("a", encoding="utf-8") as file:
        for step, examples in steps.items():
            file.write(json.dumps({"step": step, "examples": examples}) + "\n")
            print(f"step {step}: loss or gradient not finite; nothing was changed by it, see {path}", file=sys.stderr)


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None; waits for the device once."""
    floating = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floating:
        return None
    finite = torch.stack([torch.isfinite(t).all() for t in floating.values()]).tolist()
    return next((name for name, good in zip(floating, finite, strict=True) if not good), None)
