"""Launches the Triton kernels, on a GPU or in Triton's interpreter on the CPU, and says why they cannot run.

Only kernels/<op>/triton.py imports it, because it needs triton to be installed.
"""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Return whether the kernels run in the interpreter: on the CPU, one program after another, in NumPy.

    TRITON_INTERPRET=1, set before their import, chooses it. For tests: it shows neither races nor what the compiler
    does with registers, and is thousands of times slower.
    """
    return triton.knobs.runtime.interpret


def precision(dtype: torch.dtype) -> str:
    """Return how kernels multiply `dtype` by the matrix unit: a kernel's PRECISION.

    float32 in three tf32 passes, which keep its digits; but AMD's matrix unit multiplies float32 itself.
    """
    if interpreted():
        return "interpreted"
    return "tf32x3" if dtype == torch.float32 and not torch.version.hip else "ieee"


def unavailable() -> str | None:
    """Return why no Triton kernel runs here, or None."""
    if not (torch.cuda.is_available() or interpreted()):
        return "Triton kernels need a GPU, and torch sees none; TRITON_INTERPRET=1 runs them on the CPU for tests"
    return None


def elsewhere(**arguments: object) -> str | None:
    """Return why the kernels cannot run on the device of these arguments, or None."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device.type == "cpu" and not interpreted():
            return f"Triton kernels run on a GPU and {name} is on the CPU; TRITON_INTERPRET=1 runs them there for tests"
    return None


def unsupported(**arguments: object) -> str | None:
    """Return which floating-point dtype among these arguments the kernels do not take; otherwise as `elsewhere`."""
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in DTYPES:
            return f"the Triton kernels take float32, bfloat16 and float16, not {str(value.dtype).partition('.')[2]}"
    return elsewhere(**arguments)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Run `kernel` on the current stream of `device`, which need not be the current device.

    `options`: the kernel's constexpr parameters by name, and num_warps, num_stages, enable_fp_fusion.
    """
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here:
        kernel[grid](*args, **options)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two >= n, for n > 0. The sides of a Triton tile must be powers of two."""
    return 1 << (n - 1).bit_length()


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)
