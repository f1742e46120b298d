"""conv3x3: forward and gradients against float64, layouts, and what torch asks of an operator."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import contract
from helpers.marks import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddpm.ops import conv3x3


@dataclass(frozen=True)
class Case:
    """Shapes of one call."""

    n: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    doubled: bool = False
    bias: bool = True

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(device, dtype)

        tensors = {"x": normal(self.n, self.channels, *self.size)}
        tensors["weight"] = normal(self.out_channels, self.channels, 3, 3)
        if self.bias:
            tensors["bias"] = normal(self.out_channels)
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


CASES = {
    "a residual block's": Case(2, 64, 64, (16, 16)),
    "batch 1": Case(1, 128, 96, (16, 16)),
    "after an upsampling": Case(2, 32, 48, (6, 6), doubled=True),
    "no multiple of a tile": Case(3, 40, 50, (7, 13)),
    "doubled, odd": Case(2, 17, 33, (3, 5), doubled=True),
    "few channels in": Case(2, 3, 64, (8, 8)),
    "few channels out": Case(2, 64, 3, (8, 8), bias=False),
    "one tile": Case(2, 32, 32, (4, 4)),
    "one pixel": Case(2, 32, 32, (1, 1)),
    "several blocks of tiles": Case(3, 16, 16, (40, 36)),
    "more channels than a block": Case(2, 200, 40, (12, 12)),
}


def reference(tensors: dict[str, Tensor], doubled: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The output in float64, by PyTorch's own convolution, and the inputs that it was computed from."""
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    x = F.interpolate(wide["x"], scale_factor=2.0, mode="nearest") if doubled else wide["x"]
    return F.conv2d(x, wide["weight"], wide.get("bias"), padding=1), wide


def assert_near(ours: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """In the 2-norm, and for no element more than a few times that of the largest: Winograd's transforms mix a tile."""
    error, expected = contract.float64(ours) - contract.float64(expected), contract.float64(expected)
    assert np.linalg.norm(error) <= tolerance * np.linalg.norm(expected), name
    assert np.abs(error).max() <= 5 * tolerance * np.abs(expected).max(), name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_and_gradients(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[name]
    tensors = case.inputs(dtype, device)
    y = conv3x3(**tensors, doubled=case.doubled)
    expected, wide = reference(tensors, case.doubled)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-13 if dtype == torch.float64 else 4e-6
    assert_near(y, expected, tolerance)
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, list(tensors.values()), grad)
    expected_gradients = torch.autograd.grad(expected, list(wide.values()), grad.double())
    for (input_name, tensor), ours, wanted in zip(tensors.items(), gradients, expected_gradients, strict=True):
        assert ours.shape == tensor.shape and ours.dtype == dtype
        assert_near(ours, wanted, tolerance, input_name)


@given(
    n=st.integers(1, 3), channels=st.integers(1, 40), out_channels=st.integers(1, 70), height=st.integers(1, 15),
    width=st.integers(1, 15), doubled=st.booleans(), bias=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_numbers_of_drawn_shapes(
    n: int, channels: int, out_channels: int, height: int, width: int, doubled: bool, bias: bool
) -> None:
    case = Case(n, channels, out_channels, (height, width), doubled, bias)
    tensors = case.inputs(torch.float32, torch.device("cpu"))
    y = conv3x3(**tensors, doubled=doubled)
    expected, wide = reference(tensors, doubled)
    # Relative to what is added up: with few terms they may cancel.
    scale = reference({name: tensor.abs() for name, tensor in tensors.items()}, doubled)[0].norm()
    assert (y.double() - expected).norm() <= 4e-6 * scale
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, list(tensors.values()), grad)
    expected_gradients = torch.autograd.grad(expected, list(wide.values()), grad.double())
    norms = {name: float(tensor.detach().norm()) for name, tensor in wide.items()}
    scales = {"x": norms["weight"], "weight": 3 * norms["x"], "bias": (y.shape[2] * y.shape[3]) ** 0.5}
    for name, ours, wanted in zip(tensors, gradients, expected_gradients, strict=True):
        assert (ours.double() - wanted).norm() <= 4e-6 * float(grad.norm()) * scales[name], name


@pytest.mark.parametrize("name", CASES)
def test_factors_in_bf16(name: str, device: torch.device) -> None:
    """Output and gradients stay float32; their errors are those of two factors of 8 bits, through the transforms."""
    case = CASES[name]
    tensors = case.inputs(torch.float32, device)
    y = conv3x3(**tensors, doubled=case.doubled, bf16=True)
    expected, wide = reference(tensors, case.doubled)
    assert y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)

    def error(ours: Tensor, right: Tensor) -> float:
        return float((ours.double() - right).norm() / right.norm())

    assert error(y, expected) <= 9e-3
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, list(tensors.values()), grad)
    rights = torch.autograd.grad(expected, list(wide.values()), grad.double())
    for input_name, ours, right in zip(tensors, gradients, rights, strict=True):
        assert ours.dtype == torch.float32
        assert error(ours, right) <= (2e-6 if input_name == "bias" else 9e-3), input_name


