"""What the compiled library has for networks with other options: resampling, heads, scale and shift."""

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.marks import instruction_sets, on_instruction_set
from torch import Tensor

from fastddpm.kernels import interface, native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with on_instruction_set(request.param):
        yield request.param


def guarded(*shape: int) -> tuple[Tensor, Tensor]:
    """NaN of that shape, and the memory of it with a float before and after it."""
    size = int(np.prod(shape))
    memory = torch.full((size + 2,), torch.nan)
    memory[0] = memory[-1] = 7.0
    return memory[1 : 1 + size].view(shape), memory


# One vector exactly, a part of one, several and a part, and rows that are shared among threads.
@pytest.mark.parametrize(("n", "height", "width", "c"), [(2, 4, 6, 16), (1, 2, 2, 3), (3, 6, 4, 37), (2, 40, 34, 24)])
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("activated", [False, True])
def test_resample(
    n: int, height: int, width: int, c: int, doubled: bool, activated: bool, isa: str, rng: np.random.Generator
) -> None:
    x = torch.tensor(rng.standard_normal((n, height, width, c)), dtype=torch.float32)
    gain, offset = (torch.tensor(rng.standard_normal((n, c)), dtype=torch.float32) for _ in range(2))
    value = x.double().numpy()
    if activated:
        value = oracle.silu(value * gain.double().numpy()[:, None, None] + offset.double().numpy()[:, None, None])
    if doubled:
        expected = value.repeat(2, axis=1).repeat(2, axis=2)
    else:
        expected = value.reshape(n, height // 2, 2, width // 2, 2, c).mean((2, 4))
    out, memory = guarded(*expected.shape)
    args = interface.Resample(
        x=x.data_ptr(), gain=gain.data_ptr() if activated else None, offset=offset.data_ptr() if activated else None,
        out=out.data_ptr(), n=n, height=height, width=width, c=c, doubled=doubled,
    )  # fmt: skip
    bits = []
    for threads in (1, 3):
        out.fill_(torch.nan)
        native.check("resample", native.library().fastddpm_cpu_resample(ctypes.byref(args), threads))
        bits.append(out.clone())
    assert torch.equal(*bits) and memory[0] == memory[-1] == 7.0
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    "wrong", [{"height": 3}, {"width": 3}, {"gain": 64}, {"offset": 64}], ids=["height", "width", "gain", "offset"]
)
def test_resample_refuses(wrong: dict[str, int]) -> None:
    """Odd sizes, which have no halves, and a gain without an offset; nothing is read or written."""
    args = interface.Resample(**{"n": 1, "height": 2, "width": 2, "c": 4} | wrong)
    with pytest.raises(RuntimeError, match="resample: a dtype or size that this operation does not take"):
        native.call("resample", args)


@pytest.mark.parametrize(("n", "tokens", "heads", "c"), [(2, 12, 2, 16), (1, 50, 5, 7), (3, 4, 8, 1)])
def test_heads_of_one_projection(n: int, tokens: int, heads: int, c: int, isa: str, rng: np.random.Generator) -> None:
    """q, k and v are the thirds of one tensor, and head h has channels h c .. (h + 1) c - 1 of each."""
    width = heads * c
    qkv = torch.tensor(rng.standard_normal((n, tokens, 3 * width)), dtype=torch.float32)
    out, memory = guarded(n, tokens, width)
    strides = {f"{name}_stride": (ctypes.c_int64 * 2)(tokens * 3 * width, 3 * width) for name in "qkv"}
    start = qkv.data_ptr()
    args = interface.Attention(
        q=start, k=start + 4 * width, v=start + 8 * width, out=out.data_ptr(), n=n * heads, l=tokens, c=c, heads=heads,
        scale=c**-0.5, out_stride=(ctypes.c_int64 * 2)(tokens * width, width), dtype=interface.FLOAT32, **strides,
    )  # fmt: skip
    native.call("attention", args)
    assert memory[0] == memory[-1] == 7.0
    q, k, v = qkv.double().numpy().reshape(n, tokens, 3, heads, c).transpose(2, 0, 3, 1, 4).reshape(3, -1, tokens, c)
    expected = oracle.attention(q, k, v).reshape(n, heads, tokens, c).transpose(0, 2, 1, 3).reshape(n, tokens, width)
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=0, atol=3e-6)
    args.heads = 3 if heads != 3 else 2
    if n * heads % args.heads:
        with pytest.raises(RuntimeError, match="attention: a dtype or size"):
            native.call("attention", args)
    args.heads = heads
    with pytest.raises(RuntimeError, match="attention_backward: a dtype or size"):
        native.call("attention_backward", args)


def test_scale_and_shift_of_a_norm(isa: str, rng: np.random.Generator) -> None:
    """Rows of scale and shift lie apart, as in the projections of all blocks side by side."""
    n, pixels, c, groups, apart = 2, 15, 12, 4, 40
    x = torch.tensor(rng.standard_normal((n, pixels, c)), dtype=torch.float32)
    weight, bias = (torch.tensor(rng.standard_normal(c), dtype=torch.float32) for _ in range(2))
    rows = torch.tensor(rng.standard_normal((n, apart)), dtype=torch.float32)
    (gain, around_gain), (offset, around_offset) = guarded(n, c), guarded(n, c)
    args = interface.NormAffine(
        x=x.data_ptr(), weight=weight.data_ptr(), bias=bias.data_ptr(), scale=rows.data_ptr() + 4 * 5,
        shift=rows.data_ptr() + 4 * (5 + c), scale_stride=apart, gain=gain.data_ptr(), offset=offset.data_ptr(),
        n=n, pixels=pixels, c1=c, groups=groups, eps=1e-5,
    )  # fmt: skip
    size = native.library().fastddpm_cpu_norm_affine_workspace(ctypes.byref(args))
    workspace = torch.empty(size, dtype=torch.uint8)
    args.workspace, args.workspace_bytes = workspace.data_ptr(), size
    native.call("norm_affine", args)
    assert all(memory[0] == memory[-1] == 7.0 for memory in (around_gain, around_offset))
    normal = oracle.group_norm(x.double().numpy().transpose(0, 2, 1)[..., None], groups, 1e-5)[..., 0].transpose(
        0, 2, 1
    )
    normal = normal * weight.double().numpy() + bias.double().numpy()
    scale, shift = (rows.double().numpy()[:, None, first : first + c] for first in (5, 5 + c))
    ours = x.double() * gain.double()[:, None] + offset.double()[:, None]
    np.testing.assert_allclose(ours.numpy(), normal * (1 + scale) + shift, rtol=0, atol=2e-5)
    args.shift = None
    with pytest.raises(RuntimeError, match="norm_affine: a dtype or size"):
        native.call("norm_affine", args)
