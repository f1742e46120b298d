"""group_norm_silu by the compiled CUDA library."""

import torch
from torch import Tensor

from .. import native_cuda
from ..native_cuda import unavailable
from . import Arguments, reference, too_large
from .native_call import NativeCall

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def unsupported(x: Tensor, groups: int, skip: Tensor | None, **rest: object) -> str | None:
    """Return why these arguments of forward or backward, by name, are left to another backend, or None."""
    return too_large(x, groups, skip, "CUDA") or native_cuda.unsupported(x=x, skip=skip, **rest)


class _Call(NativeCall):
    library = native_cuda

    def __init__(self, a: Arguments) -> None:
        key = (a.images, a.seed, a.step) if a.dropout > 0 else ()
        native_cuda.on_one_device("group_norm_silu", a.x, a.skip, *a.parameters.values(), *key)
        # The kernel reads all parameters in one dtype: theirs, or float32 if they differ.
        dtypes = {parameter.dtype for parameter in a.parameters.values() if parameter is not None}
        super().__init__(a, dtypes.pop() if len(dtypes) == 1 else torch.float32)

    def run(self, operation: str) -> None:
        tensors = [tensor for tensor in (self.x, self.skip) if tensor is not None]
        workspace = native_cuda.workspace(self.args, operation.endswith("backward"), tensors)
        native_cuda.call(operation, self.args, tensors, native_cuda.pointer(workspace), workspace.numel())


def forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as the reference, statistics in float32."""
    return _Call(a).forward() if a.x.numel() else reference.forward(a)


def backward(
    a: Arguments, grad: Tensor, mean: Tensor, rstd: Tensor, added_x: Tensor | None, added_skip: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute the same as the reference; the same bits on every run."""
    if a.x.numel() == 0:
        return reference.backward(a, grad, mean, rstd, added_x, added_skip)
    native_cuda.on_one_device("group_norm_silu_backward", grad, a.x, mean, rstd)
    return _Call(a).backward(grad, mean, rstd, added_x, added_skip)
