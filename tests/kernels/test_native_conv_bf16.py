"""Convolutions with factors in bfloat16: on every instruction set, with or without an instruction for them."""

import ctypes
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.conv_calls import Call, Case
from torch import Tensor

from fastddpm.kernels import interface, native
from fastddpm.kernels.interface import BFLOAT16, PATCHES, WINOGRAD_2X2, WINOGRAD_2X4, WINOGRAD_4X4

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.usefixtures("instruction_set"),
]

WINOGRAD = {
    "a residual block's first": Case(2, 64, 64, (16, 16), WINOGRAD_2X2, temb="each", residual=False),
    "its second": Case(2, 64, 64, (16, 16), WINOGRAD_2X2, temb="", in_place=True),
    "two inputs, seam within a line": Case(2, 21, 40, (6, 10), WINOGRAD_2X2, c2=13),
    "an odd number of channels": Case(2, 33, 35, (5, 7), WINOGRAD_2X2, silu=False),
    "doubled": Case(1, 32, 48, (6, 6), WINOGRAD_2X2, doubled=True, affine=False, residual=False),
    "many tiles": Case(2, 16, 16, (52, 44), WINOGRAD_2X2, temb="all"),
    "deep": Case(1, 300, 33, (8, 8), WINOGRAD_2X2),
    "weights turned by 180 degrees": Case(1, 48, 40, (9, 9), WINOGRAD_2X2, turned=True),
}
BY_PATCHES = {
    "patches": Case(2, 40, 36, (4, 4), PATCHES),
    "patches of two inputs": Case(2, 41, 36, (5, 3), PATCHES, c2=29),
    "patches, doubled": Case(1, 20, 24, (3, 4), PATCHES, doubled=True),
    "stride 2, odd": Case(2, 24, 40, (7, 9), PATCHES, stride=2),
    "linear": Case(2, 64, 96, (8, 8), PATCHES, kernel=1),
    "linear of two inputs, many pixels": Case(3, 33, 50, (16, 16), PATCHES, c2=31, kernel=1),
    "two channels to one": Case(1, 2, 1, (1, 1), PATCHES, kernel=1),
    "deep patches": Case(1, 200, 20, (3, 3), PATCHES),
}
TILES = {WINOGRAD_2X2: (2, 2), WINOGRAD_2X4: (2, 4)}


def matrices(outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """B^T, G and A^T of F(outputs, 3) by the construction of Toom and Cook, in float64."""
    points = {2: [0.0, 1.0, -1.0], 4: [0.0, 1.5, -1.5, 0.625, -0.625]}[outputs]
    size = len(points) + 1
    input_, weight, output = torch.zeros(size, size), torch.zeros(size, 3), torch.zeros(outputs, size)
    input_, weight, output = input_.double(), weight.double(), output.double()
    for i, point in enumerate([*points, None]):
        others = [other for other in points if other != point]
        polynomial, scale = torch.ones(1).double(), 1.0
        for other in others:  # times x - other
            polynomial = F.pad(polynomial, (1, 0)) - other * F.pad(polynomial, (0, 1))
            scale *= 1.0 if point is None else point - other
        input_[i, : len(polynomial)] = polynomial
        weight[i] = torch.tensor([0, 0, 1.0] if point is None else [point**j / scale for j in range(3)])
        output[:, i] = torch.tensor([float(j == outputs - 1) if point is None else point**j for j in range(outputs)])
    return input_, weight, output


def by_winograd(call: Call) -> Tensor:
    """The result with transformed inputs and weights rounded to bfloat16, everything else in float64."""
    down, across = TILES[call.case.algorithm]
    (input_down, weight_down, output_down), (input_across, weight_across, output_across) = map(matrices, (down, across))
    h, weight = call.activated(), call.weight.double()
    weight = weight.flip(2, 3) if call.case.turned else weight
    height, width = h.shape[2:]
    h = F.pad(h, (1, 1 + -width % across, 1, 1 + -height % down))
    tiles = h.unfold(2, down + 2, down).unfold(3, across + 2, across)
    v = torch.einsum("ia,nchwab,jb->nchwij", input_down, tiles, input_across).float().bfloat16().double()
    u = torch.einsum("ia,kcab,jb->kcij", weight_down, weight, weight_across).float().bfloat16().double()
    m = torch.einsum("nchwij,kcij->nkhwij", v, u)
    y = torch.einsum("ai,nkhwij,bj->nkhawb", output_down, m, output_across)
    y = y.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    return call.finished(y if call.bias is None else y + call.bias.double()[:, None, None])


def relative(error: Tensor, expected: Tensor) -> float:
    return float(error.norm() / expected.norm())


@pytest.mark.parametrize("packed", [False, True], ids=["weights", "packed"])
@pytest.mark.parametrize("algorithm", TILES, ids=["2x2", "2x4"])
@pytest.mark.parametrize("name", WINOGRAD)
def test_winograd(name: str, algorithm: int, packed: bool) -> None:
    """A factor at the middle between two bfloat16 may be rounded to the other one: 2^-8 of few products."""
    if packed and WINOGRAD[name].turned:
        pytest.skip("the network's weights lie as they are")
    case = replace(WINOGRAD[name], algorithm=algorithm, precision=BFLOAT16)
    call = Call(case, packed=packed)
    expected = by_winograd(call)
    assert call.run() == 0
    assert relative(call.out.double() - expected, expected) <= 5e-4


@pytest.mark.parametrize("packed", [False, True], ids=["weights", "packed"])
@pytest.mark.parametrize("name", BY_PATCHES)
def test_patches(name: str, packed: bool) -> None:
    """Against the definition with rounded factors."""
    call = Call(replace(BY_PATCHES[name], precision=BFLOAT16), packed=packed)
    assert call.run() == 0
    assert relative(call.out.double() - call.expected, call.expected) <= 5e-4


@pytest.mark.parametrize("name", ["an odd number of channels", "deep"])
def test_small_integers_are_exact(name: str) -> None:
    """F(2x2) adds inputs and quarters sums of weights: with these, every factor is exact in bfloat16."""
    call = Call(replace(WINOGRAD[name], precision=BFLOAT16, affine=False, residual=False, temb="", bias=False))
    call.x.copy_(torch.randint(-8, 9, call.x.shape))
    call.weight.copy_(4 * torch.randint(-3, 4, call.weight.shape))
    assert call.run() == 0
    assert torch.equal(call.out.double(), call.in_float64())


@pytest.mark.parametrize("name", [*WINOGRAD, *BY_PATCHES])
def test_the_same_bits_packed_or_not_and_with_any_number_of_threads(name: str) -> None:
    case = replace((WINOGRAD | BY_PATCHES)[name], precision=BFLOAT16)
    results = []
    for packed, threads in ((False, 1), (True, 1), (False, 3), (True, 8)):
        torch.manual_seed(0)
        call = Call(case, packed=packed and not case.turned, threads=threads)
        assert call.run() == 0
        results.append(call.out)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ["a residual block's first", "two inputs, seam within a line", "linear"])
