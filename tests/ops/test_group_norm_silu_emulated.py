"""group_norm_silu's CUDA kernels on the CPU: the numbers of every path, masks, layouts, chips.

csrc/cuda/emulate runs the sources that nvcc compiles. docs/cuda.md says what that cannot show.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import contract, group_norm_silu_cases
from helpers.emulated_cuda import CHIPS, ORDERS, PATHS, emulated_library, key, launches, on_path
from helpers.marks import slow
from torch import Tensor

from fastddpm.kernels.group_norm_silu import Arguments, cuda, reference

DTYPES = [torch.float32, torch.bfloat16, slow(torch.float16)]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    with emulated_library(monkeypatch) as library:
        yield library


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call."""

    n: int
    c1: int
    size: tuple[int, int]
    groups: int
    c2: int = 0
    temb: bool = True
    affine: bool = True
    silu: bool = True
    dropout: float = 0.0
    offset: int = 0  # added to x: a large mean

    def arguments(self, dtype: torch.dtype, layout: str, parameter_dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The reference's arguments by name; parameters float32 unless told."""
        c, kept = self.c1 + self.c2, parameter_dtype or torch.float32

        def image(channels: int) -> Tensor:
            x = torch.randn(self.n, channels, *self.size) + self.offset
            return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])

        def per_image(wanted: bool) -> Tensor | None:
            return torch.randn(self.n, c).to(kept) if wanted else None

        return {
            "x": image(self.c1), "weight": (1 + torch.randn(c) / 2).to(kept), "bias": torch.randn(c).to(kept),
            "groups": self.groups, "eps": 1e-6, "skip": image(self.c2) if self.c2 else None,
            "temb": per_image(self.temb), "scale": per_image(self.affine), "shift": per_image(self.affine),
            "silu": self.silu, "dropout": self.dropout, **key(self.n), "layer": 21,
        }  # fmt: skip


CASES = {
    # 12 channels to a group; the seam lies inside the sixth.
    "seam": Case(2, 64, (4, 4), 8, c2=32, dropout=0.3),
    # No vectors: 3 channels to a group, odd sizes.
    "scalar": Case(3, 5, (3, 5), 3, c2=4, dropout=0.1),
    "attention": Case(2, 32, (8, 8), 8, temb=False, affine=False, silu=False),
    # More channels in a group than lanes in a warp, and an image that a cluster does not divide evenly.
    "wide group": Case(1, 80, (5, 8), 2, affine=False),
    "1x1": Case(4, 16, (1, 1), 4, dropout=0.5),
    # More columns than a block has threads.
    "wide row": Case(1, 150, (1, 2), 7, c2=151),
    "large mean": Case(2, 48, (8, 8), 4, temb=False, offset=30),
}


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


def forward(module: ModuleType, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    return module.forward(Arguments(**arguments))


def backward(
    module: ModuleType, grad: Tensor, mean: Tensor, rstd: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, ...]:
    return module.backward(Arguments(**arguments), grad, mean, rstd, None, None)


def assert_rounded_once(ours: Tensor, expected: Tensor, error: float) -> None:
    """Within `error` of the largest value, plus one rounding of each to ours' dtype."""
    assert ours.shape == expected.shape and ours.stride() == expected.stride()
    if not ours.numel():
        return
    rounding = 0 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps / 2 * 1.001
    # float16 is subnormal below 2^-14, where a rounding is of 2^-25.
    bound = error * max(1.0, expected.abs().max().item()) + rounding * expected.abs() + 2.0**-25
    excess = ((ours.double() - expected).abs() - bound).max().item()
    assert excess <= 0, f"{excess} more than allowed"


def assert_path(library: ctypes.CDLL, path: str, backward: bool) -> None:
    count, cluster = launches(library)
    assert count == (3 if path == "parts" else 1) + backward
    assert (cluster > 1) == (path == "cluster")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", [slow("nchw"), "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_group_norm_silu(name: str, dtype: torch.dtype, layout: str, path: str, emulated: ctypes.CDLL) -> None:
    arguments = CASES[name].arguments(dtype, layout)
    y, mean, rstd = on_path(emulated, path, forward, cuda, arguments)
    exact = wide(arguments)
    expected, exact_mean, exact_rstd = forward(reference, exact)
    # A mean of 30 deviations costs 5 bits of the deviation, however the rest is computed.
    error = 2e-6 * (1 + CASES[name].offset / 4)
    assert_rounded_once(y, expected, error)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=3e-6, atol=0)

    grad = torch.randn(y.shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    ours = on_path(emulated, path, backward, cuda, grad, mean, rstd, arguments)
    gradients = backward(reference, grad.double(), exact_mean, exact_rstd, exact)
    for a, b in zip(ours, gradients, strict=True):
        assert_rounded_once(a, b, 2 * error)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["seam", "attention"])
