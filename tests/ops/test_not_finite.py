"""NaN and infinity anywhere in an operation's inputs come out where PyTorch's own operators let them out."""

import pytest
import torch
import torch.nn.functional as F
from helpers.group_norm_silu_cases import Case
from helpers.marks import with_large
from torch import Tensor

from fastddpm.ops import attention, group_norm_silu

VALUES = [float("nan"), float("inf"), float("-inf")]
CASE = Case(2, 4, (3, 4), 4, c2=8, options=("temb", "affine"))
SPOTS = {"x": (1, 2, 1, 3), "skip": (0, 5, 2, 0), "temb": (1, 7), "weight": (4,), "bias": (4,), "scale": (0, 9),
         "shift": (1, 0), "grad": (0, 3, 1, 1)}  # fmt: skip


def plain_norm(t: dict[str, Tensor]) -> Tensor:
    h = torch.cat([t["x"], t["skip"]], dim=1) + t["temb"][:, :, None, None]
    h = F.group_norm(h, CASE.groups, t["weight"], t["bias"], 1e-6)
    return F.silu(h * (1 + t["scale"][:, :, None, None]) + t["shift"][:, :, None, None])


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", with_large(SPOTS, "skip", "temb", "bias", "scale", "shift"))
def test_group_norm_silu(name: str, value: float, device: torch.device) -> None:
    t = CASE.inputs(torch.float32, device)
    t["grad"] = torch.randn(2, 12, 3, 4, device=device)
    t["x"], t["skip"] = (t[image].contiguous(memory_format=torch.channels_last) for image in ("x", "skip"))
    t[name][SPOTS[name]] = value
    grad = t.pop("grad")
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in t.items()}
    results = []
    for y in (group_norm_silu(**leaves, groups=CASE.groups), plain_norm(leaves)):
        results.append([y, *torch.autograd.grad(y, list(leaves.values()), grad)])
    for key, ours, plain in zip(["y", *leaves], *results, strict=True):
        assert_finite_alike(key, ours, plain)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", with_large(["q", "k", "v", "grad"], "k", "v"))
def test_attention(name: str, value: float, device: torch.device) -> None:
    t = {key: torch.randn(2, 9, 16, device=device) for key in ("q", "k", "v", "grad")}
    t[name][1, 4, 3] = value
    grad = t.pop("grad")
    leaves = {key: tensor.requires_grad_() for key, tensor in t.items()}
    q, k, v = leaves.values()
    results = []
    for y in (attention(q, k, v), torch.softmax(q @ k.mT / 4, -1) @ v):
        results.append([y, *torch.autograd.grad(y, [q, k, v], grad)])
    for key, ours, plain in zip(["y", *leaves], *results, strict=True):
        assert_finite_alike(key, ours, plain)


def assert_finite_alike(name: str, ours: Tensor, plain: Tensor) -> None:
    """The same elements are finite, and those are equal up to rounding."""
    finite = plain.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: {(~ours.isfinite()).sum()} not finite, {(~finite).sum()} due"
    torch.testing.assert_close(ours[finite], plain[finite], rtol=2e-4, atol=2e-5)
