"""Derivatives beyond one backward pass: forward mode, second derivatives, torch.func; right, or refused."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.marks import slow
from helpers.networks import TINY, random_model
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fastddpm.errors import UsageError
from fastddpm.ops import attention, conv3x3, group_norm_silu, q_sample, reverse_step
from fastddpm.unet import UNet


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def norm_inputs() -> tuple[Tensor, ...]:
    return double(2, 2, 2, 3), double(4), double(4), double(2, 2, 2, 3), double(2, 4), double(2, 4), double(2, 4)


def norm(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor, temb: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return group_norm_silu(x, weight, bias, 2, skip=skip, temb=temb, scale=scale, shift=shift)


def norm_with_dropout(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    one = torch.tensor(1)
    return group_norm_silu(x, weight, bias, 2, dropout=0.3, images=torch.arange(2), seed=one, step=one)


def doubled_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return conv3x3(x, weight, bias, doubled=True)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "group_norm_silu": (norm, norm_inputs),
    "dropout": (norm_with_dropout, lambda: (double(2, 4, 2, 3), double(4), double(4))),
    "attention": (attention, lambda: (double(2, 5, 3), double(2, 5, 3), double(2, 5, 3))),
    "conv3x3": (conv3x3, lambda: (double(2, 3, 4, 4), double(2, 3, 3, 3), double(2))),
    "conv3x3, doubled": (doubled_conv, lambda: (double(1, 2, 3, 3), double(2, 2, 3, 3), double(2))),
}


@pytest.mark.large
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fast", [True, slow(False)])  # along random directions, or every derivative alone
def test_forward_mode_and_second_derivatives_are_finite_differences(fast: bool, name: str) -> None:
    operation, inputs = CASES[name]
    assert gradcheck(operation, inputs(), check_forward_ad=True, check_backward_ad=True, fast_mode=fast)
    assert gradgradcheck(operation, inputs(), check_fwd_over_rev=True, fast_mode=fast)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 2, weight, bias, 1e-6))


def our_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm_silu(x, weight, bias, 2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, -1) @ v


PAIRS = {
    "group_norm_silu": (our_norm, plain_norm, ((2, 8, 4, 4), (8,), (8,))),
    "attention": (attention, plain_attention, ((2, 6, 4), (2, 6, 4), (2, 6, 4))),
    "conv3x3": (conv3x3, lambda x, w, b: F.conv2d(x, w, b, padding=1), ((2, 4, 8, 8), (4, 4, 3, 3), (4,))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_float32_gives_the_second_derivatives_of_plain_pytorch(name: str) -> None:
    """A gradient penalty, as trained with: the first gradient is of the kernels' own inputs, whatever computes it."""
    ours, plain, shapes = PAIRS[name]
    values = [torch.randn(shape) for shape in shapes]

    def penalty(operation: Callable[..., Tensor], dtype: torch.dtype) -> list[np.ndarray]:
        leaves = [value.to(dtype).requires_grad_() for value in values]
        first = torch.autograd.grad(operation(*leaves).square().sum(), leaves[0], create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), leaves)
        return [gradient.numpy() for gradient in second]

    for found, expected in zip(penalty(ours, torch.float32), penalty(plain, torch.float64), strict=True):
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", PAIRS)
def test_transforms_of_torch_func(name: str) -> None:
    ours, plain, shapes = PAIRS[name]
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tangents = tuple(torch.randn_like(value) for value in values)

    def scalar(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: operation(*inputs).sin().sum()

    for transform in (
        lambda f: torch.func.grad(scalar(f))(*values),
        lambda f: torch.func.jvp(f, tuple(values), tangents)[1],
        lambda f: torch.func.jacfwd(f)(*values),
        lambda f: torch.func.jacrev(f)(*values),
        lambda f: (
            torch.func.vmap(lambda x: f(x[None], *values[1:])[0])(values[0]) if name != "attention" else f(*values)
        ),
        lambda f: torch.func.vmap(
            torch.func.grad(
                scalar(lambda x: f(x[None], *(v if v.ndim < 3 or name == "conv3x3" else v[:1] for v in values[1:])))
            )
        )(values[0]),
    ):
        assert torch.allclose(transform(ours), transform(plain), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return random_model(TINY).unet.double().requires_grad_(False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_network_has_directional_derivatives(unet: UNet, layout: torch.memory_format) -> None:
    unet = copy.deepcopy(unet).to(memory_format=layout)
    x, v, t = torch.randn(2, 3, 12, 12).double(), torch.randn(2, 3, 12, 12).double(), torch.tensor([3, 700])
    _, tangent = torch.func.jvp(lambda x: unet(x, t), (x,), (v,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(unet(forward_ad.make_dual(x, v), t)).tangent
    step = 1e-5
    expected = (unet(x + step * v, t) - unet(x - step * v, t)) / (2 * step)
    assert expected.abs().max() > 0.1
    assert torch.allclose(tangent, expected, atol=1e-7 * expected.abs().max())
    assert dual is not None and torch.allclose(dual, tangent)


def test_a_network_has_second_derivatives(unet: UNet) -> None:
    x, v, t = torch.randn(1, 3, 12, 12).double(), torch.randn(1, 3, 12, 12).double(), torch.tensor([500])

    def gradient(x: Tensor, create_graph: bool = False) -> Tensor:
        x = x if x.requires_grad else x.clone().requires_grad_()
        return torch.autograd.grad(unet(x, t).square().sum(), x, create_graph=create_graph)[0]

    leaf = x.clone().requires_grad_()
    product = torch.autograd.grad((gradient(leaf, create_graph=True) * v).sum(), leaf)[0]
    step = 1e-5
    expected = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
    assert expected.abs().max() > 0.1
    assert torch.allclose(product, expected, atol=1e-6 * expected.abs().max())


def test_what_is_never_differentiated_says_so() -> None:
    x0, one = torch.randn(1, 1, 2, 2), torch.tensor(1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x0, torch.ones_like(x0))
        with pytest.raises(UsageError, match="q_sample has no derivative"):
            q_sample(dual, torch.tensor([0]), torch.ones(1, 2), torch.tensor([0]), one, one)
        with pytest.raises(UsageError, match="reverse_step has no derivative"):
            zero = torch.tensor(0)
            reverse_step(x0.clone(), dual, torch.ones(1, 9), torch.tensor([0]), zero, torch.tensor([0]), one)


def test_autocast_casts_conv3x3_as_it_casts_a_convolution() -> None:
    x, weight, bias = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        chained = conv3x3(group_norm_silu(x, torch.ones(4), torch.zeros(4), 2), weight, bias)
        expected = F.conv2d(group_norm_silu(x, torch.ones(4), torch.zeros(4), 2), weight, bias, padding=1)
        mixed = conv3x3(x.bfloat16(), weight, bias)
    assert chained.dtype == mixed.dtype == torch.bfloat16
    assert torch.allclose(chained, expected, atol=2e-2 * float(expected.abs().max()))
