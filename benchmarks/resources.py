"""What the compiler makes of the Triton kernels at every shape of the presets: registers, stack, shared memory.

    python benchmarks/resources.py                       the table of all presets and chips
    python benchmarks/resources.py --chip sm_90 --preset cifar10 --json FILE

No GPU is needed: kernels are compiled, not run. The exit code is 1 when one spills registers (stack over 32 bytes),
needs more shared memory than the chip has, moves images without 16-byte accesses, or multiplies without the matrix
unit.
"""

import argparse
import contextlib
import datetime
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from shapes import Call, describe, distinct, engine_calls, network_calls, step_calls
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastddpm.ops import registry
from fastddpm.presets import PRESETS

# Chip: the backend, its name there, threads of a warp, bytes of shared memory a program may have.
CHIPS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip

_PUT_ASIDE = 32  # bytes of a thread's stack: a few registers of masked tiles, which are in the table and no problem
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Kernel:
    """One specialisation of one kernel, as Triton's compiler takes it."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments divisible by 16, without which no load is wide
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs. registers and stack (bytes) are of a thread, shared (bytes) of a program."""

    registers: int
    stack: int
    shared: int
    wide: bool  # has 16-byte loads or stores
    matrix: bool  # has matrix instructions


def kernel_of(launched: Any, args: Sequence[Any], options: dict[str, Any]) -> Kernel:
    """As Triton itself specialises a launch: 1 and None are constants; multiples of 16 and tensors are aligned."""
    signature, constants, aligned = [], [], []
    named = dict(zip(launched.arg_names, args, strict=False)) | {k: v for k, v in options.items()}
    for index, name in enumerate(launched.arg_names):
        value = named.pop(name)
        if isinstance(value, TensorDescriptor):  # of tiles that the copy engine fetches
            signature.append((name, f"tensordesc<{_POINTERS[value.base.dtype][1:]}{value.block_shape}>"))
        elif isinstance(value, Tensor):
            signature.append((name, _POINTERS[value.dtype]))
            aligned.append(index)
        elif value is None or name in options or (type(value) is int and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0:
                aligned.append(index)
    function = launched.fn
    return Kernel(
        function.__module__, function.__name__, tuple(signature), tuple(constants), tuple(aligned),
        tuple(sorted(named.items())),
    )  # fmt: skip


def kernels_of(call: Call, chip: str = "sm_90") -> list[Kernel]:
    """What the Triton implementation launches for `call` on `chip`."""
    operation = call.name.removesuffix("_backward")
    module = importlib.import_module(f"fastddpm.kernels.{operation}.triton")
    launching = module if hasattr(module, "launch") else module.triton  # two operations call another's kernels
    triton_launch = importlib.import_module("fastddpm.kernels.triton_launch")
    recorded: list[Kernel] = []

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
        recorded.append(kernel_of(kernel, args, options))

    rocm = "0" if CHIPS[chip][0] == "hip" else None
    with (
        replaced(launching, "launch", record),
        replaced(triton_launch, "interpreted", lambda: False),
        replaced(torch.version, "hip", rocm),
        replaced(launching, "chip", lambda device: chip) if hasattr(launching, "chip") else contextlib.nullcontext(),
    ):
        registry.call(module, call.name, call.args)
    return recorded


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def compiled_for(chip: str, kernel: Kernel) -> Any:
    """Compile; in a process without TRITON_INTERPRET."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, name, warp, _ = CHIPS[chip]
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    source = ASTSource(
        function, dict(kernel.signature), dict(kernel.constants),
        {(i,): [["tt.divisibility", 16]] for i in kernel.aligned},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget(backend, name, warp), options=dict(kernel.options))


def cubin_for(chip: str, kernel: Kernel) -> bytes:
    """The machine code for one of NVIDIA's chips."""
    cubin: bytes = compiled_for(chip, kernel).asm["cubin"]
    return cubin


def compile_for(chip: str, kernel: Kernel) -> Resources:
    backend, compiled = CHIPS[chip][0], compiled_for(chip, kernel)
    shared = compiled.metadata.shared
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        number = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        return Resources(
            number["vgpr_count"], number["private_segment_fixed_size"], shared,
            bool(re.search(r"(global|buffer)_(load|store)_dwordx4", text)), "v_mfma" in text,
        )  # fmt: skip
    registers, stack = _usage(compiled.asm["cubin"])
    text = compiled.asm["ptx"]
    return Resources(
        registers, stack, shared,
        bool(re.search(r"(ld|st)\.global\S*\.(v4\.b32|v2\.b64)|cp\.async\S* .*, (0x10|16)", text)),
        bool(re.search(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", text)),
    )  # fmt: skip


def problems(chip: str, kernel: Kernel, found: Resources) -> list[str]:
    """What is wrong with a compiled kernel."""
    signature, constants = dict(kernel.signature), dict(kernel.constants)
    wrong = []
    if found.stack > _PUT_ASIDE:
        wrong.append(f"{found.stack} bytes of stack")
    if found.shared > CHIPS[chip][3]:
        wrong.append(f"{found.shared} bytes of shared memory of {CHIPS[chip][3]}")
    if "attention" in kernel.name and not found.matrix and "*fp32" not in (signature.get("q"), signature.get("x")):
        wrong.append("no matrix instructions")
    # The sums of a kernel's parts are short rows; 16 tokens are few for 64 threads; an image's own 1 or 3 channels are
    # gathered from planes, or stored as such pixels, or are 8 with those that are cut off again.
    ends = kernel.name in ("_convert_image_kernel", "_add_bias_kernel") and constants.get("C", 0) <= 8
    ends |= kernel.name == "_conv3x3_in_kernel"
    small = "_sum" in kernel.name or (chip == "gfx942" and constants.get("BN") == 16) or ends
    if not found.wide and not small:
        wrong.append("no 16-byte accesses")
    return wrong


def _usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert found is not None, text.stdout
    return int(found[1]), int(found[2])


def compile_all(jobs: Sequence[tuple[str, Kernel]], workers: int | None = None) -> list[Resources]:
    return _in_processes(compile_for, jobs, workers)


def code_of(jobs: Sequence[tuple[str, Kernel]], workers: int | None = None) -> list[bytes]:
    return _in_processes(cubin_for, jobs, workers)


def _in_processes(function: Any, jobs: Sequence[tuple[str, Kernel]], workers: int | None) -> list[Any]:
    """In processes of their own, in which the kernels are not interpreted."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
            return list(pool.map(function, *zip(*jobs, strict=True), chunksize=1)) if jobs else []
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def preset_calls(preset: str, batch: int, dtype: torch.dtype) -> list[Call]:
    """Every kind of call of a training and a sampling step."""
    calls = network_calls(preset, batch, dtype, training=True)
    calls += network_calls(preset, batch, dtype, training=False)
    calls += engine_calls(preset, batch, dtype)
    return [call for call, _ in distinct([*calls, *step_calls(preset, batch, dtype)])]


def preset_kernels(
    presets: Sequence[str],
    chips: Sequence[str],
    batches: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
) -> dict[tuple[str, Kernel], str]:
    """Each kernel on each chip once, with its first use; batches are 1 and the preset's own unless given."""
    jobs: dict[tuple[str, Kernel], str] = {}
    for preset in presets:
        for batch, dtype in itertools.product(batches or (1, PRESETS[preset].train.batch), dtypes):
            for call in preset_calls(preset, batch, dtype):
                for chip in chips:
                    for kernel in kernels_of(call, chip):
                        jobs.setdefault((chip, kernel), f"{preset} {str(dtype)[6:]} {describe(call)}")
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, action="append", help="default: all")
    parser.add_argument("--chip", choices=CHIPS, action="append", help="default: all")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and the preset's")
    parser.add_argument("--dtype", choices=_DTYPES, action="append", help="default: bfloat16 and float32")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    options = parser.parse_args()
    jobs = preset_kernels(options.preset or list(PRESETS), options.chip or list(CHIPS), options.batch,
                          [_DTYPES[name] for name in options.dtype or _DTYPES])  # fmt: skip
    print(f"{len(jobs)} compilations", file=sys.stderr)
    results = compile_all(list(jobs))
    table, wrong = [], []
    for (chip, kernel), found in zip(jobs, results, strict=True):
        shape = " ".join(f"{name}={value}" for name, value in kernel.constants if name.isupper())
        table.append({"chip": chip, "kernel": kernel.name, "first use": jobs[chip, kernel], "constants": shape,
                      "num_warps": dict(kernel.options).get("num_warps"), **asdict(found)})  # fmt: skip
        print(
            f"{chip:7} {kernel.name:46} {jobs[chip, kernel]:40} {found.registers:4} regs {found.stack:5} stack "
            f"{found.shared:7} shared {'wide' if found.wide else '-':4} {'matrix' if found.matrix else '-':6} {shape}"
        )
        wrong += [
            f"{chip} {kernel.name} {jobs[chip, kernel]} {shape}: {text}" for text in problems(chip, kernel, found)
        ]
    print("\n".join([f"{len(wrong)} problems", *wrong]), file=sys.stderr)
    if options.json:
        rows = ",\n".join(json.dumps(row) for row in table)
        head = json.dumps({"triton": triton.__version__, "date": datetime.date.today().isoformat()})[:-1]
        options.json.write_text(f'{head}, "kernels": [\n{rows}\n]}}\n', encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
