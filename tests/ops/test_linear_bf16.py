"""linear_bf16: forward and gradients against float64 of rounded factors, and what torch asks of an operator."""

import pytest
import torch
import torch.nn.functional as F
from helpers import contract
from torch import Tensor

from fastddpm.ops import linear_bf16

SHAPES = {  # of x, and the number of outputs
    "tokens": ((2, 64, 32), 48),
    "pixels": ((2, 5, 7, 40), 24),
    "rows": ((9, 16), 16),
    "odd numbers of channels": ((3, 4, 7), 5),
    "more than a block of pixels": ((1, 2100, 18), 34),
    "no rows": ((0, 8), 6),
    "no outputs": ((3, 8), 0),
}


def inputs(name: str, device: torch.device) -> list[Tensor]:
    shape, outputs = SHAPES[name]
    sizes = (shape, (outputs, shape[-1]), (outputs,))
    return [torch.randn(size, device=device).requires_grad_() for size in sizes]


def rounded(x: Tensor) -> Tensor:
    return x.detach().bfloat16().double()


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Up to float32's rounding of sums: the products of rounded factors are exact."""
    assert ours.dtype == torch.float32 and ours.shape == expected.shape
    assert (ours.double() - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("name", SHAPES)
def test_numbers_and_gradients(name: str, device: torch.device) -> None:
    x, weight, bias = inputs(name, device)
    y = linear_bf16(x, weight, bias)
    assert_close(y, rounded(x) @ rounded(weight).T + bias.double())
    grad = torch.randn_like(y)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y, (x, weight, bias), grad)
    assert_close(grad_x, rounded(grad) @ rounded(weight))
    assert_close(grad_weight, rounded(grad).flatten(0, -2).T @ rounded(x).flatten(0, -2))
    assert_close(grad_bias, grad.double().flatten(0, -2).sum(0))


def test_without_a_bias_and_gradients_by_themselves(device: torch.device) -> None:
    x, weight, bias = inputs("tokens", device)
    y = linear_bf16(x, weight)
    assert_close(y, rounded(x) @ rounded(weight).T)
    grad = torch.randn_like(y)
    for wanted, expected in ((x, rounded(grad) @ rounded(weight)), (bias, grad.double().sum((0, 1)))):
        (found,) = torch.autograd.grad(linear_bf16(x, weight, bias), wanted, grad)
        assert_close(found, expected)


def test_strides_change_nothing(device: torch.device) -> None:
    """Channels of an NCHW image, columns of a wider weight, an expanded gradient."""
    image = torch.randn(2, 12, 3, 5, device=device, requires_grad=True)
    wide = torch.randn(8, 20, device=device, requires_grad=True)
    y = linear_bf16(image.permute(0, 2, 3, 1), wide[:, 4:16])
    assert_close(y, torch.einsum("nchw,kc->nhwk", rounded(image), rounded(wide)[:, 4:16]))
    y.sum().backward()
    assert image.grad is not None and wide.grad is not None
    assert_close(image.grad, rounded(wide)[:, 4:16].sum(0)[None, :, None, None].expand(2, 12, 3, 5))
    assert_close(wide.grad[:, 4:16], rounded(image).sum((0, 2, 3)).expand(8, 12))
    assert (wide.grad[:, :4] == 0).all()


def test_autocast_and_derivatives_of_derivatives(device: torch.device) -> None:
    x, weight, bias = inputs("rows", device)
    expected = linear_bf16(x, weight, bias)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(linear_bf16(x, weight, bias), expected)
    (grad_x,) = torch.autograd.grad(expected.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad_x.sum(), weight)
    with torch.enable_grad():
        wide_x, wide = (tensor.bfloat16().float() for tensor in (x, weight))
        (by_hand,) = torch.autograd.grad(F.linear(wide_x, wide, bias).square().sum(), wide_x, create_graph=True)
        (expected_second,) = torch.autograd.grad(by_hand.sum(), weight)
    assert (second - expected_second).norm() <= 2e-2 * expected_second.norm()
    per_row = torch.func.vmap(torch.func.grad(lambda row: linear_bf16(row[None], weight, bias).sum()))(x)
    assert (per_row - weight.sum(0)).norm() <= 2e-2 * per_row.norm()


def test_opcheck(device: torch.device) -> None:
    arguments = inputs("tokens", device)
    contract.opcheck(torch.ops.fastddpm.linear_bf16, arguments)
    grad = torch.randn(2, 64, 48, device=device)
    x, weight, _ = (tensor.detach() for tensor in arguments)
    for wanted in ([True, True, True], [False, True, False]):
        contract.opcheck(torch.ops.fastddpm.linear_bf16_backward, (grad, x, weight, wanted))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4).double(), torch.zeros(2, 4)), r"x must be float32 \(..., C\); got torch.float64 \(3, 4\)"),
        ((torch.zeros(4), torch.zeros(2, 4)), r"x must be float32 \(..., C\); got torch.float32 \(4,\)"),
        ((torch.zeros(3, 4), torch.zeros(2, 5)), r"weight must be float32 \(K, 4\); got torch.float32 \(2, 5\)"),
        ((torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(3)), r"bias must be float32 \(2,\); got .* \(3,\)"),
    ],
)
def test_refuses_other_shapes_and_dtypes(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match="linear_bf16: " + message):
        linear_bf16(*arguments)