def test_each_path_is_taken_and_does_not_depend_on_the_order_of_threads(
    name: str, layout: str, path: str, emulated: ctypes.CDLL
) -> None:
    arguments = replace(CASES[name], size=(8, 8)).arguments(torch.bfloat16, layout)
    results = []
    for order in ORDERS:
        emulated.fastddpm_emulation_order(order)
        launches(emulated)
        y, mean, rstd = on_path(emulated, path, forward, cuda, arguments)
        assert_path(emulated, path, backward=False)
        results.append((y, mean, rstd, *on_path(emulated, path, backward, cuda, y, mean, rstd, arguments)))
        assert_path(emulated, path, backward=True)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, p", [((2, 3, 5, 7), 0.1), ((2, 32, 8, 8), 0.25), ((2, 6, 3, 1), 0.999), ((1, 8, 4, 4), 1e-6)]
)
def test_mask_is_the_references(
    shape: tuple[int, int, int, int], p: float, dtype: torch.dtype, layout: str, path: str, emulated: ctypes.CDLL
) -> None:
    n, c, *size = shape
    case = Case(n, c, (size[0], size[1]), 1, temb=False, affine=False, silu=False, dropout=p)
    arguments = case.arguments(dtype, layout) | {"weight": torch.zeros(c), "bias": torch.ones(c)}
    factor = reference.dropout_scale(torch.Size(shape), p, *key(n).values(), 21)
    y, mean, rstd = on_path(emulated, path, forward, cuda, arguments)
    assert torch.equal(y, factor.to(dtype))
    # With weight 0 the gradient of bias is the sum of the mask.
    gradients = on_path(emulated, path, backward, cuda, torch.ones_like(y), mean, rstd, arguments)
    grad_bias = gradients[3]
    torch.testing.assert_close(grad_bias, factor.sum((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_another_dtype(parameter_dtype: torch.dtype) -> None:
    """All of one dtype, as in a bf16 model; and mixed, as under autocast."""
    for mixed in (False, True):
        arguments = CASES["seam"].arguments(torch.float32, "nhwc", parameter_dtype)
        if mixed:
            arguments |= {k: arguments[k].float() for k in ("weight", "bias")}
        y, mean, rstd = forward(cuda, arguments)
        expected, *statistics = forward(reference, wide(arguments))
        assert_rounded_once(y, expected, 2e-6)
        gradients = backward(reference, y.double(), *statistics, wide(arguments))
        ours = backward(cuda, y, mean, rstd, arguments)
        assert [g.dtype for g in ours[2:]] == [arguments[k].dtype for k in ("weight", "bias", "temb", "scale", "shift")]
        for a, b in zip(ours, gradients, strict=True):
            assert_rounded_once(a, b, 4e-6)


def named_arguments(tensors: dict[str, Tensor], case: group_norm_silu_cases.Case) -> dict[str, Any]:
    """The reference's arguments for a case of the suite that all backends share."""
    optional = {name: tensors.get(name) for name in ("skip", "temb", "scale", "shift")}
    given = {
        "x": tensors["x"],
        "weight": tensors["weight"],
        "bias": tensors["bias"],
        "groups": case.groups,
        "eps": 1e-6,
    }
    silu = "linear" not in case.options
    return {**given, **optional, "silu": silu, "dropout": 0.0, "images": None, "seed": None, "step": None, "layer": 0}


def assert_matches_the_case(case: group_norm_silu_cases.Case, tensors: dict[str, Tensor], error: float = 2e-6) -> None:
    """Output and gradients against the numbers in float64 that group_norm_silu_cases derives by hand."""
    arguments = named_arguments(tensors, case)
    y, mean, rstd = forward(cuda, arguments)
    assert_rounded_once(y, dense_like(group_norm_silu_cases.expected_output(case, tensors), y), error)
    grad = torch.randn(y.shape).to(y.dtype)
    names = ("x", "skip", "weight", "bias", "temb", "scale", "shift")
    expected = group_norm_silu_cases.expected_gradients(case, tensors, grad)
    for name, gradient in zip(names, backward(cuda, grad, mean, rstd, arguments), strict=True):
        if name in tensors:
            # Where the deviation is 0, differences that should cancel are multiplied by 1 / sqrt(eps) = 1000.
            amplified = max(1.0, rstd.max().item() / 10) if name in ("x", "skip", "temb") else 1.0
            assert_rounded_once(gradient, dense_like(expected[name], gradient), 2 * error * amplified)
        else:
            assert gradient.numel() == 0


def dense_like(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=torch.float64).copy_(torch.from_numpy(np.ascontiguousarray(values)))


@pytest.mark.parametrize("chip", ["H200", slow("A100"), slow("RTX 4090")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", group_norm_silu_cases.CASES)
def test_the_cases_of_every_backend(
    name: str, dtype: torch.dtype, layout: str, chip: str, emulated: ctypes.CDLL
) -> None:
    emulated.fastddpm_emulation_chip(*CHIPS[chip])
    case = group_norm_silu_cases.CASES[name]
    tensors = case.inputs(dtype, torch.device("cpu"))
    tensors |= {image: contract.LAYOUTS[layout](tensors[image]) for image in ("x", "skip") if image in tensors}
    assert_matches_the_case(case, tensors)


@pytest.mark.parametrize("layout", contract.LAYOUTS)
@pytest.mark.parametrize("skip_layout", contract.LAYOUTS)
@pytest.mark.parametrize("c1, c2", [(8, 4), (16, 8), (5, 7)])
def test_any_memory_layout(c1: int, c2: int, skip_layout: str, layout: str) -> None:
    """Neither layout: made dense, and NCHW comes out. Not at a multiple of 16 bytes: no vectors."""
    case = group_norm_silu_cases.Case(2, c1, (4, 6), 3, c2=c2, options=("temb",))
    tensors = case.inputs(torch.float32, torch.device("cpu"))
    tensors |= {"x": contract.LAYOUTS[layout](tensors["x"]), "skip": contract.LAYOUTS[skip_layout](tensors["skip"])}
    assert_matches_the_case(case, tensors)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_group(layout: str, path: str, emulated: ctypes.CDLL) -> None:
    case = Case(2, 32, (8, 8), 4, temb=False, affine=False)
    for value in (torch.nan, torch.inf, -torch.inf):
        arguments = case.arguments(torch.bfloat16, layout)
        arguments["x"][1, 11, 3, 3] = value
        y, mean, rstd = on_path(emulated, path, forward, cuda, arguments)
        spoilt = torch.zeros(2, 32, dtype=torch.bool)
        spoilt[1, 8:16] = True
        assert torch.equal(y.isnan().all((2, 3)), spoilt) and y.isnan().sum() == 8 * 64
        gradients = on_path(emulated, path, backward, cuda, torch.ones_like(y), mean, rstd, arguments)
        assert torch.equal(gradients[0].isnan().all((2, 3)), spoilt) and gradients[0].isnan().sum() == 8 * 64
        assert torch.equal(gradients[2].isnan(), spoilt[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saturated_silu_is_a_number(layout: str) -> None:
    """Far below zero SiLU and its derivative are 0, however far."""
    arguments = Case(1, 8, (4, 4), 2, temb=False, affine=False).arguments(torch.float32, layout)
    arguments |= {"weight": torch.zeros(8), "bias": -(10.0 ** torch.arange(1, 9))}
    y, mean, rstd = forward(cuda, arguments)
    assert y.isfinite().all() and (y[:, 2:] == 0).all()
    assert all(gradient.isfinite().all() for gradient in backward(cuda, torch.ones_like(y), mean, rstd, arguments))


# Of the networks in fastddpm/presets.py and larger; (launches, whether in clusters) of a forward pass.
PLANS = {
    "CIFAR-10, batch 128": ((128, 128, 32), {"H200": (1, False), "A100": (1, False), "RTX 4090": (1, False)}),
    "CIFAR-10, batch 1": ((1, 128, 32), {"H200": (1, True), "A100": (1, False), "RTX 4090": (1, False)}),
    "256x256, batch 1": ((1, 128, 256), {"H200": (3, False), "A100": (3, False), "RTX 4090": (3, False)}),
    "128x128, batch 1": ((1, 128, 128), {"H200": (1, True), "A100": (3, False), "RTX 4090": (3, False)}),
}


@pytest.mark.slow
def test_fewest_passes_that_a_chip_has_room_for(emulated: ctypes.CDLL) -> None:
    """The launches alone: the images are made of one value, and shared by a whole batch's addresses."""
    for (n, c, side), chips in PLANS.values():
        small = min(n, 2)
        x = torch.ones(small, c, side, side, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        for chip, expected in chips.items():
            multiprocessors, *rest = CHIPS[chip]
            # As many multiprocessors to an image as in the whole batch.
            emulated.fastddpm_emulation_chip(-(-multiprocessors * small // n), *rest)
            launches(emulated)
            one = torch.ones(c)
            cuda.forward(Arguments(x, one, one, 32, silu=False))
            count, cluster = launches(emulated)
            assert (count, cluster > 1) == expected, (chip, n, c, side)


def test_a_large_image(emulated: ctypes.CDLL) -> None:
    """A group's 16 channels of 256x256 in bfloat16 are too large for a cluster."""
    for layout in LAYOUTS:
        arguments = Case(1, 32, (256, 256), 2, dropout=0.1).arguments(torch.bfloat16, layout)
        launches(emulated)
        y, mean, rstd = forward(cuda, arguments)
        assert launches(emulated)[0] == 3
        expected, *statistics = forward(reference, wide(arguments))
        assert_rounded_once(y, expected, 4e-6)
        gradients = backward(reference, y.double(), *statistics, wide(arguments))
        for a, b in zip(backward(cuda, y, mean, rstd, arguments), gradients, strict=True):
            assert_rounded_once(a, b, 1e-5)


@pytest.mark.slow
def test_more_images_than_other_grid_dimensions_take() -> None:
    arguments = Case(66_000, 2, (1, 1), 1, affine=False).arguments(torch.float32, "nhwc") | {"eps": 0.1}
    assert_rounded_once(forward(cuda, arguments)[0], forward(reference, wide(arguments))[0], 2e-6)


def test_sums_over_many_images() -> None:
    arguments = Case(2000, 2, (1, 1), 1).arguments(torch.float32, "nhwc") | {"eps": 0.1}
    y, mean, rstd = forward(cuda, arguments)
    _, *statistics = forward(reference, wide(arguments))
    gradients = backward(reference, y.double(), *statistics, wide(arguments))
    for a, b in zip(backward(cuda, y, mean, rstd, arguments), gradients, strict=True):
        assert_rounded_once(a, b, 4e-6)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("groups, c", [(1, 1024), (8, 8 * 1023)])
def test_as_many_channels_to_a_group_as_are_supported(groups: int, c: int, chip: str, emulated: ctypes.CDLL) -> None:
    """An odd number of them is no multiple of a vector; eight groups are, but have no room."""
    emulated.fastddpm_emulation_chip(*CHIPS[chip])
    for layout in LAYOUTS:
        arguments = Case(1, c, (2, 4), groups).arguments(torch.bfloat16, layout)
        assert cuda.unsupported(**arguments) is None
        y, mean, rstd = forward(cuda, arguments)
        expected, *statistics = forward(reference, wide(arguments))
        assert_rounded_once(y, expected, 2e-6)
        gradients = backward(reference, y.double(), *statistics, wide(arguments))
        for a, b in zip(backward(cuda, y, mean, rstd, arguments), gradients, strict=True):
            assert_rounded_once(a, b, 4e-6)


def test_a_batch_of_none() -> None:
    arguments = replace(CASES["seam"], n=0, dropout=0.0).arguments(torch.float32, "nhwc")
    y, mean, rstd = forward(cuda, arguments)
    gradients = backward(cuda, y, mean, rstd, arguments)
    assert y.shape == (0, 96, 4, 4) and torch.equal(gradients[2], torch.zeros(96))
