"""The report of `--dry-run`: block shapes, parameters, memory, and the time of one real training step."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastddpm.runtime.progress import announced, duration, log
from fastddpm.unet import AttnBlock, Down, ResBlock, Up

from .parallel import FSDP
from .time_budget import mean_step, sampling_seconds
from .trainer import Trainer

_MIB = 2**20
_MEASURED_S = 1.0


def describe_run(trainer: Trainer, report: Callable[[str], None] = log) -> str:
    """Return a report on the run of a new `trainer`: takes training steps for some seconds and writes no files.

    Every process calls this. `report` gets a line about each part that takes long.
    """
    num_parameters = sum(p.numel() for p in trainer.network.parameters())
    state_bytes = _state_bytes(trainer)
    config, group = trainer.preset.train, trainer.group
    with announced("taking the shapes and the memory of one micro-batch", report):
        shapes, activation_bytes = _activations(_undivided(trainer))
    with announced("compiling and taking the first step" if config.compile else "taking the first step", report):
        trainer.train_step()  # the first step allocates, and compiles
    with announced("timing steps", report):
        seconds = mean_step(trainer, _MEASURED_S)
    sampling = sampling_seconds(trainer.preset, seconds)
    each = f" in each of {group.world_size} processes" if group.world_size > 1 else ""
    lines = [f"{name:<28} {'x'.join(map(str, shape))}" for name, shape in shapes.items()]
    lines += [
        f"parameters    {num_parameters:,}",
        f"state         {state_bytes / _MIB:,.0f} MiB: weights, gradients, Adam, EMA{each}",
        f"activations   {activation_bytes / _MIB:,.0f} MiB kept for the backward pass of one micro-batch{each}",
        f"one step      {seconds:.2g} s on {trainer.device}, batch {config.batch}",
        f"whole run     about {duration(seconds * config.steps + sampling)}: {config.steps:,} steps, and "
        f"{duration(sampling)} for samples",
    ]
    return "\n".join(lines)


def _undivided(trainer: Trainer) -> Trainer:
    """Return `trainer`, or for FSDP2, whose network is gathered block by block, one with the whole network."""
    if not isinstance(trainer.strategy, FSDP):
        return trainer
    train = trainer.preset.train
    alone = dataclasses.replace(train, batch=train.batch // trainer.group.world_size, parallel="ddp")
    return Trainer(dataclasses.replace(trainer.preset, train=alone), trainer.dataset, trainer.device)


def _activations(trainer: Trainer) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the output shape of each block and the bytes kept for the backward pass, for one micro-batch."""
    activations = SavedActivations(trainer.network)
    with block_shapes(trainer.network) as shapes, activations:
        next(trainer.part_losses())
    return shapes, activations.num_bytes


def _state_bytes(trainer: Trainer) -> int:
    """Bytes of weights, gradients, Adam's two moments and the averages that this process holds."""
    optimizer = trainer.optimizer
    of_weights = sum(t.nbytes for name, t in optimizer.state_dict().items() if name.startswith("weight."))
    return of_weights * (4 + len(optimizer.averages) + len(optimizer.power_averages))


class SavedActivations:
    """Count the bytes that autograd saves inside the `with` block, once per storage and without the weights."""

    def __init__(self, network: nn.Module) -> None:
        self._counted = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self.num_bytes = 0

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._counted:
            self._counted.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return tensor


@contextmanager
def block_shapes(network: nn.Module) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield a dictionary that the forward pass inside the `with` block fills: block name to output shape, in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, (ResBlock, AttnBlock, Down, Up)):

            def note(_module: nn.Module, _inputs: object, out: Tensor, name: str = name) -> None:
                shapes[name] = tuple(out.shape)

            handles.append(module.register_forward_hook(note))
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()
