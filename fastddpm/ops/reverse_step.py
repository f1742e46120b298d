"""reverse_step: one step of the reverse chain, in place."""

import torch
from torch import Tensor

from fastddpm.kernels.reverse_step import COLUMNS, FIXED, LEARNED, LEARNED_RANGE, Arguments

from .derivatives import refuse_tangents
from .random_normal import check_counter
from .registry import register, register_without_gradient

VARIANCES = {"fixed": FIXED, "learned": LEARNED, "learned_range": LEARNED_RANGE}


def reverse_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    timesteps: Tensor,
    index: Tensor,
    images: Tensor,
    seed: Tensor,
    *,
    clip: float = 1.0,
    variance: str = "fixed",
    noise: Tensor | None = None,
    x0: Tensor | None = None,
) -> Tensor:
    """Replace x_t by x_{t-1} in `x` and return it. On a GPU nothing is read back to the host.

    `x`: float32 (N, C, H, W). `out`: the network's output, (N, C, H, W), or (N, 2C, H, W) with a learned variance.
    `table`: float32 (S, 9), one row per step, with the columns of `fastddpm.kernels.reverse_step.StepTable`.
    `timesteps`: int64 (S,). `index`: 0-d int64, the row to apply. `images`: int64 (N,). `seed`: 0-d int64.
    `clip`: if > 0, the x_0 prediction is clipped to [-clip, clip]. `variance`: "fixed", "learned" or "learned_range".
    `noise`: float32 like x. Default: drawn from (seed, images, timesteps[index]). `x0`: float32 like x, the clipped x_0
    prediction of the step before, which is replaced by this step's. It is read only by a row whose `mean_from_previous`
    is not 0; the result of such a row without `x0` is NaN. Default: not written. Never differentiable. Raises
    ValueError for other shapes or dtypes.
    """
    if x.ndim != 4 or x.dtype != torch.float32:
        raise ValueError(f"reverse_step: x must be float32 (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    if variance not in VARIANCES:
        raise ValueError(f"reverse_step: variance must be one of {', '.join(VARIANCES)}; got {variance!r}")
    n, c, h, w = x.shape
    channels = (c, 2 * c) if variance == "fixed" else (2 * c,)
    if out.shape[:1] + out.shape[2:] != (n, h, w) or out.shape[1] not in channels:
        raise ValueError(
            f"reverse_step: out must be ({n}, {' or '.join(map(str, channels))}, {h}, {w}); got {tuple(out.shape)}"
        )
    if table.ndim != 2 or table.shape[1] != COLUMNS or table.dtype != torch.float32:
        raise ValueError(f"reverse_step: table must be float32 (S, {COLUMNS}); got {table.dtype} {tuple(table.shape)}")
    if timesteps.shape != table.shape[:1] or timesteps.dtype != torch.int64:
        raise ValueError(f"reverse_step: timesteps must be int64 ({len(table)},); got {tuple(timesteps.shape)}")
    for name, value in (("noise", noise), ("x0", x0)):
        if value is not None and (value.shape != x.shape or value.dtype != torch.float32):
            raise ValueError(f"reverse_step: {name} must be float32 {tuple(x.shape)}; got {tuple(value.shape)}")
    check_counter("reverse_step", images, seed, index)
    if images.shape != x.shape[:1]:
        raise ValueError(f"reverse_step: images must be ({n},); got {tuple(images.shape)}")
    refuse_tangents("reverse_step", x, out, table, noise)
    torch.ops.fastddpm.reverse_step(
        x, out, table, timesteps, index, images, seed, float(clip), VARIANCES[variance], noise, x0
    )
    return x


def _fake(a: Arguments) -> None:
    return None


register(
    "reverse_step",
    Arguments,
    "(Tensor(a!) x, Tensor out, Tensor table, Tensor timesteps, Tensor index, Tensor images, Tensor seed,"
    " float clip, int variance, Tensor? noise, Tensor(b!)? x0) -> ()",
    _fake,
)
register_without_gradient("reverse_step")
