"""The compiled CUDA library beside this file: finds it, loads it, calls it, says why not."""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import interface
from .native import dtype_code

__all__ = [
    "FLOATS",
    "call",
    "dtype_code",
    "emulated",
    "key",
    "library",
    "on_one_device",
    "philox_words",
    "pointer",
    "too_old",
    "unavailable",
    "unsupported",
    "workspace",
]

_FOLDER = Path(__file__).parent
_NOT_BUILT = (
    "no compiled library beside kernels/native_cuda.py, so a GPU runs the Triton kernels or PyTorch's operators; "
    "`pip install -e .` compiles it where there is a CUDA toolkit"
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_CHIP = (8, 0)

# Tests put the emulated library here; tensors are then on the CPU.
_emulated: list[ctypes.CDLL] = []


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    files = sorted(_FOLDER.glob("_native_cuda.*so"))
    if not files:
        return _why_missing()
    try:
        return _opened(files[0])
    except (OSError, AttributeError) as error:
        return f"{files[0].name} cannot be loaded ({error}); install fastddpm again"


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.fastddpm_cuda_error_text.restype = ctypes.c_char_p
    return library


def _why_missing() -> str:
    """What the build wrote when it failed; a checkout that was never installed has no such file."""
    try:
        return (_FOLDER / "_native_cuda_missing.txt").read_text(encoding="utf-8").strip() or _NOT_BUILT
    except (OSError, UnicodeDecodeError):
        return _NOT_BUILT


def unavailable() -> str | None:
    """Why the CUDA library cannot be used, or None when it can."""
    if _emulated:
        return None
    library = _loaded()
    if isinstance(library, str):
        return library
    return _refusal(library) if torch.cuda.is_available() else "torch sees no CUDA device"


@lru_cache(maxsize=1)
def _refusal(library: ctypes.CDLL) -> str | None:
    """Why the driver does not run the library: torch may run where the toolkit that compiled this does not."""
    args, size = interface.GroupNormSiLU(n=1, c1=1, height=1, width=1, groups=1), ctypes.c_int64()
    code = library.fastddpm_cuda_group_norm_silu_workspace(ctypes.byref(args), 0, ctypes.byref(size))
    return f"the compiled CUDA library does not run here: {_words(library, code)}" if code else None


def too_old(**arguments: object) -> str | None:
    """Why the chip that holds the first tensor of `arguments` has no code in the library, or None."""
    device = next((arg.device for arg in arguments.values() if isinstance(arg, Tensor)), None)
    if device is None or device.type != "cuda":
        return None
    chip = torch.cuda.get_device_capability(device)
    if chip >= _OLDEST_CHIP:
        return None
    return f"the CUDA kernels need compute capability 8.0; {device} has {chip[0]}.{chip[1]}"


def unsupported(**arguments: object) -> str | None:
    """Why the CUDA kernels do not take an operation's arguments, or None: they compute in float32."""
    for arg in arguments.values():
        if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype not in FLOATS:
            return f"the CUDA kernels take float32, bfloat16 and float16, not {str(arg.dtype).removeprefix('torch.')}"
    return too_old(**arguments)


@contextlib.contextmanager
def emulated(path: Path) -> Iterator[ctypes.CDLL]:
    """Call the library at `path`, made for the CPU by csrc/build.py, in the `with` block: for tests."""
    library = _opened(path)
    _emulated.append(library)
    try:
        yield library
    finally:
        _emulated.pop()


def library() -> ctypes.CDLL:
    """The library; RuntimeError, saying why, when there is none."""
    loaded = _emulated[-1] if _emulated else _loaded()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a CUDA tensor's first element; ValueError for a tensor elsewhere."""
    if tensor is None:
        return None
    wanted = "cpu" if _emulated else "cuda"
    if tensor.device.type != wanted:
        raise ValueError(f"the compiled CUDA library reads tensors on {wanted}; got one on {tensor.device}")
    return tensor.data_ptr()


def on_one_device(operation: str, *tensors: Tensor | None) -> None:
    """ValueError unless all tensors are where the first is: a kernel gets addresses, and would not notice."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"{operation}: all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")


def key(images: Tensor, seed: Tensor, step: Tensor) -> interface.Key:
    """Where an operation's random numbers come from: int64 tensors, images (N,), dense."""
    return interface.Key(images=pointer(images), seed=pointer(seed), step=pointer(step))


def call(operation: str, args: ctypes.Structure, tensors: Sequence[Tensor], *extra: int | None) -> None:
    """Run an operation of csrc/fastddpm.h on the device and current stream of `tensors`, which are all on one device.

    `extra`: addresses and sizes between the structure and the stream. RuntimeError when the library reports one.
    """
    lib, device = library(), tensors[0].device
    function = getattr(lib, f"fastddpm_cuda_{operation}")
    values = [ctypes.c_void_p(value) for value in extra]
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            code = function(ctypes.byref(args), *values, ctypes.c_void_p(stream))
    else:
        code = function(ctypes.byref(args), *values, None)
    _check(lib, operation, code, tensors)


def workspace(args: interface.GroupNormSiLU, backward: bool, tensors: Sequence[Tensor]) -> Tensor:
    """What group_norm_silu needs besides its tensors: uint8, from torch's allocator, so a graph can hold it."""
    lib, device, size = library(), tensors[0].device, ctypes.c_int64()
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        code = lib.fastddpm_cuda_group_norm_silu_workspace(ctypes.byref(args), int(backward), ctypes.byref(size))
    _check(lib, "group_norm_silu", code, tensors)
    return torch.empty(size.value, dtype=torch.uint8, device=device)


def _check(lib: ctypes.CDLL, operation: str, code: int, tensors: Sequence[Tensor]) -> None:
    if code:
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors)
        raise RuntimeError(f"{operation} on {tensors[0].device}, {shapes}: {_words(lib, code)}")


def _words(lib: ctypes.CDLL, code: int) -> str:
    return f"{lib.fastddpm_cuda_error_text(code).decode()} (code {code})"


def philox_words(num_blocks: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """The raw output words, uint32 (N, num_blocks, 4); `images` int64 (N,) on the device, `seed`, `step` 0-d int64."""
    images = images.contiguous()
    out = torch.empty(len(images), num_blocks, 4, dtype=torch.uint32, device=images.device)
    args = interface.RandomNormal(n=len(images), num=num_blocks, stream_id=stream, key=key(images, seed, step))
    call("philox", args, [images], pointer(out))
    return out
