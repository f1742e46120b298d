"""q_sample: x_t and eps of the forward process from images, in one pass."""

import math

import torch
from torch import Tensor

from fastddpm.kernels.q_sample import Arguments

from .derivatives import refuse_tangents
from .random_normal import check_counter
from .registry import register, register_without_gradient

_LARGEST_PIXEL = 16.0  # of floats that may be images, or latents in units of about 1; levels reach 255


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    images: Tensor,
    seed: Tensor,
    step: Tensor,
    *,
    flip: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (equation 4), and eps: float32 (N, C, H, W).

    `x0`: (N, C, H, W), uint8, of which v becomes v / 127.5 - 1, or floating in [-1, 1]. `t`: int64 (N,) in 0..T-1.
    `table`: float32 (T, 2), the two square roots. `flip`: bool (N,), images to mirror left to right. Default: none.
    `noise`: floating (N, C, H, W), eps. Default: drawn from (seed, images, step), as by `random_normal`.
    Never differentiable. Raises ValueError for other shapes or dtypes.
    """
    if x0.ndim != 4 or not (x0.dtype == torch.uint8 or x0.dtype.is_floating_point):
        raise ValueError(f"q_sample: x0 must be uint8 or floating (N, C, H, W); got {x0.dtype} {tuple(x0.shape)}")
    if t.shape != x0.shape[:1] or t.dtype != torch.int64:
        raise ValueError(f"q_sample: t must be int64 ({x0.shape[0]},); got {t.dtype} {tuple(t.shape)}")
    if table.ndim != 2 or table.shape[1] != 2 or table.dtype != torch.float32:
        raise ValueError(f"q_sample: table must be float32 (T, 2); got {table.dtype} {tuple(table.shape)}")
    if flip is not None and (flip.shape != x0.shape[:1] or flip.dtype != torch.bool):
        raise ValueError(f"q_sample: flip must be bool ({x0.shape[0]},); got {flip.dtype} {tuple(flip.shape)}")
    if noise is not None and noise.shape != x0.shape:
        raise ValueError(f"q_sample: noise must be {tuple(x0.shape)} like x0; got {tuple(noise.shape)}")
    check_counter("q_sample", images, seed, step)
    if images.shape != t.shape:
        raise ValueError(f"q_sample: images must be ({x0.shape[0]},); got {tuple(images.shape)}")
    refuse_tangents("q_sample", x0, table, noise)
    return torch.ops.fastddpm.q_sample(x0, t, table, flip, noise, images, seed, step)


def refuse_levels(x0: Tensor, seen: bool) -> bool:
    """Raise ValueError if floating `x0` hold NaN or levels of 0..255, not [-1, 1]; return whether they were read.

    `seen`: earlier images were read; then those on a GPU are not, because reading waits for them. Nothing is read
    inside vmap, a fake tensor mode or the capture of a CUDA graph.
    """
    waits = x0.device.type != "cpu"
    if not x0.numel() or (waits and (seen or torch.cuda.is_current_stream_capturing())):
        return seen
    try:
        largest = float(x0.detach().abs().amax())
    except RuntimeError:
        return seen
    if not largest < math.inf:
        raise ValueError(f"images must be uint8, or floats in [-1, 1]; got {x0.dtype} with NaN or infinity")
    if largest > _LARGEST_PIXEL:
        raise ValueError(
            f"images must be uint8, or floats in [-1, 1]; got {x0.dtype} of up to {largest:.4g}: divide levels of "
            "0..255 by 127.5 and subtract 1, or pass them as uint8"
        )
    return True


def _fake(a: Arguments) -> tuple[Tensor, Tensor]:
    return a.x0.new_empty(a.x0.shape, dtype=torch.float32), a.x0.new_empty(a.x0.shape, dtype=torch.float32)


register(
    "q_sample",
    Arguments,
    "(Tensor x0, Tensor t, Tensor table, Tensor? flip, Tensor? noise, Tensor images, Tensor seed, Tensor step)"
    " -> (Tensor, Tensor)",
    _fake,
)
register_without_gradient("q_sample")
