"""reverse_step with noise from the compiled library."""

from torch import Tensor

from .. import native
from ..native import unavailable
from ..philox import STREAM_REVERSE
from . import reference

__all__ = ["forward", "unavailable"]


def forward(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    timesteps: Tensor,
    index: Tensor,
    images: Tensor,
    seed: Tensor,
    clip: float,
    variance: int,
    noise: Tensor | None,
    x0: Tensor | None,
) -> None:
    """As the reference, its noise within 1e-6."""
    if noise is None:
        num = x.shape[1] * x.shape[2] * x.shape[3]
        noise = native.random_normal(num, images, seed, timesteps[index], STREAM_REVERSE).reshape(x.shape)
    reference.forward(x, out, table, timesteps, index, images, seed, clip, variance, noise, x0)
