"""Snapshots of power-function averages during training, and from them an average of any length and at any step.

RUN/snapshots/step-00005000/
    power-0.05.safetensors, power-0.1.safetensors   the averages, float16 or float32
    constants.safetensors                           buffers and frozen parameters, if the network has any
    config.json data.json manifest.json ..          as in a checkpoint (storage/checkpoint.py)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddpm.config import TrainConfig
from fastddpm.errors import DataError, UsageError, refuse
from fastddpm.pretrained.parts import PowerAverage
from fastddpm.pretrained.run import check_weights
from fastddpm.runtime.checks import sigma_rel_problems
from fastddpm.runtime.distributed import ProcessGroup, on_main
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import to_dict

from .optimizer import Optimizer
from .parallel import SingleProcess
from .power_average import combine
from .state import gather, power_part

FOLDER = "snapshots"
CONSTANTS = "constants"
_LENGTHS = "lengths"
_NEGLIGIBLE = 1e-10  # a coefficient below which a snapshot is not read


def due(config: TrainConfig, step: int) -> bool:
    """Return whether a snapshot is stored after step number `step` = 1, 2, .."""
    every = config.ema_snapshots
    return every > 0 and (step % every == 0 or step == config.steps)


def begin(run: Path, step: int, group: ProcessGroup) -> None:
    """Remove the snapshots of steps after `step`, from which training goes on: those steps are taken again.

    Every process calls this. Raises `UsageError` if training begins, at step 0, where another run has left checkpoints
    and snapshots.
    """

    def remove() -> None:
        later = [found for found in checkpoint.steps_in(run / FOLDER) if found > step]
        if later and step == 0 and checkpoint.newest_step(run) is not None:
            raise UsageError(f"{run} holds the checkpoints and snapshots of another run; choose another directory")
        checkpoint.remove_after(run / FOLDER, step)

    on_main(remove, group)


def save(
    run: Path,
    step: int,
    optimizer: Optimizer,
    documents: dict[str, Any],
    strategy: SingleProcess,
    constants: Mapping[str, Tensor],
) -> Path:
    """Write the snapshot of `step`, whole or not at all, and return its directory. Every process calls this.

    Raises `StorageError` if it cannot be written.
    """
    parts = {
        power_part(length): gather(optimizer.power_averaged(length), strategy) for length in optimizer.power_averages
    }
    if optimizer.config.ema_snapshot_dtype == "float16":
        parts = {part: {name: _halved(tensor) for name, tensor in tensors.items()} for part, tensors in parts.items()}
    if constants:
        parts[CONSTANTS] = dict(constants)
    documents = documents | {_LENGTHS: [*optimizer.power_averages]}
    return on_main(lambda: checkpoint.save(run, step, parts, documents, None, FOLDER), strategy.group)


def _halved(tensor: Tensor) -> Tensor:
    """Return a tensor as float16, or as it is if float16 cannot hold its largest values."""
    half = tensor.to(torch.float16)
    return half if bool(torch.isfinite(half).all()) else tensor


@dataclass(frozen=True, eq=False)
class Averaged:
    """The weights of a power-function average at `step`, float32 by name, with the documents of its snapshots."""

    step: int
    weights: dict[str, Tensor]
    documents: dict[str, Any]
    average: PowerAverage

    def save(self, out: Path) -> Path:
        """Write it into the directory `out` as a checkpoint, which `fastddpm.load` reads. Raises `StorageError`."""
        documents = self.documents | {"average": to_dict(self.average)}
        return checkpoint.save(out, self.step, {"model": self.weights}, documents, 1)


def average(run: Path, sigma_rel: float, step: int | None = None) -> Averaged:
    """Return the power-function average of length `sigma_rel` at `step`, reconstructed from the snapshots of a run.

    `step`: 1 to the step of the last snapshot, also between two snapshots. Default: the last. Used are the snapshots
    up to `step`, and the next one if there is none of that step. Sums are float64.

    Raises `UsageError` for a run without snapshots, or a length or step out of range, and `DataError` if a snapshot is
    damaged.
    """
    stored = _stored(run)
    last = max(stored)
    wanted = last if step is None else step
    problems = [*sigma_rel_problems(sigma_rel, "sigma_rel")]
    if not 1 <= wanted <= last:
        problems.append(f"step must be in 1..{last}, which the snapshots of {run} reach; got {wanted}")
    refuse(problems)
    next_one = min(found for found in stored if found >= wanted)
    documents: dict[str, Any] = {}
    averages = []
    for at in (found for found in stored if found <= next_one):
        documents = checkpoint.load(stored[at], parts=()).documents
        averages += [(at, length) for length in _lengths(documents, stored[at])]
    combination = combine(averages, wanted, sigma_rel)
    sums: dict[str, Tensor] = {}
    for (at, length), coefficient in zip(averages, combination.coefficients, strict=True):
        if abs(coefficient) < _NEGLIGIBLE:
            continue
        part = power_part(length)
        tensors = checkpoint.load(stored[at], parts=(part,)).tensors[part]
        if not sums:
            sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in tensors.items()}
        check_weights(sums, tensors, stored[at] / f"{part}.safetensors", "those of the other snapshots")
        for name, tensor in tensors.items():
            sums[name].add_(tensor.to(torch.float64), alpha=coefficient)
    weights = {name: total.to(torch.float32) for name, total in sums.items()}
    if (stored[next_one] / f"{CONSTANTS}.safetensors").exists():
        weights |= checkpoint.load(stored[next_one], parts=(CONSTANTS,)).tensors[CONSTANTS]
    del documents[_LENGTHS]
    return Averaged(wanted, weights, documents, PowerAverage(sigma_rel, combination.error, len(averages)))


def _stored(run: Path) -> dict[int, Path]:
    """Return the snapshots of a run by their steps. Raises `UsageError` if there is none."""
    if not run.is_dir():
        raise UsageError(f"no run at {run}; give the directory of a run that was trained with --ema-snapshots")
    stored = checkpoint.steps_in(run / FOLDER)
    if not stored:
        raise UsageError(f"{run} holds no snapshots; train with --ema-snapshots N to store one every N steps")
    return stored


def _lengths(documents: Mapping[str, Any], path: Path) -> list[float]:
    lengths = documents.get(_LENGTHS)
    if not isinstance(lengths, list) or not lengths or not all(type(each) is float for each in lengths):
        raise DataError(f"{path} is no snapshot: it does not tell the lengths of its averages")
    problems = [problem for each in lengths for problem in sigma_rel_problems(each, f"{path / _LENGTHS}.json: length")]
    if problems:
        raise DataError(problems[0])
    return lengths
