"""What `--dry-run` shows: shapes, parameters, memory, and the time of one real step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastddpm.config import Preset
from fastddpm.data import Dataset
from fastddpm.runlog import duration
from fastddpm.trainer import Trainer
from fastddpm.unet import AttnBlock, Down, ResBlock, Up

# Weights, gradients, two Adam moments and the EMA, float32.
BYTES_PER_PARAMETER = 5 * 4
_MIB = 2**20


def describe_run(preset: Preset, dataset: Dataset, device: torch.device) -> str:
    """A report on a run that is not started; computes in memory and writes nothing."""
    trainer = Trainer(preset, dataset, device)
    activations = SavedActivations(trainer.unet)
    with block_shapes(trainer.unet) as shapes, activations:
        next(trainer.part_losses())
    trainer.train_step()  # the first step allocates, and compiles
    started = time.perf_counter()
    loss, _, _ = trainer.train_step()
    loss.item()  # waits for the device
    seconds = time.perf_counter() - started

    num_parameters = sum(p.numel() for p in trainer.unet.parameters())
    config = preset.train
    lines = [f"{name:<28} {'x'.join(map(str, shape))}" for name, shape in shapes.items()]
    lines += [
        f"parameters    {num_parameters:,}",
        f"state         {num_parameters * BYTES_PER_PARAMETER / _MIB:,.0f} MiB: weights, gradients, Adam, EMA",
        f"activations   {activations.num_bytes / _MIB:,.0f} MiB kept for the backward pass of one micro-batch",
        f"one step      {seconds:.2f} s on {device}, batch {config.batch}",
        f"whole run     {duration(seconds * config.steps)} for {config.steps:,} steps, without sampling",
    ]
    return "\n".join(lines)


class SavedActivations:
    """Counts what autograd keeps inside the `with` block: bytes of distinct storages that are not weights."""

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
    """The output shape of each block, in order, filled in by the forward pass inside the `with` block."""
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
