"""The CUDA kernels on the CPU, through the callers that a GPU uses: the emulation, noise, q_sample, reverse_step.

csrc/cuda/emulate runs the sources that nvcc compiles. docs/cuda.md says what that cannot show.
tests/ops/test_group_norm_silu_emulated.py has the rest.
"""

import ctypes
import math
import mmap
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.emulated_cuda import ORDERS, emulated_library, key
from torch import Tensor

from fastddpm.kernels import group_norm_silu, native, native_cuda, q_sample, random_normal, reverse_step
from fastddpm.kernels.group_norm_silu import cuda as group_norm_cuda
from fastddpm.kernels.philox import reference as philox_reference
from fastddpm.kernels.q_sample import cuda as q_sample_cuda
from fastddpm.kernels.q_sample import reference as q_sample_reference
from fastddpm.kernels.random_normal import cuda as random_normal_cuda
from fastddpm.kernels.random_normal import reference as random_normal_reference
from fastddpm.kernels.reverse_step import FIXED, LEARNED, LEARNED_RANGE
from fastddpm.kernels.reverse_step import cuda as reverse_step_cuda
from fastddpm.kernels.reverse_step import reference as reverse_step_reference


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    with emulated_library(monkeypatch) as library:
        yield library


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


def test_the_emulation_sees_unaligned_packs_and_blocks_that_end_too_early(emulated: ctypes.CDLL) -> None:
    data, out = torch.zeros(256), torch.zeros(256)
    code = emulated.fastddpm_emulation_one_off(ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    assert b"does not divide" in emulated.fastddpm_cuda_error_text(code)
    for wait in (True, False):
        right = []
        for order in ORDERS:
            emulated.fastddpm_emulation_order(order)
            assert emulated.fastddpm_emulation_neighbour_block(ctypes.c_void_p(out.data_ptr()), int(wait)) == 0
            right.append(torch.equal(out[:64], torch.tensor([1.0, 0.0]).repeat_interleave(32)))
        assert all(right) if wait else not any(right)


# random_normal and Philox


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
    arguments = random_normal.Arguments(shape, *key(4).values(), 3)
    ours = random_normal_cuda.forward(arguments)
    assert ours.shape == (4, *shape)
    torch.testing.assert_close(ours, random_normal_reference.forward(arguments), rtol=0, atol=1e-6)
    expected = oracle.normals(tuple(shape), key(4)["images"].numpy(), -(2**40) - 3, 998, 3)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=2.0**-24, atol=1e-10)
    if native.unavailable() is None:
        theirs = native.random_normal(math.prod(shape), *key(4).values(), 3)
        assert torch.equal(ours.reshape(4, -1), theirs)  # one noise for CPU and GPU


def test_nothing_is_drawn_for_no_image_or_an_empty_one() -> None:
    zero = torch.tensor(0)
    for shape, n in (([8], 0), ([0], 3)):
        arguments = random_normal.Arguments(shape, torch.arange(n), zero, zero, 1)
        assert random_normal_cuda.forward(arguments).shape == (n, *shape)


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
    arguments = q_sample.Arguments(
        STRIDED[layout](x0), torch.tensor([9, 0, 4]), table, flip, noise, *key(3).values()
    )  # fmt: skip
    ours, expected = q_sample_cuda.forward(arguments), q_sample_reference.forward(arguments)
    for a, b in zip(ours, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=0 if given else 1e-6)


def test_q_sample_outside_the_table_is_nan_not_memory() -> None:
    table = torch.rand(10, 2)
    x0, t = torch.zeros(2, 1, 2, 2), torch.tensor([10, -1])
    x_t, eps = q_sample_cuda.forward(q_sample.Arguments(x0, t, table, None, None, *key().values()))
    assert x_t.isnan().all() and eps.isfinite().all()


