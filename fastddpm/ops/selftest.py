"""Tries every operation on a device: its error against float64, and its speed against PyTorch's own operators."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm import ops
from fastddpm.kernels.philox import STREAM_FORWARD, STREAM_REVERSE
from fastddpm.kernels.philox.reference import normals, philox
from fastddpm.kernels.reverse_step import COLUMNS

from .conv3x3_fp8 import quantised, to_e4m3

GROUPS, SEED, STEP = 32, 5, 1
# Of the error's 2-norm over the result's. bfloat16 rounds to 2^-9; Winograd's transforms cost float32 some digits.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_ROUNDS, _SECONDS = 5, 0.1  # of timing: rounds, in which the sides take turns, and the length of one side's turn


@dataclass(frozen=True)
class Finding:
    """The result of one trial.

    `error`: 2-norm of the difference from the float64 result, over the latter's 2-norm; at most `tolerance`.
    `speed`: PyTorch's time divided by ours, from medians of rounds in which both take turns.
    """

    operation: str
    error: float
    tolerance: float
    speed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


@dataclass(frozen=True)
class Trial:
    """One operation on some inputs: by our kernels, by PyTorch's operators (`torch`), and in float64 (`exact`)."""

    operation: str
    ours: Callable[[], Tensor]
    torch: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    tolerance: float


def run(device: torch.device, dtype: torch.dtype, batch: int) -> list[Finding]:
    """Run all trials at shapes of the CIFAR-10 network with `batch` images in `dtype`."""
    findings = []
    # By default PyTorch's float32 convolutions run in TF32 on a GPU, with an error of 3e-4, above the tolerance.
    with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False):
        for trial in trials(device, dtype, batch):
            exact = trial.exact()
            error = float((trial.ours().double() - exact).norm() / exact.norm())
            findings.append(Finding(trial.operation, error, trial.tolerance, _speed(trial, device)))
    return findings


def trials(device: torch.device, dtype: torch.dtype, batch: int) -> list[Trial]:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, of: torch.dtype = dtype) -> Tensor:
        x = torch.randn(*shape, generator=generator, device=device).to(of)
        return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x

    tolerance = TOLERANCES[dtype]
    return [
        *_norms(randn, batch, tolerance),
        *_attentions(randn, batch, tolerance),
        _convolution(randn, batch, tolerance),
        *([_convolution_fp8(randn, batch)] if device.type == "cuda" else []),
        *_noise(randn, batch, device),
    ]


# PyTorch's operators, as a user would write them.


