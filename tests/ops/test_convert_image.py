"""convert_image: dtype, layout, channels, a sum, and the image turned by 180 degrees."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import contract

from fastddpm.ops import convert_image

CASES: dict[str, dict[str, Any]] = {
    "more channels": {"channels": 8, "dtype": torch.bfloat16},
    "fewer channels, mirrored": {"channels": 2, "mirrored": True, "channels_last": False},
    "a sum": {"residual": True, "bias": True},
    "all": {"residual": True, "bias": True, "channels": 5, "mirrored": True, "dtype": torch.float16},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(3, 3, 6, 4), (2, 1, 5, 5), (1, 300, 3, 1), (2, 4, 70, 70)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_numbers(
    shape: tuple[int, ...], layout: torch.memory_format, case: str, device: torch.device, implementation: str
) -> None:
    options = dict(CASES[case])
    x = torch.randn(shape, device=device).to(memory_format=layout)
    residual = torch.randn(shape, device=device) if options.pop("residual", False) else None
    bias = torch.randn(shape[1], device=device) if options.pop("bias", False) else None
    ours = convert_image(x, residual=residual, bias=bias, **options)
    exact = contract.float64(x)
    exact = exact + (0 if residual is None else contract.float64(residual))
    exact = exact + (0 if bias is None else contract.float64(bias)[:, None, None])
    channels = options.get("channels", shape[1])
    exact = np.pad(exact, ((0, 0), (0, max(0, channels - shape[1])), (0, 0), (0, 0)))[:, :channels]
    exact = exact[:, :, ::-1, ::-1] if options.get("mirrored") else exact
    wanted = torch.channels_last if options.get("channels_last", True) else torch.contiguous_format
    assert ours.dtype == options.get("dtype", torch.float32) and ours.shape == exact.shape
    assert ours.stride() == torch.empty(ours.shape, memory_format=wanted).stride()
    bound = torch.finfo(ours.dtype).eps * np.abs(exact) + 2e-7 * (1 + np.abs(exact))
    assert (np.abs(contract.float64(ours) - exact) <= bound).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": torch.zeros(2, 3, 4, 5)}, r"residual must be torch.float32 \(2, 3, 4, 4\)"),
        ({"bias": torch.zeros(4)}, r"bias must be floating \(3,\); got torch.float32 \(4,\)"),
        ({"channels": 0}, "channels must be 1 or more; got 0"),
    ],
)
def test_other_shapes_are_refused(options: dict[str, Any], message: str, implementation: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_image(torch.zeros(2, 3, 4, 4), **options)


@pytest.mark.slow
def test_opcheck(implementation: str, device: torch.device) -> None:
    values = (torch.randn(2, 3, 4, 4, device=device), None, None, 8, True, torch.float32, True)
    torch.library.opcheck(torch.ops.fastddpm.convert_image.default, values)
