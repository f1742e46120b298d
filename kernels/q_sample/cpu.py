"""q_sample with noise from the compiled library."""

from torch import Tensor

from .. import native
from ..native import unavailable
from ..philox import STREAM_FORWARD
from . import reference

__all__ = ["forward", "unavailable"]


def forward(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    flip: Tensor | None,
    noise: Tensor | None,
    images: Tensor,
    seed: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor]:
    """As the reference, its noise within 1e-6."""
    if noise is None:
        num = x0.shape[1] * x0.shape[2] * x0.shape[3]
        noise = native.random_normal(num, images, seed, step, STREAM_FORWARD).reshape(x0.shape)
    return reference.forward(x0, t, table, flip, noise, images, seed, step)
