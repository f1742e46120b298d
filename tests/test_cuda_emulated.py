"""The CUDA kernels on the CPU, through the callers that a GPU uses: numbers, masks, layouts, every launch path.

csrc/cuda/emulate runs the sources that nvcc compiles. docs/cuda.md says what that cannot show.
"""

import ctypes
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from fastddpm.kernels import native, native_cuda
from fastddpm.kernels.group_norm_silu import cuda as group_norm_cuda
from fastddpm.kernels.group_norm_silu import reference as group_norm_reference
from fastddpm.kernels.philox import reference as philox_reference
from fastddpm.kernels.q_sample import cuda as q_sample_cuda
from fastddpm.kernels.q_sample import reference as q_sample_reference
from fastddpm.kernels.random_normal import cuda as random_normal_cuda
from fastddpm.kernels.random_normal import reference as random_normal_reference
from fastddpm.kernels.reverse_step import FIXED, LEARNED, LEARNED_RANGE
from fastddpm.kernels.reverse_step import cuda as reverse_step_cuda
from fastddpm.kernels.reverse_step import reference as reverse_step_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Multiprocessors, shared memory of a block, clusters; None: the least memory with which an operation runs.
CHIPS = {"one block": (1, 227 * 1024, 1), "cluster": (132, 227 * 1024, 1), "parts": None}
ORDERS = (0, 1, 20201216)  # in which threads run
GUARD = 64


