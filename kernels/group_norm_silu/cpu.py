"""group_norm_silu by the compiled CPU library."""

from torch import Tensor, float32

from .. import native
from ..native import unavailable
from . import Arguments, reference
from .native_call import NativeCall

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def unsupported(x: Tensor, **_: object) -> str | None:
    """Return why these arguments are left to PyTorch, or None."""
    return native.unsupported_dtype(x)


class _Call(NativeCall):
    library = native

    def run(self, operation: str) -> None:
        native.call(operation, self.args)


def forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as the reference, statistics in float32."""
    return _Call(a, float32).forward() if a.x.numel() else reference.forward(a)


def backward(
    a: Arguments, grad: Tensor, mean: Tensor, rstd: Tensor, added_x: Tensor | None, added_skip: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute the same as the reference; the same bits with any number of threads."""
    if a.x.numel() == 0:
        return reference.backward(a, grad, mean, rstd, added_x, added_skip)
    return _Call(a, float32).backward(grad, mean, rstd, added_x, added_skip)