def test_an_image_has_the_same_bits_in_any_batch(name: str) -> None:
    case = replace((WINOGRAD | BY_PATCHES)[name], precision=BFLOAT16, residual=False)
    torch.manual_seed(0)
    batch = Call(case)
    assert batch.run() == 0
    alone = Call(replace(case, n=1))
    for name_ in ("x", "skip", "gain", "offset", "temb"):
        if getattr(batch, name_) is not None:
            getattr(alone, name_).copy_(getattr(batch, name_)[-1:])
    for name_ in ("weight", "bias"):
        getattr(alone, name_).copy_(getattr(batch, name_))
    assert alone.run() == 0
    assert torch.equal(alone.out[0], batch.out[-1])


@pytest.mark.parametrize("name", ["a residual block's first", "linear"])
def test_too_small_a_workspace_is_refused(name: str) -> None:
    call = Call(replace((WINOGRAD | BY_PATCHES)[name], precision=BFLOAT16))
    call.args.workspace_bytes -= 1
    assert call.run() == -2
    assert torch.isnan(call.out).all()


@pytest.mark.parametrize(
    "change",
    [{"algorithm": WINOGRAD_4X4}, {"algorithm": 9}, {"precision": 2}, {"kernel": 1}, {"stride": 2}, {"pad": 0},
     {"algorithm": PATCHES, "c1": 63}],
)  # fmt: skip
def test_what_there_is_no_algorithm_for_is_refused(change: dict[str, int]) -> None:
    call = Call(replace(WINOGRAD["a residual block's first"], precision=BFLOAT16))
    for name, value in change.items():
        setattr(call.args, name, value)
    assert call.run() == -1
    assert torch.isnan(call.out).all()
    assert native.library().fastddpm_cpu_conv_packed_bytes(ctypes.byref(call.args)) == 0


ATTENTION = {  # (images, tokens, channels of a head, heads)
    "the paper's": (2, 256, 256, 1),
    "no multiple of anything": (1, 9, 7, 1),
    "heads": (3, 49, 20, 2),
    "odd heads": (1, 64, 33, 3),
    "a thread takes whole sequences": (9, 17, 16, 1),
    "one token": (1, 1, 1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, dtype: torch.dtype) -> None:
    """Against softmax(q k^T) v in float64 with q, k, v and the weights before their division rounded."""
    n, tokens, channels, heads = ATTENTION[name]
    q, k, v = (torch.randn(n, tokens, heads * channels).to(dtype) for _ in range(3))
    memory = torch.full((n * tokens * heads * channels + 32,), torch.nan, dtype=dtype)
    out = memory[16:-16].view(q.shape)
    strides = (ctypes.c_int64 * 2)(tokens * heads * channels, heads * channels)
    args = interface.Attention(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), n=n * heads, l=tokens, c=channels,
        heads=heads, q_stride=strides, k_stride=strides, v_stride=strides, out_stride=strides, scale=channels**-0.5,
        dtype=native.dtype_code(dtype), precision=BFLOAT16,
    )  # fmt: skip

    def rounded(x: Tensor) -> Tensor:
        return x.float().bfloat16().double()

    exact_q, exact_k, exact_v = (rounded(x).view(n, tokens, heads, channels).transpose(1, 2) for x in (q, k, v))
    scores = exact_q @ exact_k.transpose(2, 3) * channels**-0.5
    weights = (scores - scores.amax(3, keepdim=True)).exp()
    expected = (rounded(weights) @ exact_v / weights.sum(3, keepdim=True)).transpose(1, 2).reshape(out.shape)
    results = []
    for threads in (1, 2, 3):
        assert native.library().fastddpm_cpu_attention(ctypes.byref(args), threads) == 0
        results.append(out.clone())
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.isnan(torch.cat([memory[:16], memory[-16:]])).all(), "written outside the output"
    assert relative(out.double() - expected, expected) <= (2e-4 if dtype == torch.float32 else 3e-3)
