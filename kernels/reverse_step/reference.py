"""p(x_{t-1} | x_t) (Algorithm 2 of the paper) and the DDIM update, driven by a coefficient table."""

import math

import torch
from torch import Tensor

from ..philox import STREAM_REVERSE
from ..philox.eager import normals
from . import FIXED, LEARNED, StepTable


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
    """Replace x_t in `x` by x_{t-1}; write the clipped x_0 prediction to `x0` when given.

    `index` is a 0-d int64 tensor: the row of `table` and `timesteps` to apply; the noise's counter
    step is `timesteps[index]`. `clip` <= 0 means no clipping.
    """
    # index_select with a device tensor reads no value back to the host, unlike table[index].
    row = StepTable(*table.index_select(0, index.reshape(1))[0])
    prediction = out[:, : x.shape[1]].to(torch.float32)
    x0_hat = row.x0_from_x * x + row.x0_from_out * prediction
    if clip > 0:
        x0_hat = x0_hat.clamp(-clip, clip)
    mean = row.mean_from_x0 * x0_hat + row.mean_from_x * x + row.mean_from_out * prediction

    if noise is None:
        step = timesteps.index_select(0, index.reshape(1))
        noise = normals(math.prod(x.shape[1:]), images, seed, step, STREAM_REVERSE).reshape(x.shape)
    sigma = row.sigma
    if variance != FIXED:
        log_var = out[:, x.shape[1] :].to(torch.float32)
        if variance != LEARNED:
            log_var = row.log_var_low + (row.log_var_high - row.log_var_low) * (log_var + 1.0) / 2.0
        # sigma is 1 or 0 here: it switches the noise off on the last step.
        sigma = sigma * torch.exp(0.5 * log_var)
    # On the last step sigma is 0 and the result must be the mean itself, whatever the noise is.
    x.copy_(torch.where(row.sigma > 0, mean + sigma * noise, mean))
    if x0 is not None:
        x0.copy_(x0_hat)
