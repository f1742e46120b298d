"""A step of Algorithm 2 of the paper, sampling from p(x_{t-1} | x_t), of DDIM or DPM-Solver++, by a row of a table."""

import math

import torch

from ..philox import STREAM_REVERSE
from ..philox.eager import normals
from . import FIXED, LEARNED, Arguments, StepTable


def forward(a: Arguments) -> None:
    """Replace x_t in `x` by x_{t-1}; write the clipped x_0 prediction to `x0` if given."""
    channels, row_number = a.x.shape[1], a.index.reshape(1)
    # index_select with a device tensor reads no value back to the host, unlike table[index].
    row = StepTable(*a.table.index_select(0, row_number)[0])
    prediction = a.out[:, :channels].to(torch.float32)
    x0_hat = row.x0_from_x * a.x + row.x0_from_out * prediction
    if a.clip > 0:
        x0_hat = x0_hat.clamp(-a.clip, a.clip)
    mean = row.mean_from_x0 * x0_hat + row.mean_from_x * a.x + row.mean_from_out * prediction
    # Without the earlier prediction a row that needs it has no result. Where it is not needed it may be anything.
    previous = torch.nan if a.x0 is None else a.x0
    mean = torch.where(row.mean_from_previous != 0, mean + row.mean_from_previous * previous, mean)

    noise = a.noise
    if noise is None:
        step = a.timesteps.index_select(0, row_number)
        noise = normals(math.prod(a.x.shape[1:]), a.images, a.seed, step, STREAM_REVERSE).reshape(a.x.shape)
    sigma = row.sigma
    if a.variance != FIXED:
        log_var = a.out[:, channels:].to(torch.float32)
        if a.variance != LEARNED:
            log_var = row.log_var_low + (row.log_var_high - row.log_var_low) * (log_var + 1.0) / 2.0
        # sigma is 1 or 0 here: it switches the noise off on the last step.
        sigma = sigma * torch.exp(0.5 * log_var)
    # On the last step sigma is 0 and the result must be the mean itself, whatever the noise is.
    a.x.copy_(torch.where(row.sigma > 0, mean + sigma * noise, mean))
    if a.x0 is not None:
        a.x0.copy_(x0_hat)