@pytest.mark.parametrize("layout", contract.LAYOUTS)
@pytest.mark.parametrize("doubled", [False, True])
def test_layouts(layout: str, doubled: bool, device: torch.device) -> None:
    """Of the input, the weights and the gradient."""
    case = Case(2, 24, 24, (8, 8), doubled)
    tensors = case.inputs(torch.float32, device)
    expected, wide = reference(tensors, doubled)
    grad = torch.randn(expected.shape, device=device)
    wanted = torch.autograd.grad(expected, list(wide.values()), grad.double())
    for name in ("x", "weight"):
        tensors[name] = contract.LAYOUTS[layout](tensors[name].detach()).requires_grad_()
    y = conv3x3(**tensors, doubled=doubled)
    assert_near(y, expected, 4e-6)
    gradients = torch.autograd.grad(y, list(tensors.values()), contract.LAYOUTS[layout](grad))
    for name, ours, reference_gradient in zip(tensors, gradients, wanted, strict=True):
        assert_near(ours, reference_gradient, 4e-6, name)


def test_expanded_input_and_gradient(device: torch.device) -> None:
    tensors = Case(3, 24, 24, (8, 8)).inputs(torch.float32, device)
    x = tensors["x"].detach()[:1].requires_grad_()
    expected, wide = reference(tensors | {"x": x.expand(3, -1, -1, -1)}, False)
    y = conv3x3(x.expand(3, -1, -1, -1), tensors["weight"], tensors["bias"])
    assert_near(y, expected, 4e-6)
    (ours,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(expected.sum(), wide["x"])
    assert_near(ours, wanted.sum(0, keepdim=True), 4e-6)


def test_precision_is_kept_far_from_zero(device: torch.device) -> None:
    """Inputs of mean 30: the transforms subtract neighbours, and what they lose is against the largest products."""
    tensors = Case(2, 64, 64, (16, 16)).inputs(torch.float32, device)
    tensors["x"] = tensors["x"].detach() + 30
    assert_near(conv3x3(**tensors), reference(tensors, False)[0], 4e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_come_through(value: float, device: torch.device) -> None:
    """Wherever the 3x3 neighbourhood holds one the result is not finite; Winograd spoils the rest of that tile too."""
    tensors = {
        name: tensor.detach() for name, tensor in Case(2, 32, 32, (16, 16)).inputs(torch.float32, device).items()
    }
    tensors["x"][1, 5, 7, 9] = value
    finite = torch.isfinite(conv3x3(**tensors))
    assert finite[0].all() and not finite[1, :, 6:9, 8:11].any()
    assert finite[1, :, :3].all() and finite[1, :, 13:].all()


def test_only_the_wanted_gradients(device: torch.device) -> None:
    tensors = {name: tensor.detach() for name, tensor in Case(2, 32, 32, (8, 8)).inputs(torch.float32, device).items()}
    for name in tensors:
        one = {other: tensor.clone().requires_grad_(other == name) for other, tensor in tensors.items()}
        expected, wide = reference(one, False)
        conv3x3(**one).sum().backward()
        (wanted,) = torch.autograd.grad(expected.sum(), wide[name])
        assert_near(one[name].grad, wanted, 4e-6)
        assert all(one[other].grad is None for other in one if other != name)


@pytest.mark.parametrize("dtype", contract.LOW_PRECISION)
def test_low_precision_is_pytorchs(dtype: torch.dtype, device: torch.device) -> None:
    tensors = {name: tensor.detach() for name, tensor in Case(2, 32, 32, (8, 8)).inputs(dtype, device).items()}
    assert torch.equal(conv3x3(**tensors), F.conv2d(*tensors.values(), padding=1))


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("case", [slow(CASES["a residual block's"]), CASES["few channels in"]])
def test_opcheck(case: Case, doubled: bool, device: torch.device) -> None:
    tensors = case.inputs(torch.float32, device)
    for bf16 in (False, True):
        contract.opcheck(torch.ops.fastddpm.conv3x3, [*tensors.values(), doubled, bf16])
    y = conv3x3(**tensors, doubled=doubled)
    wanted = [True, True, True]
    x, weight = tensors["x"].detach(), tensors["weight"].detach()
    contract.opcheck(torch.ops.fastddpm.conv3x3_backward, [y.detach(), x, weight, doubled, False, wanted])


def test_compiles_with_a_dynamic_batch(device: torch.device) -> None:
    def inputs(n: int) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(n)
        tensors = Case(n, 16, 24, (8, 8)).inputs(torch.float32, device)
        return [tensors["x"]], [tensors["weight"], tensors["bias"]]

    contract.assert_compiles_for_any_batch(lambda x, w, b: torch.relu(conv3x3(x, w, b)), inputs, [4, 3, 6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, r"x must be floating \(N, C, H, W\); got torch.float32 \(3, 8, 8\)"),
        ({"x": torch.zeros(2, 4, 8, 8, dtype=torch.int64)}, r"x must be floating \(N, C, H, W\); got torch.int64"),
        ({"weight": torch.zeros(6, 5, 3, 3)}, r"weight must be torch.float32 \(K, 4, 3, 3\); got .* \(6, 5, 3, 3\)"),
        ({"weight": torch.zeros(6, 4, 5, 5)}, r"weight must be torch.float32 \(K, 4, 3, 3\); got .* \(6, 4, 5, 5\)"),
        ({"weight": torch.zeros(6, 4, 3, 3).double()}, r"weight must be torch.float32 .*; got torch.float64"),
        ({"bias": torch.zeros(5)}, r"bias must be torch.float32 \(6,\); got torch.float32 \(5,\)"),
        ({"bias": torch.zeros(6).double()}, r"bias must be torch.float32 \(6,\); got torch.float64"),
    ],
)
def test_refuses(change: dict[str, Tensor], message: str) -> None:
    tensors = {"x": torch.zeros(2, 4, 8, 8), "weight": torch.zeros(6, 4, 3, 3), "bias": torch.zeros(6)}
    with pytest.raises(ValueError, match="conv3x3: " + message):
        conv3x3(**(tensors | change))
