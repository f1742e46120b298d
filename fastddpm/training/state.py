"""A run's state in checkpoints: whole, or in shards that all processes write (torch.distributed.checkpoint).

Both kinds can be read with any strategy and world size, because tensors are found by name. Averages are whole in both,
so code that reads a model never meets shards. Shards are safetensors files, never pickles.
"""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.runtime.distributed import is_lost_peer, on_main
from fastddpm.storage import checkpoint

from .optimizer import Optimizer, copy_tensors
from .parallel import FSDP, SingleProcess

TRAINING = "training"  # the part with weights, moments and step counts; with FSDP the shards hold these instead


def average_part(decay: float, decays: tuple[float, ...]) -> str:
    """Return the name of the checkpoint part with an average: `model` for the first decay, else `model-DECAY`."""
    return "model" if decay == decays[0] else f"model-{decay}"


def power_part(sigma_rel: float) -> str:
    """Return the name of the part with a power-function average, of a checkpoint or a snapshot."""
    return f"power-{sigma_rel}"


def save(
    run: Path,
    step: int,
    optimizer: Optimizer,
    documents: dict[str, Any],
    keep: int,
    strategy: SingleProcess,
    constants: Mapping[str, Tensor],
) -> Path:
    """Write a checkpoint of a run and return its directory; raises as `checkpoint.save`. Every process calls this.

    `constants`: the network's buffers and frozen parameters, which each average is saved with.
    """
    state = optimizer.state_dict()
    decays = optimizer.config.decays
    averages: dict[str, dict[str, Tensor]] = {}
    for decay in decays:
        averages[average_part(decay, decays)] = gather(optimizer.averaged(decay), strategy) | dict(constants)
    for sigma_rel in optimizer.power_averages:
        averages[power_part(sigma_rel)] = gather(optimizer.power_averaged(sigma_rel), strategy)
    if not isinstance(strategy, FSDP):
        parts = {**averages, TRAINING: state}
        return on_main(lambda: checkpoint.save(run, step, parts, documents, keep), strategy.group)
    needed = sum(t.nbytes for t in state.values()) * strategy.group.world_size
    with contextlib.ExitStack() as stack:
        temporary = on_main(lambda: stack.enter_context(checkpoint.begin(run, step, needed)), strategy.group)
        _write_shards(temporary, {name: _to_dtensor(name, value, strategy) for name, value in state.items()})
        return on_main(lambda: checkpoint.finish(temporary, step, averages, documents, keep), strategy.group)


def restore(
    optimizer: Optimizer, saved: checkpoint.Checkpoint, strategy: SingleProcess, constants: Mapping[str, Tensor]
) -> None:
    """Load the state of a checkpoint into `optimizer` and `constants`, which are as for `save`.

    Raises `UsageError` if the checkpoint lacks one of the averages, and `DataError` if it lacks another tensor or has
    one of another shape.
    """
    decays = optimizer.config.decays
    for decay in decays:
        part = average_part(decay, decays)
        if part not in saved.tensors:
            raise UsageError(f"{saved.path} holds no average of decay {decay}; keep --ema as it was when the run began")
        averaged = optimizer.averaged(decay)
        copy_tensors(averaged, _local(saved.tensors[part], averaged, strategy), saved.path)
    for sigma_rel in optimizer.power_averages:
        part, averaged = power_part(sigma_rel), optimizer.power_averaged(sigma_rel)
        if part not in saved.tensors:
            raise UsageError(
                f"{saved.path} holds no power-function average of length {sigma_rel}, which is of all steps from the "
                "first; keep --ema-snapshot-lengths as they were when the run began, or set --ema-snapshots 0"
            )
        copy_tensors(averaged, _local(saved.tensors[part], averaged, strategy), saved.path)
    copy_tensors(constants, saved.tensors[average_part(decays[0], decays)], saved.path)
    state = optimizer.state_dict()
    if TRAINING in saved.tensors:
        optimizer.load_state_dict(_local(saved.tensors[TRAINING], state, strategy), saved.path)
    else:
        _read_shards(saved.path, {name: _to_dtensor(name, value, strategy) for name, value in state.items()}, strategy)


def _parameter(name: str) -> str:
    """Return NAME, the parameter, from a name of the state dict: weight.NAME, step.NAME and so on."""
    return name.partition(".")[2]


def _to_dtensor(name: str, value: Tensor, strategy: SingleProcess) -> Tensor:
    return value if name.startswith("step.") else strategy.to_dtensor(_parameter(name), value)


def gather(shards: Mapping[str, Tensor], strategy: SingleProcess) -> dict[str, Tensor]:
    """Gather each tensor. With FSDP, rank 0 keeps them, on the CPU to save device memory, and the others none."""
    if not isinstance(strategy, FSDP):
        return dict(shards)
    whole = {}
    for name, shard in shards.items():
        tensor = strategy.full_tensor(name, shard)
        if strategy.group.is_main:
            whole[name] = tensor.cpu()
    return whole


def _local(
    tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], strategy: SingleProcess
) -> Mapping[str, Tensor]:
    """Return this process's shard of each tensor named in `targets`; without FSDP, `tensors` itself."""
    if not isinstance(strategy, FSDP):
        return tensors
    shards = {}
    for name in targets:
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.ndim:  # step counts, 0-d, are not sharded
            parameter = name if name in strategy.names else _parameter(name)
            # On the CPU: a shard may be a view that keeps the whole tensor in the device's memory.
            tensor = strategy.local_shard(parameter, tensor).cpu()
        shards[name] = tensor
    return shards


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
