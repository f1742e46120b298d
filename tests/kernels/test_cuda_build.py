"""What nvcc makes of the CUDA kernels: code for every chip, no spills, a library that fails in words without a GPU."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import fat_binary
from helpers.native_build import build, find_nvcc
from helpers.scripts import load_script
from torch._subclasses.fake_tensor import FakeTensorMode

from fastddpm.kernels import group_norm_silu, interface, native_cuda, random_normal
from fastddpm.kernels.group_norm_silu import cuda as group_norm_cuda
from fastddpm.kernels.q_sample import cuda as q_sample_cuda
from fastddpm.kernels.random_normal import cuda as random_normal_cuda
from fastddpm.kernels.reverse_step import cuda as reverse_step_cuda

pytestmark = pytest.mark.slow

# Each kernel for three dtypes, two layouts, with vectors and without; and those of one kind.
VARIANTS = 3 * 2 * 2
KERNELS = {"normalize": VARIANTS, "differentiate": VARIANTS, "apply_parts": 2 * VARIANTS}
KERNELS |= {"combine_parts": 1, "add_parts": 1, "add_images": 1, "nothing": 1}
KERNELS |= {"normals": 1, "raw_words": 1, "noise_images": 1, "reverse": 1}


resources = load_script("csrc/cuda/resources.py", "fastddpm_csrc_resources")


@pytest.fixture(scope="module")
def library() -> Path:
    if find_nvcc() is None:
        pytest.skip("there is no nvcc")
    return build("_native_cuda")


def test_every_kernel_stays_in_registers_on_every_chip(library: Path) -> None:
    found = resources.usages(library.parent)
    for chip in resources.CHIPS:
        assert Counter(usage.kernel for usage in found if usage.chip == chip) == KERNELS
    for usage in found:
        assert (usage.stack, usage.spills, usage.shared) == (0, 0, 0), usage
        # Two blocks of 256 threads, or one of 512 (add_images), share the 65536 of a multiprocessor.
        assert usage.registers <= 128, usage


def test_there_is_code_for_each_chip_and_ptx_for_later_ones(library: Path) -> None:
    parts = {(part.kind, part.architecture, part.of_that_only) for part in fat_binary.parts(library.read_bytes())}
    assert parts >= {("SASS", 80, False), ("SASS", 90, True), ("SASS", 100, True), ("PTX", 90, False)}


def test_images_move_in_16_bytes(library: Path) -> None:
    """By one instruction each, in the kernels with vectors; in the elementwise ones where rows allow it."""
    seen = {80: 0, 90: 0, 100: 0}
    for part in fat_binary.parts(library.read_bytes()):
        if part.kind != "SASS" or part.architecture not in seen:
            continue
        for name, code in fat_binary.kernels(part):
            kernel = resources.kernel_name(name)
            loads, stores = fat_binary.global_accesses(code)
            vectors = re.search(r"(?:normalize|differentiate|apply_parts)I.*Li[48]EEE", name)
            if vectors:
                # 4-byte stores are those of statistics and gradients of channels, which apply_parts has none of.
                small = {2, 4} if "apply_parts" in name else {2}
                assert 16 in loads and 16 in stores and not small & set(stores), name
            elif kernel in ("noise_images", "reverse"):
                assert 16 in loads and 16 in stores, name
            elif kernel == "normals":
                assert 16 in stores, name
            else:
                continue
            seen[part.architecture] += 1
    assert seen == dict.fromkeys(seen, 4 * VARIANTS // 2 + 3)


def test_it_loads_anywhere_and_fails_in_words_without_a_gpu(library: Path) -> None:
    """No libcudart, no libcuda is needed to load it; the first call reports the runtime's code."""
    x = torch.zeros(1, 8, 2, 2)
    args = interface.GroupNormSiLU(n=1, c1=8, height=2, width=2, groups=2)
    with native_cuda.emulated(library) as opened:  # CPU tensors: nothing may be launched where there is a GPU
        try:
            native_cuda.workspace(args, True, [x])
        except RuntimeError as error:
            assert re.search(
                r"group_norm_silu on cpu, float32 \(1, 8, 2, 2\): .*(CUDA|driver).* \(code \d+\)", str(error)
            )
        else:
            pytest.skip("there is a GPU here")
        assert "does not run here" in str(native_cuda._refusal(opened))
        zero = torch.tensor(0)
        with pytest.raises(RuntimeError, match=r"random_normal on cpu, float32 \(1, 4\): .* \(code \d+\)"):
            random_normal_cuda.forward(random_normal.Arguments([4], torch.tensor([0]), zero, zero, 0))
        with pytest.raises(RuntimeError, match=r"group_norm_silu on cpu"):
            group_norm_cuda.forward(group_norm_silu.Arguments(x, torch.ones(8), torch.ones(8), 2))
        assert b"workspace" in opened.fastddpm_cuda_error_text(-2)


def test_chips_without_code_are_left_to_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    chips = {"cuda:0": (7, 5), "cuda:1": (8, 0), "cuda:2": (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chips[str(device)])
    with FakeTensorMode():
        on = [torch.zeros(1, device=device) for device in chips]
    for module in (q_sample_cuda, reverse_step_cuda, random_normal_cuda, native_cuda):
        assert "compute capability 8.0; cuda:0 has 7.5" in str(module.unsupported(shape=[3], x=on[0], noise=None))
        assert module.unsupported(x=on[1]) is None and module.unsupported(x=on[2], out=on[0]) is None
        assert module.unsupported(x=torch.zeros(1)) is None
