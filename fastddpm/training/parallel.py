"""Training strategies: a single process, a replica in each process (DDP), or state sharded among them (FSDP2).

With each of them, a process sees a contiguous part of every global batch, the gradient is that of the global batch,
and losses, norms and decisions are the same in all processes.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastddpm.config import TrainConfig
from fastddpm.errors import UsageError
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from fastddpm.unet import AttnBlock, ResBlock, UNet

from .network import is_plain
from .optimizer import PAPER_SHARDS
from .signals import Request


class SingleProcess:
    """Single-process training. DDP and FSDP override these methods."""

    group = SINGLE_PROCESS

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        self.network: Callable[..., Tensor] = network

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Wrap the forward and backward pass of a micro-batch. Gradients are all-reduced only in the `last` one."""
        yield

    def local_shards(self) -> list[Tensor] | None:
        """Return this process's shard of each parameter, sharing its memory, or None if it holds all of them."""
        return None

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the whole gradient, 0-d, from this process's shards of it."""
        return nn.utils.get_total_norm(gradients)

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace tensors, in place, by their sums over all processes."""

    def reduce_request(self, request: Request) -> Request:
        """Combine the requests of all processes. As a collective, it keeps processes within one step of each other."""
        return request

    def full_tensor(self, name: str, shard: Tensor) -> Tensor:
        """Gather a tensor that is sharded like the parameter `name`. `shard`: this process's shard."""
        return shard

    def to_dtensor(self, name: str, shard: Tensor) -> Tensor:
        """Return a shard as a DTensor that is sharded like the parameter `name`; without FSDP, the tensor itself."""
        return shard


class DDP(SingleProcess):
    """A replica of the network in each process. Gradients are averaged during the backward pass.

    In paper mode they are not: each shard's gradient is clipped before `sum` adds them up.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, group: ProcessGroup) -> None:
        super().__init__(network, config)
        self.group = group
        self._ddp: nn.parallel.DistributedDataParallel | None = None
        if config.mode == "standard":
            inner = cast(nn.Module, torch.compile(network)) if config.compile else network
            # Not static_graph: it fails if the first pass is under no_sync, as with accumulation.
            self.network = self._ddp = nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=True)
            setattr(self._ddp, "takes_noise_key", getattr(network, "takes_noise_key", False))  # noqa: B010
        elif config.compile:
            self.network = torch.compile(network)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last or self._ddp is None else self._ddp.no_sync():
            yield

    def sum(self, tensors: list[Tensor]) -> None:
        import torch.distributed as dist

        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view(t.shape))

    def reduce_request(self, request: Request) -> Request:
        import torch.distributed as dist

        # On the CPU, by gloo: this does not wait for the device, and it notices a lost process.
        asked = torch.tensor([request.stop, request.save])
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        stop, save = asked.tolist()
        return Request(stop, bool(save))


class FSDP(DDP):
    """Weights, gradients, moments and averages sharded among the processes, block by block (FSDP2)."""

    def __init__(self, unet: UNet, config: TrainConfig, group: ProcessGroup) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        SingleProcess.__init__(self, unet, config)
        self.network = channels_last_input(unet)
        self.group = group
        mesh = init_device_mesh(next(unet.parameters()).device.type, (group.world_size,))
        for module in unet.modules():
            if isinstance(module, (ResBlock, AttnBlock)):
                fully_shard(module, mesh=mesh)
        self._root: Any = fully_shard(unet, mesh=mesh)
        self._parameters: dict[str, Any] = dict(unet.named_parameters())

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(last)
        yield

    def local_shards(self) -> list[Tensor]:
        return [p.detach().to_local() for p in self._parameters.values()]

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        square = nn.utils.get_total_norm(gradients).square()
        self.sum([square])
        return square.sqrt()

    @property
    def names(self) -> Collection[str]:
        """The names of the network's parameters."""
        return self._parameters.keys()

    def full_tensor(self, name: str, shard: Tensor) -> Tensor:
        return self.to_dtensor(name, shard).full_tensor()  # type: ignore[attr-defined]

    def local_shard(self, name: str, whole: Tensor) -> Tensor:
        """Return this process's shard of a whole tensor, sharded like the parameter `name`."""
        from torch.distributed.tensor import distribute_tensor

        p = self._parameters[name]
        device = p.device_mesh.device_type
        # src_data_rank=None: every process has the whole tensor, so nothing is sent.
        return distribute_tensor(whole.to(device), p.device_mesh, p.placements, src_data_rank=None).to_local()

    def to_dtensor(self, name: str, shard: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        p = self._parameters[name]
        return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def channels_last_input(unet: UNet) -> Callable[..., Tensor]:
    """Return `unet`, given x_t in channels_last, in which every image of the network then is.

    For weights that are not: cuDNN takes the layout of either operand, and an image is larger than a weight.
    """

    def run(x_t: Tensor, *args: Any, **options: Any) -> Tensor:
        # Not x_t.contiguous(..): an image of one channel counts as dense in both layouts, and would stay as it is.
        return cast(Tensor, unet(torch.empty_like(x_t, memory_format=torch.channels_last).copy_(x_t), *args, **options))

    run.takes_noise_key = True  # type: ignore[attr-defined]
    return run


def make_strategy(network: nn.Module, config: TrainConfig, group: ProcessGroup) -> SingleProcess:
    """Return the strategy that `config` chooses for `network`.

    Raises `UsageError` as `check_processes` does, and for `parallel` fsdp or `checkpoint_blocks` with a network that is
    no plain `UNet`, whose blocks they need.
    """
    check_processes(config, group)
    if not is_plain(network):
        if config.checkpoint_blocks or (config.parallel == "fsdp" and group.world_size > 1):
            option = "checkpoint_blocks" if config.checkpoint_blocks else "parallel fsdp"
            name = type(network).__name__
            raise UsageError(f"{option} is for a UNet as it is configured, not for this {name}; leave it out")
        return SingleProcess(network, config) if group.world_size == 1 else DDP(network, config, group)
    assert isinstance(network, UNet)
    if config.checkpoint_blocks:
        _recompute_blocks(network)
    if group.world_size == 1:
        return SingleProcess(network.channels_last(), config)
    # FSDP2 takes contiguous parameters only.
    return FSDP(network, config, group) if config.parallel == "fsdp" else DDP(network.channels_last(), config, group)


def check_processes(config: TrainConfig, group: ProcessGroup) -> None:
    """Raise `UsageError` if the batch does not divide evenly among the processes."""
    if config.mode == "paper" and PAPER_SHARDS % group.world_size:
        raise UsageError(
            f"mode paper divides its {PAPER_SHARDS} shards among 1, 2, 4 or 8 processes; got {group.world_size}"
        )
    if config.batch % (group.world_size * config.accumulate):
        raise UsageError(
            f"batch must be a multiple of processes x accumulate, {group.world_size} x {config.accumulate}; got "
            f"{config.batch}"
        )


def _recompute_blocks(unet: UNet) -> None:
    """Checkpoint activations: residual blocks keep only their inputs and recompute the rest in the backward pass."""
    for module in unet.modules():
        if isinstance(module, ResBlock):
            # Dropout masks are a function of the key, so no generator state needs to be kept.
            again = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            module.forward = again  # type: ignore[method-assign]