def plain_group_norm_silu(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Return silu(group_norm(cat(x, skip)))."""
    both = x if skip is None else torch.cat([x, skip], dim=1)
    return F.silu(F.group_norm(both, groups, weight.to(both.dtype), bias.to(both.dtype), 1e-6))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention with one head by scaled_dot_product_attention, (N, L, C)."""
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


def plain_q_sample(x0: Tensor, t: Tensor, table: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x_t and eps of uint8 images. `eps`: default from torch's generator."""
    images = x0.to(table.dtype) / 127.5 - 1
    eps = torch.randn_like(images) if eps is None else eps
    signal, noise = table[t][:, :, None, None, None].unbind(1)
    return signal * images + noise * eps, eps


def plain_reverse_step(x: Tensor, out: Tensor, row: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return x_{t-1} from x_t by a row of coefficients. `noise`: default from torch's generator."""
    x0 = (row[0] * x + row[1] * out).clamp(-1, 1)
    noise = torch.randn_like(x) if noise is None else noise
    return row[2] * x0 + row[3] * x + row[4] * out + row[5] * noise


# The trials

_Randn = Callable[..., Tensor]


def _norms(randn: _Randn, batch: int, tolerance: float) -> list[Trial]:
    inputs = (randn(batch, 256, 32, 32), randn(batch, 128, 32, 32))
    affine = (randn(384, of=torch.float32), randn(384, of=torch.float32))
    grad = randn(batch, 384, 32, 32)

    def ours(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm_silu(x, weight, bias, GROUPS, skip=skip)

    def plain(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return plain_group_norm_silu(x, skip, weight, bias, GROUPS)

    return _both_ways("group_norm_silu", ours, plain, (*inputs, *affine), grad, tolerance)


def _attentions(randn: _Randn, batch: int, tolerance: float) -> list[Trial]:
    q, k, v, grad = (randn(batch, 256, 256) for _ in range(4))
    return _both_ways("attention", ops.attention, plain_attention, (q, k, v), grad, tolerance)


def _both_ways(
    operation: str,
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    grad: Tensor,
    tolerance: float,
) -> list[Trial]:
    """Return the trials of an operation and of its gradients, concatenated."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    exact_leaves = [x.detach().double().requires_grad_() for x in inputs]

    def gradients(call: Callable[..., Tensor], of: list[Tensor]) -> Tensor:
        found = torch.autograd.grad(call(*of), of, grad.to(of[0].dtype))
        return torch.cat([gradient.reshape(-1).to(of[0].dtype) for gradient in found])

    forward = Trial(
        operation,
        lambda: ours(*inputs),
        lambda: plain(*inputs),
        lambda: plain(*(x.double() for x in inputs)),
        tolerance,
    )
    backward = Trial(
        f"{operation}, gradients",
        lambda: gradients(ours, leaves),
        lambda: gradients(plain, leaves),
        lambda: gradients(plain, exact_leaves),
        2 * tolerance,
    )
    return [forward, backward]


def _convolution(randn: _Randn, batch: int, tolerance: float) -> Trial:
    x, weight, bias = randn(batch, 128, 32, 32), randn(128, 128, 3, 3), randn(128)

    return Trial(
        "conv3x3",
        lambda: ops.conv3x3(x, weight, bias),
        lambda: F.conv2d(x, weight, bias, padding=1),
        lambda: F.conv2d(x.double(), weight.double(), bias.double(), padding=1),
        tolerance,
    )


def _convolution_fp8(randn: _Randn, batch: int) -> Trial:
    """Return the trial against float64 on the rounded operands. `exact` leaves out the error of rounding them."""
    weight, scale = quantised(randn(128, 128, 3, 3))
    x, plain_weight = randn(batch, 128, 32, 32), randn(128, 128, 3, 3)
    rounded = to_e4m3(x)
    return Trial(
        "conv3x3_fp8",
        lambda: ops.conv3x3_fp8(rounded, weight, scale, None, torch.bfloat16),
        lambda: F.conv2d(x, plain_weight, padding=1),
        lambda: F.conv2d(rounded.double(), weight.double() * scale.double()[:, None, None, None], padding=1),
        TOLERANCES[torch.bfloat16],
    )


def _noise(randn: _Randn, batch: int, device: torch.device) -> list[Trial]:
    """Return the trials of the noise operations, in float32 whatever the network computes in."""
    shape, tolerance = (3, 32, 32), TOLERANCES[torch.float32]
    images, seed, step = (torch.arange(batch, device=device), *(torch.tensor(v, device=device) for v in (SEED, STEP)))
    x0 = (randn(batch, *shape, of=torch.float32) * 60 + 128).clamp(0, 255).to(torch.uint8).contiguous()
    t, levels = images * 7 % 1000, randn(1000, 2, of=torch.float32).abs()
    x, out = (randn(batch, *shape, of=torch.float32).contiguous() for _ in range(2))
    # The last column weighs the x_0 prediction of the step before, which a single step does not have.
    rows = F.pad(randn(1000, COLUMNS - 1, of=torch.float32).abs(), (0, 1))
    timesteps = torch.arange(1000, device=device)

    def exact_normals(stream: int) -> Tensor:
        counters = (np.arange(3 * 32 * 32 // 4)[None], np.arange(batch)[:, None], np.array(STEP), np.array(stream))
        return torch.from_numpy(normals(philox(*counters, SEED)).reshape(batch, *shape)).to(device)

    def exact_step() -> Tensor:
        return plain_reverse_step(x.double(), out.double(), rows[STEP].double(), exact_normals(STREAM_REVERSE))

    return [
        Trial(
            "q_sample",
            lambda: torch.stack(ops.q_sample(x0, t, levels, images, seed, step)),
            lambda: torch.stack(plain_q_sample(x0, t, levels)),
            lambda: torch.stack(plain_q_sample(x0, t, levels.double(), exact_normals(STREAM_FORWARD))),
            tolerance,
        ),
        Trial(
            "reverse_step",
            lambda: ops.reverse_step(x.clone(), out, rows, timesteps, step, images, seed),
            lambda: plain_reverse_step(x.clone(), out, rows[STEP]),
            exact_step,
            tolerance,
        ),
        Trial(
            "random_normal",
            lambda: ops.random_normal(shape, images, seed, step, STREAM_FORWARD),
            lambda: torch.randn(batch, *shape, device=device),
            lambda: exact_normals(STREAM_FORWARD),
            tolerance,
        ),
    ]


def _speed(trial: Trial, device: torch.device) -> float:
    sides = (trial.ours, trial.torch)
    calls = [max(1, int(_SECONDS / _seconds(side, 1, device))) for side in sides]  # this also warms up
    rounds = [[_seconds(side, n, device) for side, n in zip(sides, calls, strict=True)] for _ in range(_ROUNDS)]
    ours, plain = np.median(rounds, axis=0)
    return float(plain / ours)


def _seconds(call: Callable[[], Tensor], times: int, device: torch.device) -> float:
    """Return the seconds per call, averaged over `times` calls."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times
