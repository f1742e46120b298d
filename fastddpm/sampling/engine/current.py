"""Whether a prepared network still computes what the user's network does: its weights, and its code.

The prepared networks read parameters, and know the paper's U-Net. Weights can be changed without PyTorch's version
counters noticing (`p.data.copy_`, `torch._foreach_*` on `.data`, a NumPy view), so they are compared by a digest of
every byte. A subclass, a hook, a replaced layer (LoRA, a parametrization) or a replaced forward is code that a prepared
network would leave out, so such a network is run as it is.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fastddpm.config import UNetConfig
from fastddpm.kernels import native
from fastddpm.unet import FORWARDS, UNet, meta_network

_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # odd, as int64


def departure(network: nn.Module) -> str | None:
    """Return the first way in which `network` is not the U-Net of its configuration alone, in words, or None."""
    if type(network) is not UNet:
        return f"it is a {type(network).__name__}, not a UNet"
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return "a hook is registered for the forward pass of every module"
    expected, found = _modules_of(network.config), dict(network.named_modules())
    for name in [*expected, *(name for name in found if name not in expected)]:
        where = f"its {name}" if name else "it"
        if name not in found:
            return f"{where} was removed"
        if name not in expected:
            return f"{where} was added"
        module = found[name]
        if type(module) is not expected[name]:
            return f"{where} is a {type(module).__name__}, not a {expected[name].__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{where} has a forward hook"
        if "forward" in vars(module) or type(module).forward is not FORWARDS[type(module)]:
            return f"the forward of {where} was replaced"
    return None


@functools.lru_cache(maxsize=8)
def _modules_of(config: UNetConfig) -> dict[str, type[nn.Module]]:
    """Return the type of each module of a network of `config`, by name."""
    return {name: type(module) for name, module in meta_network(config).named_modules()}


class Weights:
    """The weights of a network at one moment: where they lie, and a digest of all their bytes."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._places = _places(network)
        self._parameters = [parameter.detach() for parameter in network.parameters()]
        self._memory = [_memory_of(parameter) for parameter in self._parameters]
        self._digest = digest(self._memory)

    def changed(self) -> bool:
        """Whether a parameter was written to or replaced since; reads all of them unless the counters tell already."""
        if _places(self._network) != self._places:
            return True
        pairs = zip(self._parameters, self._memory, strict=True)  # views, but for those with gaps, which are copies
        return digest([m if m.data_ptr() == p.data_ptr() else _memory_of(p) for p, m in pairs]) != self._digest


def _places(network: nn.Module) -> list[tuple[object, ...]]:
    """Return address, version counter, and what is seen of the memory there, of each parameter."""
    return [
        (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.shape, p.stride())
        for p in network.parameters()
    ]


def digest(dense: Sequence[Tensor]) -> int:
    """Return a 64-bit digest of the bytes of dense tensors, uint8 (n,), on any devices. It is not cryptographic."""
    if native.unavailable() is None and all(memory.device.type == "cpu" for memory in dense):
        return native.digest(dense)
    # Side by side: for each device a few kernels, and one number that the host waits for.
    total = 0
    for device in sorted({memory.device for memory in dense}, key=str):
        total = (total * 31 + _plain_digest(torch.cat([m for m in dense if m.device == device]))) % 2**64
    return total


def _memory_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in the order of its memory, uint8 (n,); a view if it is dense."""
    order = sorted(range(tensor.ndim), key=lambda i: (tensor.stride(i), tensor.shape[i]), reverse=True)
    permuted = tensor.permute(order)
    return permuted.contiguous().reshape(-1).view(torch.uint8)


def _plain_digest(memory: Tensor) -> int:
    """The digest in PyTorch's operations: sums of 32-bit words along the rows and the columns of a square, weighted."""
    words = F.pad(memory, (0, -len(memory) % 4)).view(torch.int32)
    side = max(1, int(len(words) ** 0.5))
    rows = words[: len(words) // side * side].reshape(-1, side)
    sums = [rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64), words[rows.numel() :].to(torch.int64)]
    total = torch.zeros((), dtype=torch.int64, device=memory.device)
    for part in sums:
        total = total * 31 + (part * (2 * torch.arange(len(part), device=memory.device) + 1) * _MULTIPLIER).sum()
    return int(total)
