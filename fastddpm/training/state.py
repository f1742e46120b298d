"""A run's state in checkpoints: whole, or in shards that all processes write (torch.distributed.checkpoint).

Either kind is read by any number of processes, whichever way they share the network: tensors go by their names.
Averages are whole in both, so that what reads a model need not know of shards. Shards are safetensors, never pickles.
"""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.runtime.distributed import is_lost_peer, on_main
from fastddpm.storage import checkpoint

from .optimizer import Optimizer
from .parallel import FSDP, SingleProcess

TRAINING = "training"  # the part, or what the shards hold: weights, moments and step counts


def average_part(decay: float, decays: tuple[float, ...]) -> str:
    """The part of a checkpoint that holds an average: `model` for the first decay."""
    return "model" if decay == decays[0] else f"model-{decay}"


def save(
    run: Path, step: int, optimizer: Optimizer, documents: dict[str, Any], keep: int, strategy: SingleProcess
) -> Path:
    """Write a checkpoint of a run; `checkpoint.save` says how, and what it raises. All processes call this."""
    state = optimizer.state()
    decays = optimizer.config.decays
    averages: dict[str, dict[str, Tensor]] = {}
    for decay in decays:
        averages[average_part(decay, decays)] = _whole(optimizer.averaged(decay), strategy)
    if not isinstance(strategy, FSDP):
        parts = {**averages, TRAINING: state}
        return on_main(lambda: checkpoint.save(run, step, parts, documents, keep), strategy.group)
    needed = sum(t.nbytes for t in state.values()) * strategy.group.world_size
    with contextlib.ExitStack() as stack:
        temporary = on_main(lambda: stack.enter_context(checkpoint.begun(run, step, needed)), strategy.group)
        _write_shards(temporary, {name: _distributed(name, value, strategy) for name, value in state.items()})
        return on_main(lambda: checkpoint.finish(temporary, step, averages, documents, keep), strategy.group)


def restore(optimizer: Optimizer, saved: checkpoint.Checkpoint, strategy: SingleProcess) -> None:
    """Put the state of a checkpoint into `optimizer`; `UsageError` for an average that the checkpoint lacks."""
    decays = optimizer.config.decays
    for decay in decays:
        part = average_part(decay, decays)
        if part not in saved.tensors:
            raise UsageError(f"{saved.path} holds no average of decay {decay}; leave --ema as it was")
        _fill(optimizer.averaged(decay), saved.tensors[part], strategy, saved.path)
    state = optimizer.state()
    if TRAINING in saved.tensors:
        _fill(state, saved.tensors[TRAINING], strategy, saved.path)
    else:
        _read_shards(saved.path, {name: _distributed(name, value, strategy) for name, value in state.items()}, strategy)


def _parameter(name: str) -> str:
    """The parameter that a tensor of the state, weight.NAME or step.NAME and so on, belongs to."""
    return name.partition(".")[2]


def _distributed(name: str, value: Tensor, strategy: SingleProcess) -> Tensor:
    return value if name.startswith("step.") else strategy.to_dtensor(_parameter(name), value)


def _whole(parts: Mapping[str, Tensor], strategy: SingleProcess) -> dict[str, Tensor]:
    """Each tensor gathered, and kept by the first process, on the CPU where it would not fit beside the others."""
    if not isinstance(strategy, FSDP):
        return dict(parts)
    whole = {}
    for name, part in parts.items():
        tensor = strategy.full_tensor(name, part)
        if strategy.group.is_main:
            whole[name] = tensor.cpu()
    return whole


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], strategy: SingleProcess, path: Path) -> None:
    for name, target in targets.items():
        if name not in values:
            raise DataError(f"{path} lacks {name}, which this network has")
        value = values[name]
        if isinstance(strategy, FSDP) and value.ndim:
            value = strategy.local_shard(name if name in strategy.names else _parameter(name), value)
        if value.shape != target.shape:
            raise DataError(f"{path}: {name} is {tuple(value.shape)}, and this network's {tuple(target.shape)}")
        target.copy_(value)


def _write_shards(directory: Path, state: dict[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True))
    except dcp.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise StorageError(
            f"cannot write shards in {directory}: {reason}; older checkpoints are as they were"
        ) from error


def _read_shards(path: Path, state: dict[str, Tensor], strategy: SingleProcess) -> None:
    import torch.distributed.checkpoint as dcp

    alone = not isinstance(strategy, FSDP)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)
    except (dcp.CheckpointException, KeyError, ValueError, RuntimeError, AssertionError, OSError) as error:
        if is_lost_peer(error):
            raise
        reason = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        raise DataError(f"{path}: the shards do not hold the state of this network: {reason}") from error
