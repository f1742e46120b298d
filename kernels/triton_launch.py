"""How the Triton kernels are launched, and why they cannot be: on a GPU, or on the CPU in Triton's interpreter.

Imported by kernels/<op>/triton.py, so only where triton is installed.
"""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether the kernels run on the CPU, one program after another in NumPy: TRITON_INTERPRET=1 before their import.

    For tests. It shows neither races nor what the compiler does with registers, and is thousands of times slower.
    """
    return triton.knobs.runtime.interpret


def unavailable() -> str | None:
    """Why no Triton kernel runs here, or None."""
    if not (torch.cuda.is_available() or interpreted()):
        return "Triton kernels need a GPU, and torch sees none; TRITON_INTERPRET=1 runs them on the CPU for tests"
    return None


def elsewhere(**arguments: object) -> str | None:
    """Why these arguments, by name, lie where the kernels do not run, or None."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device.type == "cpu" and not interpreted():
            return f"Triton kernels run on a GPU and {name} is on the CPU; TRITON_INTERPRET=1 runs them there for tests"
    return None


def unsupported(**arguments: object) -> str | None:
    """As `elsewhere`; or which floating-point type the kernels do not take."""
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in DTYPES:
            return f"the Triton kernels take float32, bfloat16 and float16, not {str(value.dtype).partition('.')[2]}"
    return elsewhere(**arguments)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Run `kernel` on the current stream of `device`, which need not be the current device.

    `options`: its constexpr parameters by name, and num_warps, num_stages, enable_fp_fusion.
    """
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here:
        kernel[grid](*args, **options)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n > 0: the sides of a Triton tile are such."""
    return 1 << (n - 1).bit_length()


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)
