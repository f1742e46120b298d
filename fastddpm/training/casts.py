"""The weights of a network in bfloat16, cast all at once: torch.autocast launches a kernel for each, and its gradient.

The numbers are those of autocast: weights are rounded for each forward pass, and their gradients, in bfloat16, are
widened for the optimizer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

_CAST = (nn.Conv2d, nn.Linear)  # the layers that autocast runs in bfloat16


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_copies(weights, torch.bfloat16))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = iter(_copies([gradient for gradient in gradients if gradient is not None], torch.float32))
        return tuple(None if gradient is None else next(wide) for gradient in gradients)


def _copies(tensors: Any, dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def with_cast_weights(network: nn.Module) -> Callable[..., Tensor]:
    """Return `network`, for calls under torch.autocast in bfloat16, with the weights of its layers cast at once.

    Its parameters stay what they are, and get gradients. Not for a network whose forward pass is computed again during
    the backward pass, nor for one whose parameters are replaced by another wrapper.
    """
    weights = {
        f"{name}.weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, _CAST) and module.weight.requires_grad
    }

    def run(*args: Any, **options: Any) -> Tensor:
        cast = dict(zip(weights, _Cast.apply(*weights.values()), strict=True))
        out: Tensor = functional_call(network, cast, args, options)
        return out

    run.takes_noise_key = getattr(network, "takes_noise_key", False)  # type: ignore[attr-defined]
    return run
