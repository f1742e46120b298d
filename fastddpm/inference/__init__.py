"""The U-Net prepared for inference: what the sampler evaluates a thousand times."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastddpm.config import EngineConfig
from fastddpm.kernels import native as library
from fastddpm.ops.backend import chosen_backend
from fastddpm.unet import UNet

from .fused import FusedUNet
from .native import PreparedUNet

__all__ = ["FusedUNet", "Network", "PreparedUNet", "is_current", "precision_of", "prepare"]

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare(unet: nn.Module, timesteps: Sequence[int], engine: EngineConfig | None = None) -> Network:
    """The fastest way to evaluate `unet(x_t, t, label)` without gradients for t in `timesteps`.

    A `PreparedUNet` for a float32 UNet on the CPU with the compiled library at hand, unless another backend than "auto"
    or "cpu" is forced; a `FusedUNet` for a UNet on another device or in another precision, or where `engine` asks for
    torch.compile or not for the library; otherwise `unet` itself.
    """
    engine = EngineConfig() if engine is None else engine
    kind = _kind(unet, engine)
    if kind is None:
        return unet
    assert isinstance(unet, UNet)
    if kind is PreparedUNet:
        return PreparedUNet(unet, timesteps)
    return FusedUNet(unet, max(timesteps) + 1 if len(timesteps) else 0, engine, precision_of(unet, engine))


def is_current(network: Network, unet: nn.Module, engine: EngineConfig | None = None) -> bool:
    """Whether `network` is what `prepare` would make of `unet` as it is now."""
    kind = _kind(unet, EngineConfig() if engine is None else engine)
    if isinstance(network, PreparedUNet | FusedUNet):
        return type(network) is kind and network.unet is unet and not network.stale()
    return network is unet and kind is None


def precision_of(unet: nn.Module, engine: EngineConfig) -> torch.dtype:
    """What the network is computed in: as `engine` asks, by itself bfloat16 for float32 weights on a GPU."""
    weight = next(unet.parameters())
    if engine.precision != "auto":
        return _PRECISIONS[engine.precision]
    return torch.bfloat16 if weight.device.type == "cuda" and weight.dtype == torch.float32 else weight.dtype


def _kind(unet: nn.Module, engine: EngineConfig) -> type[PreparedUNet] | type[FusedUNet] | None:
    if not isinstance(unet, UNet):
        return None
    on_cpu = all(p.device.type == "cpu" for p in unet.parameters())
    as_it_is = all(p.dtype == precision_of(unet, engine) for p in unet.parameters())
    if not on_cpu or not as_it_is or not engine.native or engine.compile:
        return FusedUNet
    if chosen_backend() not in ("auto", "cpu") or library.unavailable() is not None:
        return None
    return PreparedUNet if next(unet.parameters()).dtype == torch.float32 else None