def _build_module() -> ModuleType:
    path = Path(__file__).parent.parent / "csrc" / "build.py"
    spec = importlib.util.spec_from_file_location("csrc_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def library_path() -> Path:
    build = _build_module()
    try:
        return build.build("_native_emulated")
    except build.NotBuilt as problem:
        pytest.skip(str(problem))


@pytest.fixture(autouse=True)
def emulated(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The library, with guard bytes around, and NaN in, everything that the callers allocate."""
    guarded: list[Tensor] = []
    empty = torch.empty

    def guarded_empty(*size: Any, dtype: Any = torch.float32, device: Any = None, memory_format: Any = None) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        num_bytes = math.prod(shape) * dtype.itemsize
        memory = empty(num_bytes + 2 * GUARD, dtype=torch.uint8).fill_(0xA5)
        memory[GUARD : GUARD + num_bytes] = 0xFF
        guarded.append(memory)
        flat = memory[GUARD : GUARD + num_bytes].view(dtype)
        if memory_format == torch.channels_last:
            n, c, h, w = shape
            return flat.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return flat.reshape(shape)

    with native_cuda.emulated(library_path) as library:
        library.fastddpm_emulation_chip(132, 227 * 1024, 1)
        library.fastddpm_emulation_order(0)
        monkeypatch.setattr(torch, "empty", guarded_empty)
        yield library
        monkeypatch.undo()
    for memory in guarded:
        assert (memory[:GUARD] == 0xA5).all() and (memory[-GUARD:] == 0xA5).all()


def launches(library: ctypes.CDLL) -> tuple[int, int]:
    """Kernels launched since the last call, and the largest cluster among them."""
    count, cluster = ctypes.c_int32(), ctypes.c_int32()
    library.fastddpm_emulation_launches(ctypes.byref(count), ctypes.byref(cluster))
    return count.value, cluster.value


def on_chip(library: ctypes.CDLL, chip: str, function: Callable[..., tuple[Tensor, ...]], *args: Any) -> Any:
    """function(*args) on one of CHIPS."""
    settings = CHIPS[chip]
    if settings is not None:
        library.fastddpm_emulation_chip(*settings)
        return function(*args)
    for shared in range(64, 64 * 1024, 64):
        library.fastddpm_emulation_chip(1, shared, 0)
        try:
            return function(*args)
        except RuntimeError as error:
            if "does not take" not in str(error):
                raise
    raise AssertionError("no size of shared memory is enough")


# The emulation itself


def test_a_missing_barrier_shows_in_the_order_of_threads(emulated: ctypes.CDLL) -> None:
    for barrier in (True, False):
        results = []
        for order in ORDERS:
            emulated.fastddpm_emulation_order(order)
            out = torch.full((64,), torch.nan)
            assert emulated.fastddpm_emulation_neighbour(ctypes.c_void_p(out.data_ptr()), int(barrier)) == 0
            results.append(out)
        right = [torch.equal(out, torch.arange(64.0).reshape(2, 32).flip(0).flatten()) for out in results]
        assert all(right) if barrier else not any(right)
        assert barrier or not torch.equal(results[0].nan_to_num(-1), results[1].nan_to_num(-1))


def test_divergent_barriers_and_writes_past_the_end_are_errors(emulated: ctypes.CDLL) -> None:
    assert b"barrier" in native_cuda.library().fastddpm_cuda_error_text(emulated.fastddpm_emulation_half_at_a_barrier())
    assert b"past the end" in native_cuda.library().fastddpm_cuda_error_text(emulated.fastddpm_emulation_past_the_end())


# random_normal and Philox


def key(num: int = 2, seed: int = -(2**40) - 3, step: int = 998) -> dict[str, Tensor]:
    images = [5, 2**32 - 1, 0, 77][:num]
    return {"images": torch.tensor(images), "seed": torch.tensor(seed), "step": torch.tensor(step)}


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345, -7])
def test_words_equal_the_specification_bit_for_bit(seed: int) -> None:
    images = torch.tensor([0, 5, 2**32 - 1])
    words = native_cuda.philox_words(1100, images, torch.tensor(seed), torch.tensor(999), 2049)
    expected = philox_reference.philox(
        np.arange(1100)[None, :], images.numpy()[:, None], np.array([999]), np.array([2049]), seed
    )
    np.testing.assert_array_equal(words.numpy(), np.stack(expected, axis=-1))


@pytest.mark.parametrize("shape", [[1], [4], [7], [3, 32, 32], [1025]])
def test_normals(shape: list[int]) -> None:
    arguments = (shape, *key(4).values(), 3)
    ours = random_normal_cuda.forward(*arguments)
    assert ours.shape == (4, *shape)
    torch.testing.assert_close(ours, random_normal_reference.forward(*arguments), rtol=0, atol=1e-6)
    expected = oracle.normals(tuple(shape), key(4)["images"].numpy(), -(2**40) - 3, 998, 3)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=2.0**-24, atol=1e-10)
    if native.unavailable() is None:
        theirs = native.random_normal(math.prod(shape), *key(4).values(), 3)
        assert torch.equal(ours.reshape(4, -1), theirs)  # one noise for CPU and GPU


def test_nothing_is_drawn_for_no_image_or_an_empty_one() -> None:
    zero = torch.tensor(0)
    assert random_normal_cuda.forward([8], torch.arange(0), zero, zero, 1).shape == (0, 8)
    assert random_normal_cuda.forward([0], torch.arange(3), zero, zero, 1).shape == (3, 0)


# q_sample

STRIDED = {
    "dense": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("size", [(8, 8), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [False, True])
def test_q_sample(given: bool, dtype: torch.dtype, size: tuple[int, int], layout: str) -> None:
    shape = (3, 3, *size)
    x0 = torch.randint(256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(shape, dtype=dtype)
    table = torch.rand(10, 2)
    noise = torch.randn(shape).to(memory_format=torch.channels_last) if given else None
    flip = torch.tensor([True, False, True])
    arguments = (STRIDED[layout](x0), torch.tensor([9, 0, 4]), table, flip, noise, *key(3).values())
    ours, expected = q_sample_cuda.forward(*arguments), q_sample_reference.forward(*arguments)
    for a, b in zip(ours, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=0 if given else 1e-6)


def test_q_sample_outside_the_table_is_nan_not_memory() -> None:
    table = torch.rand(10, 2)
    x_t, eps = q_sample_cuda.forward(
        torch.zeros(2, 1, 2, 2), torch.tensor([10, -1]), table, None, None, *key().values()
    )
    assert x_t.isnan().all() and eps.isfinite().all()


# reverse_step


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("variance", [FIXED, LEARNED, LEARNED_RANGE])
@pytest.mark.parametrize("given", [False, True])
def test_reverse_step(given: bool, variance: int, dtype: torch.dtype, layout: str) -> None:
    table = torch.rand(4, 8) - 0.3
    table[:, 5] = torch.tensor([0.7, 1.0, 0.2, 0.0])
    timesteps, (images, seed, _) = torch.tensor([900, 600, 3, 0]), key().values()
    channels = 2 if variance == FIXED else 4
    for index, size in ((1, (4, 4)), (3, (4, 4)), (2, (3, 5))):
        out = STRIDED[layout](torch.randn(2, channels, *size).to(dtype))
        x = STRIDED[layout](torch.randn(2, 2, *size))
        noise = torch.randn(x.shape) if given else None
        for clip in (0.0, 0.5):
            expected, ours = x.double(), STRIDED[layout](x.clone())
            x0 = torch.full_like(x, torch.nan) if clip else None
            x0_expected = torch.full_like(expected, torch.nan)
            rest = (timesteps, torch.tensor(index), images, seed, clip, variance)
            wide = None if noise is None else noise.double()
            reverse_step_reference.forward(expected, out.double(), table.double(), *rest, wide, x0_expected)
            reverse_step_cuda.forward(ours, out, table, *rest, noise, x0)
            torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=2e-6)
            if x0 is not None:
                torch.testing.assert_close(x0.double(), x0_expected, rtol=1e-6, atol=1e-6)


def test_reverse_step_outside_the_table_is_nan_not_memory() -> None:
    images, seed, _ = key().values()
    for index in (4, -1):
        x = torch.zeros(2, 1, 2, 2)
        reverse_step_cuda.forward(
            x, torch.zeros_like(x), torch.rand(4, 8), torch.arange(4), torch.tensor(index), images, seed, 0.0, 0,
            None, None,
        )  # fmt: skip
        assert x.isnan().all()


# group_norm_silu


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
    return module.forward(*arguments.values())


def backward(
    module: ModuleType, grad: Tensor, mean: Tensor, rstd: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, ...]:
    rest = {k: v for k, v in arguments.items() if k not in ("x", "weight", "bias", "eps")}
    return module.backward(grad, arguments["x"], arguments["weight"], arguments["bias"], mean, rstd, *rest.values())


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


def assert_path(library: ctypes.CDLL, chip: str, backward: bool) -> None:
    count, cluster = launches(library)
    assert count == (3 if chip == "parts" else 1) + backward
    assert (cluster > 1) == (chip == "cluster")


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_group_norm_silu(name: str, dtype: torch.dtype, layout: str, chip: str, emulated: ctypes.CDLL) -> None:
    arguments = CASES[name].arguments(dtype, layout)
    y, mean, rstd = on_chip(emulated, chip, forward, group_norm_cuda, arguments)
    exact = wide(arguments)
    expected, exact_mean, exact_rstd = forward(group_norm_reference, exact)
    # A mean of 30 deviations costs 5 bits of the deviation, however the rest is computed.
    error = 2e-6 * (1 + CASES[name].offset / 4)
    assert_rounded_once(y, expected, error)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=3e-6, atol=0)

    grad = torch.randn(y.shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    ours = on_chip(emulated, chip, backward, group_norm_cuda, grad, mean, rstd, arguments)
    gradients = backward(group_norm_reference, grad.double(), exact_mean, exact_rstd, exact)
    for a, b in zip(ours, gradients, strict=True):
        assert_rounded_once(a, b, 2 * error)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["seam", "attention"])
def test_each_path_is_taken_and_does_not_depend_on_the_order_of_threads(
    name: str, layout: str, chip: str, emulated: ctypes.CDLL
) -> None:
    arguments = replace(CASES[name], size=(8, 8)).arguments(torch.bfloat16, layout)
    results = []
    for order in ORDERS:
        emulated.fastddpm_emulation_order(order)
        launches(emulated)
        y, mean, rstd = on_chip(emulated, chip, forward, group_norm_cuda, arguments)
        assert_path(emulated, chip, backward=False)
        results.append((y, mean, rstd, *on_chip(emulated, chip, backward, group_norm_cuda, y, mean, rstd, arguments)))
        assert_path(emulated, chip, backward=True)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 32, 8, 8), (2, 6, 3, 1)])
def test_mask_is_the_references(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, chip: str, emulated: ctypes.CDLL
) -> None:
    n, c, *size = shape
    case = Case(n, c, (size[0], size[1]), 1, temb=False, affine=False, silu=False, dropout=0.25)
    arguments = case.arguments(dtype, layout) | {"weight": torch.zeros(c), "bias": torch.ones(c)}
    factor = group_norm_reference.dropout_scale(torch.Size(shape), 0.25, *key(n).values(), 21)
    y, mean, rstd = on_chip(emulated, chip, forward, group_norm_cuda, arguments)
    assert torch.equal(y, factor.to(dtype))
    # With weight 0 the gradient of bias is the sum of the mask.
    gradients = on_chip(emulated, chip, backward, group_norm_cuda, torch.ones_like(y), mean, rstd, arguments)
    grad_bias = gradients[3]
    torch.testing.assert_close(grad_bias, factor.sum((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_another_dtype(parameter_dtype: torch.dtype) -> None:
    """All of one dtype, as in a bf16 model; and mixed, as under autocast."""
    for mixed in (False, True):
        arguments = CASES["seam"].arguments(torch.float32, "nhwc", parameter_dtype)
        if mixed:
            arguments |= {k: arguments[k].float() for k in ("weight", "bias")}
        y, mean, rstd = forward(group_norm_cuda, arguments)
        expected, *statistics = forward(group_norm_reference, wide(arguments))
        assert_rounded_once(y, expected, 2e-6)
        gradients = backward(group_norm_reference, y.double(), *statistics, wide(arguments))
        ours = backward(group_norm_cuda, y, mean, rstd, arguments)
        assert [g.dtype for g in ours[2:]] == [arguments[k].dtype for k in ("weight", "bias", "temb", "scale", "shift")]
        for a, b in zip(ours, gradients, strict=True):
            assert_rounded_once(a, b, 4e-6)


def test_any_memory_layout_and_unaligned_storage() -> None:
    """Neither layout: made dense, and NCHW comes out. Not at a multiple of 16 bytes: no vectors."""
    case = CASES["seam"]
    for make in (
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].reshape(x.shape),
    ):
        arguments = case.arguments(torch.float32, "nchw")
        arguments |= {"x": make(arguments["x"]), "skip": make(arguments["skip"])}
        y, mean, rstd = forward(group_norm_cuda, arguments)
        expected, *statistics = forward(group_norm_reference, wide(arguments))
        assert_rounded_once(y, expected, 2e-6)
        grad = make(torch.randn(y.shape))
        gradients = backward(group_norm_reference, grad.double(), *statistics, wide(arguments))
        for a, b in zip(backward(group_norm_cuda, grad, mean, rstd, arguments), gradients, strict=True):
            assert_rounded_once(a, b, 4e-6)


def test_a_batch_of_none() -> None:
    arguments = replace(CASES["seam"], n=0, dropout=0.0).arguments(torch.float32, "nhwc")
    y, mean, rstd = forward(group_norm_cuda, arguments)
    gradients = backward(group_norm_cuda, y, mean, rstd, arguments)
    assert y.shape == (0, 96, 4, 4) and torch.equal(gradients[2], torch.zeros(96))


# The caller


def test_errors_name_the_operation_the_shapes_and_the_cause(emulated: ctypes.CDLL) -> None:
    emulated.fastddpm_emulation_chip(1, 64, 0)
    with pytest.raises(
        RuntimeError, match=r"group_norm_silu on cpu, float32 \(2, 64, 4, 4\).*does not take \(code -1\)"
    ):
        forward(group_norm_cuda, CASES["seam"].arguments(torch.float32, "nhwc"))


def test_float64_is_unsupported_in_words() -> None:
    x = torch.zeros(1, 4, 2, 2)
    assert group_norm_cuda.unsupported(x, None, 3) is None
    assert "not float64" in str(group_norm_cuda.unsupported(x.double(), None))


def test_without_emulation_tensors_must_be_on_a_gpu() -> None:
    emulated = native_cuda._emulated.pop()
    try:
        with pytest.raises(ValueError, match="reads tensors on cuda; got one on cpu"):
            native_cuda.pointer(torch.zeros(1))
        if not torch.cuda.is_available():
            assert native_cuda.unavailable() is not None
    finally:
        native_cuda._emulated.append(emulated)
