"""How the processes of a run share its network: alone, a copy in each (DDP), or the state divided among them (FSDP2).

Whatever the way, each process sees its contiguous part of every global batch, the gradient is that of the global batch
and losses, norms and decisions are the same in all of them.
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

from .optimizer import PAPER_SHARDS
from .signals import Request


class SingleProcess:
    """One process: its network is all there is. The other ways differ in what its methods say."""

    group = SINGLE_PROCESS

    def __init__(self, unet: UNet, config: TrainConfig) -> None:
        self.network: Callable[..., Tensor] = unet

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; gradients are exchanged in that of the last one."""
        yield

    def local_shards(self) -> list[Tensor] | None:
        """What this process holds of each parameter, in its memory; None for all of it."""
        return None

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of the gradient, 0-d, from this process's parts of it."""
        return nn.utils.get_total_norm(gradients)

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their sums over processes, in place."""

    def reduce_request(self, request: Request) -> Request:
        """What the signals of any process ask for. It keeps processes within a step of each other."""
        return request

    def full_tensor(self, name: str, part: Tensor) -> Tensor:
        """All of a tensor that is divided as the parameter `name` is, from each process's part."""
        return part

    def to_dtensor(self, name: str, part: Tensor) -> Tensor:
        """A part of a tensor that is divided as the parameter `name` is, as torch.distributed.checkpoint takes it."""
        return part


class DDP(SingleProcess):
    """A copy of the network in each process; gradients are averaged while the backward pass goes on (DDP)."""

    def __init__(self, unet: UNet, config: TrainConfig, group: ProcessGroup) -> None:
        super().__init__(unet, config)
        self.group = group
        self._ddp: nn.parallel.DistributedDataParallel | None = None
        if config.mode == "standard":
            network = cast(nn.Module, torch.compile(unet)) if config.compile else unet
            # Not static_graph: it fails where the first pass is one without exchange (accumulation).
            self.network = self._ddp = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        elif config.compile:
            self.network = torch.compile(unet)

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

        # On the host, by gloo: a device is not waited for, but a process that is gone is noticed here.
        asked = torch.tensor([request.stop, request.save])
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        stop, save = asked.tolist()
        return Request(stop, bool(save))


class FSDP(DDP):
    """Weights, gradients, moments and averages divided among processes, block by block (FSDP2)."""

    def __init__(self, unet: UNet, config: TrainConfig, group: ProcessGroup) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        SingleProcess.__init__(self, unet, config)
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
        """Those of the network's parameters."""
        return self._parameters.keys()

    def full_tensor(self, name: str, part: Tensor) -> Tensor:
        return self.to_dtensor(name, part).full_tensor()  # type: ignore[attr-defined]

    def local_shard(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a tensor that is divided as the parameter `name` is."""
        from torch.distributed.tensor import distribute_tensor

        p = self._parameters[name]
        device = p.device_mesh.device_type
        # Every process has all of it: nothing is sent.
        return distribute_tensor(whole.to(device), p.device_mesh, p.placements, src_data_rank=None).to_local()

    def to_dtensor(self, name: str, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        p = self._parameters[name]
        return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def make_strategy(unet: UNet, config: TrainConfig, group: ProcessGroup) -> SingleProcess:
    """The processes' way of training `unet`, as `config` says; `UsageError` where their number does not fit."""
    if config.mode == "paper" and PAPER_SHARDS % group.world_size:
        raise UsageError(
            f"mode paper divides its {PAPER_SHARDS} shards among 1, 2, 4 or 8 processes; got {group.world_size}"
        )
    if config.batch % (group.world_size * config.accumulate):
        raise UsageError(
            f"a batch of {config.batch} does not divide among {group.world_size} processes and {config.accumulate} "
            "micro-batches in each"
        )
    if config.checkpoint_blocks:
        _recompute_blocks(unet)
    if group.world_size == 1:
        return SingleProcess(unet.channels_last(), config)
    # FSDP2 takes contiguous parameters only.
    return FSDP(unet, config, group) if config.parallel == "fsdp" else DDP(unet.channels_last(), config, group)


def _recompute_blocks(unet: UNet) -> None:
    """Let residual blocks keep their inputs only, and compute the rest again for the backward pass."""
    for module in unet.modules():
        if isinstance(module, ResBlock):
            # Dropout is a function of the key, so the generators' states need not be kept.
            again = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            module.forward = again  # type: ignore[method-assign]
