"""The Triton kernels compiled ahead of time, without a GPU: what the compiler says of them."""

import importlib.util
import re

import pytest
import torch
from helpers.marks import slow

pytest.importorskip("triton")
if importlib.util.find_spec("triton.backends.nvidia") is None:
    pytest.skip("Triton has no compiler for NVIDIA here", allow_module_level=True)

import resources
import shapes
from helpers import machine_code


def compiled(jobs: dict[tuple[str, resources.Kernel], str]) -> list[str]:
    """What is wrong with them, by kernel and first use."""
    results = resources.compile_all(list(jobs))
    return [
        f"{chip} {kernel.name} {jobs[chip, kernel]}: {problem}"
        for (chip, kernel), found in zip(jobs, results, strict=True)
        for problem in resources.problems(chip, kernel, found)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_mnist_fits_every_chip(chip: str) -> None:
    """Its few shapes here; benchmarks/resources.py compiles those of every preset for every chip."""
    jobs = resources.preset_kernels(["mnist"], [chip], [1])
    names = {kernel.name for _, kernel in jobs}
    assert {"_attention_fwd_kernel", "_q_sample_kernel", "_reverse_step_kernel", "_random_normal_kernel"} <= names
    assert len([name for name in names if "group_norm_silu" in name]) >= 3
    assert compiled(jobs) == []


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_90", slow("sm_100")])
def test_8_bit_convolutions_use_the_matrix_unit(chip: str) -> None:
    """At the CIFAR-10 network's shapes: no spills, 16-byte accesses, 8-bit products."""

    def image(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float8_e4m3fn, device="meta").contiguous(memory_format=torch.channels_last)

    jobs = {}
    for channels, size in ((384, 32), (256, 4)):
        scale = torch.empty(256, device="meta")
        x, weight = image(128, channels, size, size), image(256, channels, 3, 3)
        call = shapes.Call("conv3x3_fp8", (x, weight, scale, scale.bfloat16(), torch.bfloat16))
        jobs |= {(chip, kernel): f"{channels} at {size}x{size}" for kernel in resources.kernels_of(call, chip)}
    assert compiled(jobs) == []
    assert all(found.matrix for found in resources.compile_all(list(jobs)))


@pytest.mark.slow
def test_sizes_of_one_compile() -> None:
    """Triton makes a constant of every argument that is 1, which is another program: one of each thing."""

    def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    integer, one = meta(dtype=torch.int64), meta(1, dtype=torch.int64)
    key = (one, integer, integer)
    x, c, nc = meta(1, 1, 1, 1), meta(1), meta(1, 1)
    options = (x, nc, nc, nc, True, 0.5, *key, 0)
    wide, nwide = meta(2), meta(1, 2)
    calls = [
        shapes.Call("group_norm_silu", (x, c, c, 1, 1e-6, None, nc, nc, nc, True, 0.5, *key, 0)),
        shapes.Call("group_norm_silu", (x, wide, wide, 1, 1e-6, x, nwide, nwide, nwide, *options[4:])),
        shapes.Call("group_norm_silu_backward", (x, x, c, c, nc, nc, 1, None, nc, nc, nc, True, 0.5, *key, 0,
                                                 None, None)),
        shapes.Call("group_norm_silu", (meta(1, 1, 64, 128), c, c, 1, 1e-6, None, nc, nc, nc, True, 0.5, *key, 0)),
        shapes.Call("group_norm_silu_backward", (meta(1, 1, 64, 128), meta(1, 1, 64, 128), c, c, nc, nc, 1, None, nc,
                                                 nc, nc, True, 0.5, *key, 0, None, None)),
        shapes.Call("attention", (meta(1, 1, 1), meta(1, 1, 1), meta(1, 1, 1), 1.0)),
        shapes.Call("attention_backward", (*(meta(1, 1, 1) for _ in range(4)), nc, 1.0, False)),
        shapes.Call("random_normal", ([1], *key, 1)),
        shapes.Call("q_sample", (x, one, meta(1, 2), meta(1, dtype=torch.bool), x, *key)),
        shapes.Call("reverse_step", (x, meta(1, 2, 1, 1), meta(1, 9), one, integer, one, integer, 1.0, 2, None, x)),
    ]  # fmt: skip
    jobs = {("sm_90", kernel): call.name for call in calls for kernel in resources.kernels_of(call)}
    assert len(jobs) >= 12
    for found in resources.compile_all(list(jobs)):
        assert found.stack == 0


@pytest.mark.slow
def test_tiles_in_registers_wait_for_the_matrix_unit() -> None:
    """In the loop of the 8-bit convolution no tile is loaded into registers that the matrix unit may still read."""
    x, weight = (
        torch.empty(size, dtype=torch.float8_e4m3fn, device="meta").contiguous(memory_format=torch.channels_last)
        for size in ((256, 128, 32, 32), (128, 128, 3, 3))
    )
    call = shapes.Call("conv3x3_fp8", (x, weight, torch.empty(128, device="meta"), None, torch.bfloat16))
    (kernel,) = resources.kernels_of(call)
    assert kernel.name == "_conv3x3_fp8_tiled_kernel"
    (cubin,) = resources.code_of([("sm_90", kernel)])
    ((_, code, _),) = machine_code.kernels(cubin)
    products = [i for i, line in enumerate(code) if "QGMMA" in line]
    loads = [i for i, line in enumerate(code) if "LDSM" in line]
    back = next(i for i, line in enumerate(code) if i > products[-1] and "BRA" in line)
    waits = [i for i, line in enumerate(code) if re.search(r"DEPBAR\.LE gsb0, 0x0", line)]
    assert len(products) == 4 and any(products[-1] < i < back for i in waits)
    assert not any(products[0] < i < back for i in loads) and any(i < products[0] for i in loads)
