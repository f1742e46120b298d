"""attention, and an image that is added to its output, for sampling."""

from typing import NamedTuple

from torch import Tensor

from ..attention import Arguments as Attention


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.add_attention`, in the order of the operator's schema."""

    q: Tensor  # floating (N, L, C)
    k: Tensor  # like q
    v: Tensor  # like q
    residual: Tensor  # like q
    scale: float  # of the scores

    @property
    def attention(self) -> Attention:
        """The arguments of attention."""
        return Attention(self.q, self.k, self.v, self.scale)
