"""norm_conv against float64: every kernel size, stride, padding, sum and norm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm import ops
from fastddpm.ops.norm_conv import norm_conv

CASES: dict[str, dict[str, Any]] = {
    "3x3": {},
    "1x1": {"kernel": 1},
    "norm": {"norm": True, "silu": True},
    "norm without silu, scale and shift": {"norm": True, "scaled": True},
    "sums": {"norm": True, "silu": True, "temb": True, "residual": True},
    "doubled": {"doubled": True},
    "stride 2, padded on both sides": {"stride": 2, "pad": 1},
    "stride 2, padded at the end": {"stride": 2, "pad": 0},
    "few channels": {"channels": 3},
    "contiguous, no bias": {"contiguous": True, "bias": False, "residual": True},
}


def formula(x: Tensor, weight: Tensor, norm: Any, given: dict[str, Any]) -> Tensor:
    """The definition, operator by operator."""
    h = x if norm is None else F.group_norm(x, norm[2], norm[0], norm[1], norm[3])
    if "scale" in given:
        h = h * (1 + given["scale"][..., None, None]) + given["shift"][..., None, None]
    h = h * torch.sigmoid(h) if given.get("silu") else h
    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3) if given.get("doubled") else h
    stride, kernel = given.get("stride", 1), weight.shape[-1]
    pad = given.get("pad", kernel // 2)
    h = F.pad(h, (pad, kernel - 1 - pad) * 2)
    out = F.conv2d(h, weight, given.get("bias"), stride)
    out = out + given["temb"][..., None, None] if "temb" in given else out
    return out + given["residual"] if "residual" in given else out


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_float64(name: str, backend: str) -> None:
    case, generator = CASES[name], torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n, c, k, height, width, kernel = 2, case.get("channels", 20), 24, 10, 6, case.get("kernel", 3)
    x, weight = random(n, c, height, width), random(k, c, kernel, kernel)
    x = x if case.get("contiguous") else x.contiguous(memory_format=torch.channels_last)
    norm = (random(c), random(c), 4, 1e-5) if case.get("norm") else None
    given = {option: case[option] for option in ("silu", "stride", "pad", "doubled") if option in case}
    tensors = {"bias": random(k)} if case.get("bias", True) else {}
    if case.get("scaled"):
        tensors |= {"scale": random(n, c), "shift": random(n, c)}
    if case.get("temb"):
        tensors["temb"] = random(n, k)
    if case.get("residual"):
        tensors["residual"] = random(n, k, height, width)
    doubled = {option: tensor.double() for option, tensor in tensors.items()}
    exact_norm = None if norm is None else (norm[0].double(), norm[1].double(), *norm[2:])
    right = formula(x.double(), weight.double(), exact_norm, given | doubled)
    with ops.use_backend(backend):
        out = norm_conv(x, weight, norm=norm, **given, **tensors)
    assert out.shape == right.shape and out.is_contiguous(memory_format=torch.channels_last)
    assert float((out - right).norm() / right.norm()) < 3e-6


def test_other_shapes_are_refused() -> None:
    x, weight = torch.zeros(2, 4, 6, 6), torch.zeros(8, 4, 3, 3)
    wrong: list[tuple[Callable[[], Tensor], str]] = [
        (lambda: norm_conv(x, weight[:, :3]), r"weight \(K, C, 3, 3\) or \(K, C, 1, 1\); got \(2, 4, 6, 6\)"),
        (lambda: norm_conv(x, weight, stride=3), "stride must be 1, or with 3x3 weights 2; got 3"),
        (lambda: norm_conv(x[:, :, :5], weight, stride=2), r"height and width must be even; got \(5, 6\)"),
        (lambda: norm_conv(x, weight, torch.zeros(7)), r"bias must be \(8,\); got \(7,\)"),
        (lambda: norm_conv(x, weight, norm=(torch.ones(4), torch.ones(4), 3, 1e-5)), "4 channels .* into 3 groups"),
        (lambda: norm_conv(x, weight, scale=torch.zeros(2, 4)), "scale and shift go together"),
        (lambda: norm_conv(x, weight, residual=torch.zeros(2, 8, 6, 5)), r"residual must be \(2, 8, 6, 6\)"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()


def test_empty_batch_and_no_gradient() -> None:
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    assert norm_conv(torch.zeros(0, 4, 6, 6), weight).shape == (0, 8, 6, 6)
    assert not norm_conv(torch.randn(1, 4, 6, 6, requires_grad=True), weight).requires_grad
