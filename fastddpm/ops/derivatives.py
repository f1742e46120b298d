"""Derivatives beyond one backward pass: forward mode, second derivatives and the transforms of torch.func.

The kernels have a backward pass and nothing else. Whatever else is asked for is computed by the operation in plain
PyTorch, which can be differentiated in any way and any number of times, at the cost of PyTorch's operators.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastddpm.errors import UsageError


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a call is inside a transform of torch.func, or one of its tensors has a forward-mode tangent."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return _has_tangent(tensors)


def refuse_tangents(operation: str, *tensors: Tensor | None) -> None:
    """Raise `UsageError` if an operation that is never differentiated is asked for a forward-mode derivative."""
    if not torch.compiler.is_compiling() and _has_tangent(tensors):
        raise UsageError(
            f"{operation} has no derivative, and an input has a forward-mode tangent; call it outside the transform "
            "or detach the input"
        )


def _has_tangent(tensors: Sequence[Tensor | None]) -> bool:
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def differentiable_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor, needed: Sequence[bool]
) -> tuple[Any, ...]:
    """Return the gradients of `function(*inputs)`, which can be differentiated again; None if not `needed`.

    For a backward pass with `create_graph`. `function`: the operation in plain PyTorch. `grad`: of its result.
    """
    # Aliases: a tensor may be given twice, and each place has a gradient of its own.
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need and alias is not None]
    gradients = iter(torch.autograd.grad(function(*aliases), wanted, grad, create_graph=True))
    return tuple(
        next(gradients) if need and alias is not None else None for alias, need in zip(aliases, needed, strict=True)
    )
