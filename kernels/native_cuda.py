"""Finds, loads and calls the compiled CUDA library beside this file, or says why there is none."""

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
    "`pip install -e .` compiles it if there is a CUDA toolkit"
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_CHIP = (8, 0)

# Tests put the emulated library here; all tensors are then on the CPU.
_emulated: list[ctypes.CDLL] = []


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
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
    """Return the message of the build that failed, or a general one for a checkout that was never installed."""
    try:
        return (_FOLDER / "_native_cuda_missing.txt").read_text(encoding="utf-8").strip() or _NOT_BUILT
    except (OSError, UnicodeDecodeError):
        return _NOT_BUILT


def unavailable() -> str | None:
    """Return why the CUDA library cannot be used, or None if it can."""
    if _emulated:
        return None
    library = _loaded()
    if isinstance(library, str):
        return library
    return _refusal(library) if torch.cuda.is_available() else "torch sees no CUDA device"


@lru_cache(maxsize=1)
def _refusal(library: ctypes.CDLL) -> str | None:
    """Return why the driver does not run the library, or None. A driver that runs torch may be too old for it."""
    args, size = interface.GroupNormSiLU(n=1, c1=1, height=1, width=1, groups=1), ctypes.c_int64()
    code = library.fastddpm_cuda_group_norm_silu_workspace(ctypes.byref(args), 0, ctypes.byref(size))
    return f"the compiled CUDA library does not run here: {_words(library, code)}" if code else None


def too_old(**arguments: object) -> str | None:
    """Return why the library has no code for the GPU of the first tensor in `arguments`, or None."""
    device = next((arg.device for arg in arguments.values() if isinstance(arg, Tensor)), None)
    if device is None or device.type != "cuda":
        return None
    chip = torch.cuda.get_device_capability(device)
    if chip >= _OLDEST_CHIP:
        return None
    return f"the CUDA kernels need compute capability 8.0; {device} has {chip[0]}.{chip[1]}"


def unsupported(**arguments: object) -> str | None:
    """Return why the CUDA kernels, which compute in float32, do not take an operation's arguments, or None."""
    for arg in arguments.values():
        if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype not in FLOATS:
            return f"the CUDA kernels take float32, bfloat16 and float16, not {str(arg.dtype).removeprefix('torch.')}"
    return too_old(**arguments)


@contextlib.contextmanager
def emulated(path: Path) -> Iterator[ctypes.CDLL]:
    """Use the library at `path`, which csrc/build.py made for the CPU, in the `with` block. For tests."""
    library = _opened(path)
    _emulated.append(library)
    try:
        yield library
    finally:
        _emulated.pop()


def library() -> ctypes.CDLL:
    """Return the library. Raises RuntimeError, with the reason, if there is none."""
    loaded = _emulated[-1] if _emulated else _loaded()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a CUDA tensor's first element. Raises ValueError for a tensor on another device."""
    if tensor is None:
        return None
    wanted = "cpu" if _emulated else "cuda"
    if tensor.device.type != wanted:
        raise ValueError(f"the compiled CUDA library reads tensors on {wanted}; got one on {tensor.device}")
    return tensor.data_ptr()


def on_one_device(operation: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device. A kernel gets addresses and could not tell."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"{operation}: all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")


def key(images: Tensor, seed: Tensor, step: Tensor) -> interface.Key:
    """Return the structure that names an operation's random numbers: int64, images dense (N,), seed and step 0-d."""
    return interface.Key(images=pointer(images), seed=pointer(seed), step=pointer(step))


def call(operation: str, args: ctypes.Structure, tensors: Sequence[Tensor], *extra: int | None) -> None:
    """Run an operation of csrc/fastddpm.h on the device of `tensors`, on its current stream.

    `extra`: the function's arguments between the structure and the stream, addresses and sizes. Raises RuntimeError,
    naming the dtypes and shapes of `tensors`, if the operation fails.
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
    """Allocate the workspace of group_norm_silu, uint8, with torch's allocator, so that a CUDA graph can hold it."""
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
    """Return the raw Philox words, uint32 (N, num_blocks, 4). On the device: `images` int64 (N,), others 0-d int64."""
    images = images.contiguous()
    out = torch.empty(len(images), num_blocks, 4, dtype=torch.uint32, device=images.device)
    args = interface.RandomNormal(n=len(images), num=num_blocks, stream_id=stream, key=key(images, seed, step))
    call("philox", args, [images], pointer(out))
    return out
