"""What nvcc makes of the CUDA kernels: code for every chip, no spills, and a library that fails in words without a GPU."""

import importlib.util
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastddpm.kernels import interface, native_cuda
from fastddpm.kernels.group_norm_silu import cuda as group_norm_cuda
from fastddpm.kernels.random_normal import cuda as random_normal_cuda

ROOT = Path(__file__).parent.parent
# Each kernel for three dtypes, two layouts, with vectors and without; and those of one kind.
VARIANTS = 3 * 2 * 2
KERNELS = {"normalize": VARIANTS, "differentiate": VARIANTS, "apply_parts": 2 * VARIANTS}
KERNELS |= {"combine_parts": 1, "add_parts": 1, "add_images": 1}
KERNELS |= {"normals": 1, "raw_words": 1, "noise_images": 1, "reverse": 1}


@pytest.fixture(scope="module")
def library() -> Path:
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    if build.find_nvcc() is None:
        pytest.skip("there is no nvcc")
    return build.build("_native_cuda")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one chip, from ptxas."""

    kernel: str
    chip: str
    stack: int
    spills: int
    registers: int
    shared: int  # static


def usages(library: Path) -> list[Usage]:
    found = []
    for file in sorted(library.parent.glob("*.usage")):
        text = file.read_text()
        pattern = (
            r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
        )
        for name, chip, stack, stores, loads, registers, rest in re.findall(pattern, text, re.DOTALL):
            kernels = [kernel for kernel in KERNELS if re.search(rf"\d{kernel}[IE]", name)]
            assert len(kernels) == 1, name
            shared = re.search(r"(\d+) bytes smem", rest)
            found.append(
                Usage(
                    kernels[0], chip, int(stack), int(stores) + int(loads), int(registers),
                    int(shared[1]) if shared else 0,
                )
            )  # fmt: skip
    return found


def test_every_kernel_stays_in_registers_on_every_chip(library: Path) -> None:
    found = usages(library)
    for chip in ("sm_80", "sm_90a", "sm_100a"):
        counts = {kernel: sum(u.kernel == kernel and u.chip == chip for u in found) for kernel in KERNELS}
        assert counts == KERNELS
    for usage in found:
        assert (usage.stack, usage.spills, usage.shared) == (0, 0, 0), usage
        # Two blocks of 256 threads, or one of 512 (add_images), share the 65536 of a multiprocessor.
        assert usage.registers <= 128, usage


def fat_binary_parts(library: bytes) -> set[tuple[str, int, bool]]:
    """(SASS or PTX, architecture, of that architecture only) of all code in an ELF file of nvcc's."""
    parts = set()
    at = library.find(b"\x50\xed\x55\xba")
    while at >= 0:
        header, size = struct.unpack_from("<HQ", library, at + 6)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", library, entry)
            (architecture,) = struct.unpack_from("<I", library, entry + 28)
            (flags,) = struct.unpack_from("<Q", library, entry + 40)
            parts.add(("PTX" if kind == 1 else "SASS", architecture, bool(flags >> 20 & 1)))
            entry += entry_header + entry_size
        at = library.find(b"\x50\xed\x55\xba", end)
    return parts


def test_there_is_code_for_each_chip_and_ptx_for_later_ones(library: Path) -> None:
    parts = fat_binary_parts(library.read_bytes())
    assert parts >= {("SASS", 80, False), ("SASS", 90, True), ("SASS", 100, True), ("PTX", 90, False)}


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
        zero = torch.tensor(0)
        with pytest.raises(RuntimeError, match=r"random_normal on cpu, float32 \(1, 4\): .* \(code \d+\)"):
            random_normal_cuda.forward([4], torch.tensor([0]), zero, zero, 0)
        with pytest.raises(RuntimeError, match=r"group_norm_silu on cpu"):
            group_norm_cuda.forward(
                x, torch.ones(8), torch.ones(8), 2, 1e-6, None, None, None, None, True, 0.0, None, None, None, 0
            )
        assert b"workspace" in opened.fastddpm_cuda_error_text(-2)