# reverse_step


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variance", [FIXED, LEARNED, LEARNED_RANGE])
@pytest.mark.parametrize("given", [False, True])
def test_reverse_step(given: bool, variance: int, dtype: torch.dtype, layout: str) -> None:
    with_earlier = torch.rand(4, 9) - 0.3
    with_earlier[:, 5] = torch.tensor([0.7, 1.0, 0.2, 0.0])
    with_earlier[3, 8] = 0.0
    timesteps, (images, seed, _) = torch.tensor([900, 600, 3, 0]), key().values()
    channels = 2 if variance == FIXED else 4
    for index, size in ((1, (4, 4)), (3, (4, 4)), (2, (3, 5))):
        out = STRIDED[layout](torch.randn(2, channels, *size).to(dtype))
        x = STRIDED[layout](torch.randn(2, 2, *size))
        noise = torch.randn(x.shape) if given else None
        for clip in (0.0, 0.5):
            expected, ours = x.double(), STRIDED[layout](x.clone())
            # Without an earlier prediction the last column is 0, and where it is 0 the prediction is not read.
            table = with_earlier if clip else torch.cat([with_earlier[:, :8], torch.zeros(4, 1)], dim=1)
            earlier = torch.full_like(x, torch.nan) if index == 3 else torch.randn(x.shape)
            x0, x0_expected = earlier.clone() if clip else None, earlier.double()
            rest = (timesteps, torch.tensor(index), images, seed, clip, variance)
            wide = None if noise is None else noise.double()
            reverse_step_reference.forward(
                reverse_step.Arguments(expected, out.double(), table.double(), *rest, wide, x0_expected)
            )
            reverse_step_cuda.forward(reverse_step.Arguments(ours, out, table, *rest, noise, x0))
            torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=2e-6)
            if x0 is not None:
                torch.testing.assert_close(x0.double(), x0_expected, rtol=1e-6, atol=1e-6)


def test_reverse_step_outside_the_table_is_nan_not_memory() -> None:
    images, seed, _ = key().values()
    for index in (4, -1):
        x = torch.zeros(2, 1, 2, 2)
        step = (torch.zeros_like(x), torch.rand(4, 9), torch.arange(4), torch.tensor(index))
        reverse_step_cuda.forward(reverse_step.Arguments(x, *step, images, seed, clip=0.0, variance=FIXED))
        assert x.isnan().all()


# Strides


def test_elements_farther_apart_than_32_bits_count() -> None:
    """The pages in between are never touched."""
    memory = torch.frombuffer(mmap.mmap(-1, 2**31 + 2**20), dtype=torch.uint8)
    far = memory.as_strided((2, 1, 2, 2), (2**31 + 64, 4, 2, 1))
    far.copy_(torch.tensor([[0, 50, 100, 255], [1, 2, 3, 4]]).reshape(2, 1, 2, 2))
    t, table, noise = torch.tensor([1, 2]), torch.rand(4, 2), torch.randn(2, 1, 2, 2)
    arguments = q_sample.Arguments(far, t, table, None, noise, *key().values())
    ours, expected = q_sample_cuda.forward(arguments), q_sample_reference.forward(arguments)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


# The caller


def test_errors_name_the_operation_the_shapes_and_the_cause(emulated: ctypes.CDLL) -> None:
    emulated.fastddpm_emulation_chip(1, 64, 1)
    x, weight = torch.zeros(2, 64, 4, 4), torch.ones(64)
    with pytest.raises(
        RuntimeError, match=r"group_norm_silu on cpu, float32 \(2, 64, 4, 4\).*does not take \(code -1\)"
    ):
        group_norm_cuda.forward(group_norm_silu.Arguments(x, weight, weight, 8))


def test_what_another_backend_must_do_is_said_in_words() -> None:
    def reason(x: Tensor, groups: int, skip: Tensor | None = None, weight: Tensor | None = None) -> str | None:
        return group_norm_cuda.unsupported(x=x, weight=weight, groups=groups, skip=skip, eps=1e-6)

    x = torch.zeros(1, 4, 2, 2)
    assert reason(x, 2) is None and reason(x.bfloat16(), 2, weight=torch.ones(4)) is None
    assert "not float64" in str(reason(x.double(), 2)) and "not float64" in str(
        reason(x, 2, weight=torch.ones(4).double())
    )
    assert reason(torch.zeros(1, 1024, 1, 1), 1) is None
    assert "up to 1024 channels to a group, not 1028" in str(reason(torch.zeros(1, 1024, 2, 2), 1, skip=x))
    giant = torch.zeros(1, 1, 1, 1).expand(1, 2, 2**15, 2**15)
    assert "not 2x32768x32768" in str(reason(giant, 1)) and reason(giant[:, :1], 1) is None


def test_tensors_on_two_devices_are_refused() -> None:
    images, zero = torch.zeros(1, dtype=torch.int64), torch.tensor(0)
    with pytest.raises(ValueError, match="random_normal: all tensors must be on one device; got cpu, meta"):
        random_normal_cuda.forward(random_normal.Arguments([1], images, zero, zero.to("meta"), 0))


def test_without_emulation_tensors_must_be_on_a_gpu() -> None:
    emulated = native_cuda._emulated.pop()
    try:
        with pytest.raises(ValueError, match="reads tensors on cuda; got one on cpu"):
            native_cuda.pointer(torch.zeros(1))
        if not torch.cuda.is_available():
            assert native_cuda.unavailable() is not None
    finally:
        native_cuda._emulated.append(emulated)
