"""Which library computes a product of the network fastest on a CPU, ours, oneDNN or MKL, and with which factors."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.kernels import native
from fastddpm.ops import linear_bf16
from fastddpm.ops.backend import library_chosen
from fastddpm.ops.registry import computed_dtype

CHANNELS_TO_CONVOLVE = 256


def _library_multiplies_bf16() -> bool:
    return library_chosen() and native.has_bf16()


# The compiler asks once, and does not trace it: torch.compiler.assume_constant_result, without importing the compiler.
_library_multiplies_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_bf16(x: Tensor) -> bool:
    """Whether autocast's bfloat16 is left to the compiled library, which keeps activations in float32.

    It is on a CPU that multiplies bfloat16: faster and more exact than activations in bfloat16 and PyTorch's products.
    """
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and x.dtype != torch.float64
        and _library_multiplies_bf16()
    )


def float32_products(x: Tensor, *layers: nn.Module) -> bool:
    """Whether `in_bf16(x)` holds and all weights of the layers are float32; autocast casts others as it needs."""
    return in_bf16(x) and all(p.dtype == torch.float32 for layer in layers for p in layer.parameters())


def float32_if(condition: bool) -> AbstractContextManager[object]:
    """Return a context without autocast, or one that changes nothing."""
    return torch.autocast("cpu", enabled=False) if condition else nullcontext()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the 1x1 convolution of x with weights (K, C, 1, 1)."""
    if not (in_bf16(x) and weight.dtype == torch.float32):
        return F.conv2d(x, weight, bias)
    return linear_bf16(x.float().permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)


def rounded(layer: nn.Linear, tokens: Tensor) -> Tensor:
    """Return the layer's output (N, L, K) for tokens (N, L, C), of factors that are rounded to bfloat16."""
    return linear_bf16(tokens.float(), layer.weight, layer.bias)


def convolves_faster(x: Tensor) -> bool:
    """Whether PyTorch's 1x1 convolution is faster than its product of matrices: on a CPU, in float32.

    The first is oneDNN's and the second MKL's, which takes twice as long on processors that are not Intel's. With one
    thread PyTorch convolves by the second, too; with few channels oneDNN's threads wait for each other.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first: the compiler cannot trace what follows
        return False
    return (
        x.device.type == "cpu"
        and computed_dtype(x) == torch.float32
        and x.shape[1] >= CHANNELS_TO_CONVOLVE
        and torch.backends.mkldnn.is_available()
        and torch.get_num_threads() > 1
    )


def convolved(layer: nn.Linear, tokens: Tensor) -> Tensor:
    """Return the layer's output (N, L, K) for tokens (N, L, C), by a convolution over one image of one row."""
    row = tokens.reshape(1, 1, -1, tokens.shape[2]).permute(0, 3, 1, 2)
    out = F.conv2d(row, layer.weight[:, :, None, None], layer.bias)
    return out.permute(0, 2, 3, 1).reshape(*tokens.shape[:2], -1)
