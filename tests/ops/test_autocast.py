"""What torch.autocast does to the operations: activations in its dtype, parameters and statistics as they are."""

import pytest
import torch
from helpers import contract
from torch import Tensor

from fastddpm.ops import attention, group_norm_silu


@pytest.mark.parametrize("dtype", contract.LOW_PRECISION)
def test_group_norm_silu_is_that_of_cast_images(dtype: torch.dtype, device: torch.device) -> None:
    """The result in autocast's dtype, equal to that of casting x and skip by hand; float32 weights stay."""
    x, skip = torch.randn(2, 4, 4, 4, device=device), torch.randn(2, 8, 4, 4, device=device)
    weight, bias, temb = (torch.randn(*shape, device=device) for shape in ((12,), (12,), (2, 12)))
    leaves = [tensor.requires_grad_() for tensor in (x, skip, weight, bias, temb)]

    def run(x: Tensor, skip: Tensor) -> list[Tensor]:
        y = group_norm_silu(x, weight, bias, 3, skip=skip, temb=temb)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    expected = run(x.to(dtype), skip.to(dtype))
    with torch.autocast(device.type, dtype):
        ours = run(x, skip)
        mixed = run(x.to(dtype), skip)
    assert ours[0].dtype == dtype and all(gradient.dtype == torch.float32 for gradient in ours[1:])
    for a, b, c in zip(ours, expected, mixed, strict=True):
        assert torch.equal(a, b) and torch.equal(c, b)


def test_attention_is_that_of_cast_inputs(device: torch.device) -> None:
    q, k, v = (torch.randn(2, 9, 16, device=device) for _ in range(3))
    expected = attention(*(x.bfloat16() for x in (q, k, v)))
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(attention(q, k, v), expected)
        assert torch.equal(attention(q.bfloat16(), k, v), expected)
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64
    with torch.autocast(device.type, enabled=False):
        assert attention(q, k, v).dtype == torch.float32


def test_autocast_compiles_without_a_break(device: torch.device) -> None:
    weight, bias = torch.randn(4, device=device), torch.randn(4, device=device)

    def function(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return group_norm_silu(x, weight, bias, 2)

    torch._dynamo.reset()
    x = torch.randn(2, 4, 3, 3, device=device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert compiled.dtype == torch.bfloat16 and torch.equal(compiled, function(x))
