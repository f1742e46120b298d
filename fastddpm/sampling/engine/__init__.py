"""The U-Net prepared for inference, as the sampler evaluates it at every step."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from fastddpm.config import EngineConfig
from fastddpm.errors import UsageError
from fastddpm.kernels import native as library
from fastddpm.ops.backend import library_chosen, obstacles
from fastddpm.runtime.network import Network, precision_of_weights
from fastddpm.unet import UNet

from .current import departure
from .fused import FusedUNet
from .native import PreparedUNet

__all__ = ["PRECISIONS", "FusedUNet", "Network", "PreparedUNet", "is_current", "precision_of", "prepare"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare(unet: nn.Module, timesteps: Sequence[int], engine: EngineConfig | None = None) -> Network:
    """Return the fastest way to evaluate `unet(x_t, t, label)` without gradients for t in `timesteps`.

    - `PreparedUNet`, for a float32 UNet on the CPU in precision fp32 or bf16, if the compiled library was built, the
      chosen backend is "auto" or "cpu", and `engine` neither forbids the library nor asks for torch.compile;
    - `FusedUNet`, for another UNet that is not on the CPU or is computed in another precision than its weights have, or
      if `engine` asks for torch.compile or 8-bit convolutions or forbids the compiled library;
    - `unet` itself otherwise, so any other network that follows the protocol in runtime/network.py.

    bf16 in the compiled library needs a processor that multiplies bfloat16. Without, float32 is faster as well as more
    exact: the network is computed in it, and a warning says so.

    `engine`: default `EngineConfig()`. Raises `UsageError` if 8-bit convolutions were asked for and cannot run here. If
    they can, a warning says how much they change the output.
    """
    engine = EngineConfig() if engine is None else engine
    kind = _kind(unet, engine)
    if kind is None:
        _report_departure(unet, engine)
        return unet
    assert isinstance(unet, UNet)
    if engine.fp8:
        _check_fp8(next(unet.parameters()).device)
    if kind is PreparedUNet:
        precision = _engine_precision(unet, engine)
        if engine.precision == "bf16" and precision == torch.float32:
            warnings.warn(
                "this processor has no bf16 instructions (AVX512-BF16), so the network is computed in fp32, which is "
                "faster here; --precision fp32 says the same without this line",
                stacklevel=3,
            )
        return PreparedUNet(unet, timesteps, precision)
    rows = max(timesteps) + 1 if len(timesteps) else 0
    network = FusedUNet(unet, rows, engine, _engine_precision(unet, engine))
    if engine.fp8:
        _report_fp8(network, FusedUNet(unet, rows, replace(engine, fp8=False), network.dtype), max(rows - 1, 0))
    return network


def is_current(network: Network, unet: nn.Module, engine: EngineConfig | None = None) -> bool:
    """Whether `network` is what `prepare` would return for `unet` and its present weights."""
    engine = EngineConfig() if engine is None else engine
    kind = _kind(unet, engine)
    if kind is None or not isinstance(network, PreparedUNet | FusedUNet):
        return network is unet and kind is None
    if isinstance(network, PreparedUNet) and network.precision != _engine_precision(unet, engine):
        return False
    return type(network) is kind and network.unet is unet and not network.stale()


def precision_of(unet: nn.Module, engine: EngineConfig) -> torch.dtype:
    """Return the precision that the network is computed in.

    `engine.precision` "auto": bfloat16 for float32 weights on a GPU, otherwise the weights' own. A network that is run
    as it is (`departure`) is computed in that of its weights, and bf16 in the compiled library on a processor without
    such instructions is float32.
    """
    return precision_of_weights(unet) if departure(unet) is not None else _engine_precision(unet, engine)


def _engine_precision(unet: nn.Module, engine: EngineConfig) -> torch.dtype:
    weight = next(unet.parameters())
    if engine.precision == "auto":
        return torch.bfloat16 if weight.device.type == "cuda" and weight.dtype == torch.float32 else weight.dtype
    if engine.precision == "bf16" and _in_library(unet, engine) and not library.has_bf16():
        return torch.float32
    return PRECISIONS[engine.precision]


def _in_library(unet: nn.Module, engine: EngineConfig) -> bool:
    """Return whether the compiled library evaluates the network."""
    if not engine.native or engine.compile or engine.fp8 or engine.precision == "fp16":
        return False
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in unet.parameters()):
        return False
    return library_chosen()


def _kind(unet: nn.Module, engine: EngineConfig) -> type[PreparedUNet] | type[FusedUNet] | None:
    if departure(unet) is not None:
        return None
    assert isinstance(unet, UNet)
    if _in_library(unet, engine):
        return PreparedUNet
    wanted = _engine_precision(unet, engine)
    as_it_is = all(p.device.type == "cpu" and p.dtype == wanted for p in unet.parameters())
    return None if as_it_is and engine.native and not engine.compile and not engine.fp8 else FusedUNet


def _report_departure(unet: nn.Module, engine: EngineConfig) -> None:
    """Warn that a network with code of its own is run as it is. Raises `UsageError` for what only an engine can do."""
    reason = departure(unet)
    if reason is None:
        return
    other = engine.precision != "auto" and PRECISIONS[engine.precision] != precision_of_weights(unet)
    asked = {"fp8": engine.fp8, "compile": engine.compile, "precision": other}
    for name, given in asked.items():
        if given:
            raise UsageError(
                f"engine option {name} is for a UNet as it is configured, and this network is run as it is, since "
                f"{reason}; leave the option out, or convert the network yourself"
            )
    if not isinstance(unet, UNet):  # of another network nobody expects an engine
        return
    warnings.warn(
        f"the network is run as it is, without the prepared engine, since {reason}; on a CPU that takes "
        "about 2.3 times as long",
        stacklevel=5,
    )


def _check_fp8(device: torch.device) -> None:
    """Raise `UsageError`, with the reason, if 8-bit convolutions cannot run on `device`."""
    if device.type != "cuda":
        raise UsageError(f"8-bit convolutions (fp8) need a GPU that has them, sm_89 or later; got device {device.type}")
    reasons = obstacles("conv3x3_fp8", "cuda")
    if reasons:
        raise UsageError(f"8-bit convolutions (fp8) do not run here: {reasons[0]}")


def _report_fp8(network: FusedUNet, exact: FusedUNet, last: int) -> None:
    """Warn how much 8-bit convolutions change the outputs, measured on noise at three timesteps up to `last`.

    `exact`: the same network without 8-bit convolutions.
    """
    config, device = network.unet.config, next(network.unet.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    x_t = torch.randn((4, *config.image_shape), generator=generator, device=device)
    label = torch.zeros(4, dtype=torch.int64, device=device) if config.num_classes else None
    errors = []
    for t in (last // 10, last // 2, last):
        ours, expected = (each(x_t, torch.tensor([t], device=device).expand(4), label) for each in (network, exact))
        errors.append(f"{float((ours - expected).float().norm() / expected.float().norm()):.1%} at t = {t}")
    warnings.warn(
        f"8-bit convolutions change the network's output by {', '.join(errors)} (2-norm, noise as x_t)", stacklevel=4
    )
