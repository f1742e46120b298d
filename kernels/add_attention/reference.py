"""residual + softmax(scale q k^T) v."""

from torch import Tensor

from ..attention import reference
from . import Arguments


def forward(a: Arguments) -> Tensor:
    """Return the sum in q's dtype, made in float32 (float64 for float64) and rounded once."""
    wide = a.attention.statistics_dtype
    out, _ = reference.forward(a.attention._replace(q=a.q.to(wide), k=a.k.to(wide), v=a.v.to(wide)))
    return (out + a.residual.to(wide)).to(a.q.dtype)
