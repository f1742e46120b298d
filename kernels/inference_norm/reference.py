"""silu(scale_shift(group_norm(concat(x + residual, skip) + temb))), and x + residual."""

from torch import Tensor

from ..group_norm_silu import reference
from . import Arguments


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return y in `dtype`, and x + residual in x's dtype (empty without a residual). y is made of the exact sum."""
    wide = a.norm(a.x).statistics_dtype
    skip = None if a.skip is None else a.skip.to(wide)
    total = a.x.to(wide) if a.residual is None else a.x.to(wide) + a.residual.to(wide)
    y = reference.forward(a.norm(total)._replace(skip=skip))[0]
    y = a.rounded(y) if a.dtype != a.x.dtype else y.to(a.dtype)
    y = y.contiguous(memory_format=a.memory_format)
    return y, a.x.new_empty(0) if a.residual is None else total.to(a.x.dtype).contiguous(memory_format=a.memory_format)
