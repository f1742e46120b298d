"""The compiled CPU library beside this file: finds it, loads it, calls it, says why not."""

import ctypes
from functools import lru_cache
from pathlib import Path

# torch first: its OpenMP library is then the one that the compiled library uses, with its threads.
import torch
from torch import Tensor

from . import interface

_FOLDER = Path(__file__).parent
_NOT_BUILT = (
    "no compiled library beside kernels/native.py, so what the CPU runs is several times slower; "
    "`pip install -e .` compiles it where there is a C++ compiler"
)
_DTYPES = {
    torch.float32: interface.FLOAT32,
    torch.bfloat16: interface.BFLOAT16,
    torch.float16: interface.FLOAT16,
    torch.uint8: interface.UINT8,
}
ISAS = ("baseline", "avx2", "avx512")


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    files = sorted(_FOLDER.glob("_native.*so"))
    if not files:
        return _why_missing()
    try:
        library = ctypes.CDLL(str(files[0]))
        library.fastddpm_error_text.restype = ctypes.c_char_p
        for name in ("conv_workspace", "conv_weight_gradient_workspace", "conv_packed_bytes", "norm_affine_workspace"):
            getattr(library, f"fastddpm_cpu_{name}").restype = ctypes.c_int64
        library.fastddpm_cpu_isa.argtypes = [ctypes.c_int32]
    except (OSError, AttributeError) as error:
        return f"{files[0].name} cannot be loaded ({error}); install fastddpm again"
    return library


def _why_missing() -> str:
    """What the build wrote when it failed; a checkout that was never installed has no such file."""
    try:
        return (_FOLDER / "_native_missing.txt").read_text(encoding="utf-8").strip() or _NOT_BUILT
    except (OSError, UnicodeDecodeError):
        return _NOT_BUILT


def unavailable() -> str | None:
    """Why the compiled library cannot be used, or None when it can."""
    library = _loaded()
    return library if isinstance(library, str) else None


def library() -> ctypes.CDLL:
    """The library; RuntimeError, saying why, when there is none."""
    loaded = _loaded()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def isa(wanted: str | None = None) -> str:
    """The instruction set in use; choosing one that the machine lacks gives the best that it has."""
    return ISAS[library().fastddpm_cpu_isa(-1 if wanted is None else ISAS.index(wanted))]


def dtype_code(dtype: torch.dtype) -> int:
    return _DTYPES[dtype]


def unsupported_dtype(x: Tensor) -> str | None:
    """Why the library does not compute on images of x's dtype, or None."""
    if x.dtype in (torch.float32, torch.bfloat16):
        return None
    return f"the compiled CPU library computes on float32 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a CPU tensor's first element; ValueError for a tensor elsewhere."""
    if tensor is None:
        return None
    if tensor.device.type != "cpu":
        raise ValueError(f"the compiled CPU library reads tensors on the CPU; got one on {tensor.device}")
    return tensor.data_ptr()


def key(images: Tensor, seed: Tensor, step: Tensor) -> interface.Key:
    """Where an operation's random numbers come from: int64 tensors, images (N,), dense."""
    return interface.Key(images=pointer(images), seed=pointer(seed), step=pointer(step))


def call(operation: str, args: ctypes.Structure) -> None:
    """Run an operation of csrc/fastddpm.h with torch's number of threads; RuntimeError when it reports one."""
    check(operation, getattr(library(), f"fastddpm_cpu_{operation}")(ctypes.byref(args), torch.get_num_threads()))


def check(operation: str, code: int) -> None:
    """RuntimeError, in words, for a code that the library returned, unless it is 0."""
    if code:
        raise RuntimeError(f"{operation}: {library().fastddpm_error_text(code).decode()}")


def random_normal(num: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """`num` standard normals per image, float32 (N, num): the same bits on every machine.

    `images`: int64 (N,) on the CPU. `seed` and `step`: 0-d int64. Raises ValueError for other images and
    RuntimeError without a library.
    """
    out = torch.empty(len(images), num, dtype=torch.float32, device="cpu")
    args, _keep = _random_args(out, num, images, seed, step, stream)
    call("random_normal", args)
    return out


def philox_words(num_blocks: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """The raw output words, uint32 (N, num_blocks, 4); arguments and errors as `random_normal`."""
    out = torch.empty(len(images), num_blocks, 4, dtype=torch.uint32, device="cpu")
    args, _keep = _random_args(None, num_blocks, images, seed, step, stream)
    library().fastddpm_cpu_philox(ctypes.byref(args), ctypes.c_void_p(out.data_ptr()), torch.get_num_threads())
    return out


def _random_args(
    out: Tensor | None, num: int, images: Tensor, seed: Tensor, step: Tensor, stream: int
) -> tuple[interface.RandomNormal, tuple[Tensor, ...]]:
    """The structure, and the tensors that must live as long as it is read."""
    if images.dtype != torch.int64 or images.device.type != "cpu":
        # The library gets addresses, not tensors.
        raise ValueError(f"random_normal: images must be int64 on the CPU; got {images.dtype} on {images.device}")
    images = images.contiguous()
    args = interface.RandomNormal(
        out=pointer(out), n=len(images), num=num, stream_id=stream, key=key(images, seed, step)
    )
    return args, (images, seed, step)
