"""add_bias: a bias of the channels and up to two images, added to an image."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import contract
from helpers.marks import with_large
from torch import Tensor

from fastddpm.ops import add_bias

# (N, C, H, W): whole tiles, a border of pixels, borders of channels, one pixel.
SHAPES = [(2, 128, 8, 8), (3, 24, 5, 3), (1, 136, 3, 3), (1, 3, 1, 1)]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, images: int) -> dict[str, Any]:
    given = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(1 + images)]
    bias = torch.randn(shape[1], device=device, requires_grad=True)
    return {"x": given[0], "bias": bias} | dict(zip(("first", "second"), given[1:], strict=False))


def in_numpy(a: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The sum in float64, and that of all magnitudes."""
    bias = contract.float64(a["bias"])[:, None, None]
    terms = [contract.float64(value) if name != "bias" else bias for name, value in a.items()]
    return sum(terms[1:], terms[0]), sum(np.abs(term) for term in terms)


@pytest.mark.parametrize("dtype", with_large([torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(
    shape: tuple[int, ...], images: int, dtype: torch.dtype, device: torch.device, implementation: str
) -> None:
    """Within one rounding of the result (Triton's interpreter cuts bfloat16 off), and of float32 sums."""
    a = arguments(shape, dtype, device, images)
    ours, (exact, magnitude) = add_bias(**a), in_numpy(a)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    bound = torch.finfo(dtype).eps * np.abs(exact) + 2e-7 * magnitude
    assert (np.abs(contract.float64(ours) - exact) <= bound).all()


@pytest.mark.parametrize("layout", contract.LAYOUTS)
def test_layouts(layout: str, device: torch.device, implementation: str) -> None:
    a = {name: value.detach() for name, value in arguments((2, 24, 4, 6), torch.float32, device, 2).items()}
    expected = add_bias(**a)
    laid_out = {name: value if name == "bias" else contract.LAYOUTS[layout](value) for name, value in a.items()}
    assert torch.equal(add_bias(**laid_out), expected)


def test_gradient(device: torch.device, implementation: str) -> None:
    """That of every image is the gradient itself; the bias's is its sum, in the bias's own dtype."""
    a = arguments((3, 24, 5, 3), torch.bfloat16, device, 2)
    grad = torch.randn(3, 24, 5, 3, device=device, dtype=torch.bfloat16)
    add_bias(**a).backward(grad)
    assert all(torch.equal(a[name].grad, grad) for name in ("x", "first", "second"))
    assert a["bias"].grad.dtype == torch.float32
    torch.testing.assert_close(a["bias"].grad, grad.double().sum((0, 2, 3)).float(), rtol=1e-5, atol=1e-5)


def test_a_second_derivative_and_a_transform(device: torch.device) -> None:
    a = arguments((2, 3, 2, 2), torch.float64, device, 1)
    bias = a["bias"].detach().double().requires_grad_()

    def energy(x: Tensor, bias: Tensor, first: Tensor) -> Tensor:
        return (add_bias(x, bias, first) ** 3).sum()

    assert torch.autograd.gradgradcheck(energy, (a["x"], bias, a["first"]))
    total = a["x"] + bias[:, None, None] + a["first"]
    ours = torch.func.grad(energy, argnums=1)(a["x"], bias, a["first"])
    torch.testing.assert_close(ours, (3 * total**2).sum((0, 2, 3)))


def test_autocast_casts_images_only(device: torch.device) -> None:
    a = arguments((2, 8, 2, 2), torch.float32, device, 1)
    with torch.autocast(device.type, torch.bfloat16):
        out = add_bias(**a | {"x": a["x"].detach().bfloat16()})
    assert out.dtype == torch.bfloat16
    expected = a["x"].bfloat16().float() + a["bias"][:, None, None] + a["first"].bfloat16().float()
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x must be floating \(N, C, H, W\)"),
        ({"bias": torch.zeros(9)}, r"bias must be floating \(8,\); got torch.float32 \(9,\)"),
        ({"first": torch.zeros(2, 8, 2, 3)}, r"first must be torch.float32 \(2, 8, 2, 2\)"),
        ({"second": torch.zeros(2, 8, 2, 2).half()}, r"second must be torch.float32 \(2, 8, 2, 2\); got torch.float16"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict[str, Any], message: str, implementation: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_bias(**arguments((2, 8, 2, 2), torch.float32, torch.device("cpu"), 2) | changed)


@pytest.mark.slow
def test_opcheck(implementation: str, device: torch.device) -> None:
    a = arguments((2, 8, 4, 4), torch.float32, device, 2)
    contract.opcheck(torch.ops.fastddpm.add_bias.default, tuple(a.values()))


def test_batched_by_vmap() -> None:
    x, bias = torch.randn(3, 2, 4, 5, 5), torch.randn(4)
    torch.testing.assert_close(torch.vmap(add_bias, in_dims=(0, None))(x, bias), x + bias[:, None, None])
