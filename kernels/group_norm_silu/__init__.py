"""GroupNorm with its neighbours in a residual block: concatenation, time embedding, SiLU, dropout."""

from typing import NamedTuple

import torch
from torch import Tensor

# The most in the GPU kernels: a CUDA block's slab of an image has whole groups, whose sums must fit in shared memory.
_CHANNELS_OF_A_GROUP = 1024


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.group_norm_silu`, in the order of the operator's schema. C = C1 + C2.

    The backward pass takes them too, but does not read `eps`.
    """

    x: Tensor  # floating (N, C1, H, W)
    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    groups: int
    eps: float = 1e-6
    skip: Tensor | None = None  # x's dtype (N, C2, H, W)
    temb: Tensor | None = None  # (N, C)
    scale: Tensor | None = None  # (N, C), given together with shift
    shift: Tensor | None = None  # (N, C)
    silu: bool = True
    dropout: float = 0.0
    images: Tensor | None = None  # int64 (N,); with dropout > 0, like seed and step
    seed: Tensor | None = None  # int64 ()
    step: Tensor | None = None  # int64 ()
    layer: int = 0

    @property
    def channels(self) -> int:
        """The number of channels of the output, C1 + C2."""
        return self.x.shape[1] + (0 if self.skip is None else self.skip.shape[1])

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        """The tensors with one number per channel, or per image and channel."""
        return {
            "weight": self.weight, "bias": self.bias, "temb": self.temb, "scale": self.scale, "shift": self.shift,
        }  # fmt: skip

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the output: channels_last if x is dense in it, otherwise contiguous."""
        channels_last = self.x.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if channels_last else torch.contiguous_format

    @property
    def statistics_dtype(self) -> torch.dtype:
        """The dtype of mean, 1/deviation and the reference's arithmetic: float64 for float64 x, otherwise float32."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


def too_large(x: Tensor, groups: int, skip: Tensor | None, kernels: str) -> str | None:
    """Return why the GPU kernels named `kernels` do not take images or groups of this size, or None."""
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if channels * x.shape[2] * x.shape[3] >= 2**31 - 1:
        return f"the {kernels} kernels take images below 2^31 - 1 elements, not {channels}x{x.shape[2]}x{x.shape[3]}"
    if channels > groups * _CHANNELS_OF_A_GROUP:
        return f"the {kernels} kernels take up to {_CHANNELS_OF_A_GROUP} channels to a group, not {channels // groups}"
    return None
