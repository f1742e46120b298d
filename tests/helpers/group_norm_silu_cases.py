"""Shapes for group_norm_silu, each for a reason, and the float64 numbers to expect."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from helpers import contract, oracle
from torch import Tensor

from fastddpm.ops import group_norm_silu


@dataclass(frozen=True)
class Case:
    """Shapes of one call, and which of the optional inputs it has."""

    n: int
    c1: int
    size: tuple[int, int]
    groups: int
    c2: int = 0
    options: tuple[str, ...] = ()  # of temb, affine (scale and shift), linear (no SiLU)
    cancelling: float = 0.0  # the size of numbers of which x's gradient is the difference

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """x, weight, bias and the optional tensors; weights stay float32 beside half-precision images."""
        c = self.c1 + self.c2
        weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(device, dtype)

        tensors = {"x": normal(self.n, self.c1, *self.size)}
        if self.c2:
            tensors["skip"] = normal(self.n, self.c2, *self.size) * 2
        tensors["weight"] = (1 + normal(c) / 2).to(weight_dtype)
        tensors["bias"] = (normal(c) / 2).to(weight_dtype)
        if "temb" in self.options:
            tensors["temb"] = normal(self.n, c)
        if "affine" in self.options:
            tensors |= {"scale": normal(self.n, c) / 2, "shift": normal(self.n, c)}
        return tensors

    def call(self, tensors: dict[str, Tensor]) -> Tensor:
        return group_norm_silu(**tensors, groups=self.groups, silu="linear" not in self.options)


CASES = {
    # A residual block of the CIFAR-10 network, with 4 channels to a group.
    "32x32, 128": Case(1, 128, (32, 32), 32, options=("temb",)),
    # The first block after a CIFAR-10 upsampling: 12 channels to a group, and one group takes 4 of them
    # from h and 8 from the skip.
    "seam in a group": Case(2, 256, (8, 8), 32, c2=128),
    # The same seam, in the last of two groups, with everything else switched on.
    "seam, all options": Case(2, 16, (4, 4), 2, c2=8, options=("temb", "affine")),
    # The widest concatenation, 32 channels to a group; the seam falls between groups.
    "512 + 512": Case(1, 512, (4, 4), 32, c2=512),
    # Attention's norm.
    "no SiLU": Case(2, 64, (8, 8), 32, options=("linear",)),
    # Neither side nor the pixel count is a multiple of a tile.
    "non-square": Case(3, 24, (3, 5), 6, options=("affine",)),
    # A group is its two channels.
    "1x1 image": Case(4, 8, (1, 1), 4, options=("temb",)),
    # The deviation is 0 and the result silu(bias).
    "one value to a group": Case(2, 4, (1, 1), 4, cancelling=1e3),  # 1 / sqrt(eps), up to which x_hat is multiplied
    # The mnist preset's groups, batch 1, more batch than channels.
    "batch 1": Case(1, 32, (16, 16), 8, options=("temb",)),
    "batch 33": Case(33, 8, (2, 2), 4),
    # One channel is contiguous and channels_last at once.
    "one channel": Case(2, 1, (4, 4), 1),
    # The widest group, one channel more on the skip than on h.
    "one group": Case(2, 3, (4, 4), 1, c2=4),
}


def normalised(t: dict[str, np.ndarray], groups: int) -> np.ndarray:
    h = t["x"] if "skip" not in t else np.concatenate([t["x"], t["skip"]], axis=1)
    if "temb" in t:
        h = h + t["temb"][:, :, None, None]
    return oracle.group_norm(h, groups)


def gain_and_offset(t: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    factor = 1 + t.get("scale", 0.0)
    gain, offset = t["weight"] * factor, t["bias"] * factor + t.get("shift", 0.0)
    n = len(t["x"])
    return tuple(np.broadcast_to(v, (n, v.shape[-1]))[:, :, None, None] for v in (gain, offset))  # type: ignore[return-value]


def expected_output(case: Case, tensors: dict[str, Tensor]) -> np.ndarray:
    t = {name: contract.float64(tensor) for name, tensor in tensors.items()}
    gain, offset = gain_and_offset(t)
    y = normalised(t, case.groups) * gain + offset
    return y if "linear" in case.options else oracle.silu(y)


def expected_gradients(
    case: Case, tensors: dict[str, Tensor], grad: Tensor, eps: float = 1e-6
) -> dict[str, np.ndarray]:
    """By hand, from x_hat = (h - mean) / sqrt(var + eps): the mean and the variance depend on h too."""
    t = {name: contract.float64(tensor) for name, tensor in tensors.items()}
    gain, offset = gain_and_offset(t)
    x_hat = normalised(t, case.groups)
    y, g = x_hat * gain + offset, contract.float64(grad)
    if "linear" not in case.options:
        sigmoid = 1 / (1 + np.exp(-y))
        g = g * (sigmoid + y * sigmoid * (1 - sigmoid))
    grad_gain, grad_offset = (g * x_hat).sum((2, 3)), g.sum((2, 3))
    factor = np.broadcast_to(1 + t.get("scale", np.zeros_like(grad_gain)), grad_gain.shape)
    gradients = {"weight": (grad_gain * factor).sum(0), "bias": (grad_offset * factor).sum(0)}
    if "scale" in t:
        gradients |= {"scale": grad_gain * t["weight"] + grad_offset * t["bias"], "shift": grad_offset}

    h = t["x"] if "skip" not in t else np.concatenate([t["x"], t["skip"]], axis=1)
    if "temb" in t:
        h = h + t["temb"][:, :, None, None]
    grouped_shape = (case.n, case.groups, -1)
    variance = h.reshape(grouped_shape).var(-1, keepdims=True)
    u, x_hat = (g * gain).reshape(grouped_shape), x_hat.reshape(grouped_shape)
    grad_h = (u - u.mean(-1, keepdims=True) - x_hat * (u * x_hat).mean(-1, keepdims=True)) / np.sqrt(variance + eps)
    grad_h = grad_h.reshape(h.shape)
    gradients["x"] = grad_h[:, : case.c1]
    if "skip" in t:
        gradients["skip"] = grad_h[:, case.c1 :]
    if "temb" in t:
        gradients["temb"] = grad_h.sum((2, 3))
    return gradients


def low_precision(case: Case, t: dict[str, Tensor]) -> Tensor:
    """The same maths with every intermediate in x's dtype."""
    dtype = t["x"].dtype
    h = torch.cat([t["x"], t["skip"]], dim=1) if "skip" in t else t["x"]
    if "temb" in t:
        h = h + t["temb"][:, :, None, None]
    grouped = h.reshape(case.n, case.groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normal = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)).reshape(h.shape)
    y = normal * t["weight"].to(dtype)[:, None, None] + t["bias"].to(dtype)[:, None, None]
    if "scale" in t:
        y = y * (1 + t["scale"][:, :, None, None]) + t["shift"][:, :, None, None]
    return y if "linear" in case.options else F.silu(y)


def gradients(output: Tensor, tensors: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    return dict(zip(tensors, torch.autograd.grad(output, list(tensors.values()), grad), strict=True))


def require_grad(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
