"""Finds, loads and calls the compiled CPU library beside this file, or says why there is none."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

# torch is imported first: the compiled library then uses torch's OpenMP library and its threads.
import torch
from torch import Tensor

from . import interface

_FOLDER = Path(__file__).parent
_NOT_BUILT = (
    "no compiled library beside kernels/native.py, so operations on the CPU are several times slower; "
    "`pip install -e .` compiles it if there is a C++ compiler"
)
_DTYPES = {
    torch.float32: interface.FLOAT32,
    torch.bfloat16: interface.BFLOAT16,
    torch.float16: interface.FLOAT16,
    torch.uint8: interface.UINT8,
}
ISAS = ("baseline", "avx2", "avx512", "avx512bf16")


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
    files = sorted(_FOLDER.glob("_native.*so"))
    if not files:
        return _why_missing()
    try:
        library = ctypes.CDLL(str(files[0]))
        library.fastddpm_error_text.restype = ctypes.c_char_p
        for name in ("conv_workspace", "conv_weight_gradient_workspace", "conv_packed_bytes", "norm_affine_workspace"):
            getattr(library, f"fastddpm_cpu_{name}").restype = ctypes.c_int64
        library.fastddpm_cpu_isa.argtypes = [ctypes.c_int32]
        library.fastddpm_cpu_digest.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    except (OSError, AttributeError) as error:
        return f"{files[0].name} cannot be loaded ({error}); install fastddpm again"
    return library


def _why_missing() -> str:
    """Return the message of the build that failed, or a general one for a checkout that was never installed."""
    try:
        return (_FOLDER / "_native_missing.txt").read_text(encoding="utf-8").strip() or _NOT_BUILT
    except (OSError, UnicodeDecodeError):
        return _NOT_BUILT


def unavailable() -> str | None:
    """Return why the compiled library cannot be used, or None if it can."""
    library = _loaded()
    return library if isinstance(library, str) else None


def library() -> ctypes.CDLL:
    """Return the library. Raises RuntimeError, with the reason, if there is none."""
    loaded = _loaded()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def isa(wanted: str | None = None) -> str:
    """Return the instruction set in use, one of ISAS.

    `wanted`: switch to this one first, or to the best that the machine has if it lacks that. Default: do not switch.
    """
    return ISAS[library().fastddpm_cpu_isa(-1 if wanted is None else ISAS.index(wanted))]


def has_bf16() -> bool:
    """Return whether the instruction set in use multiplies bfloat16; without, such products are slower than float32."""
    return isa() == "avx512bf16"


def outpaces_mkl() -> bool:
    """Return whether the library multiplies matrices clearly faster than PyTorch does.

    PyTorch's products are MKL's, which has AVX-512 for Intel's processors only, and code for AVX2 elsewhere.
    """
    return isa().startswith("avx512") and _vendor() not in ("", "GenuineIntel") and torch.backends.mkl.is_available()


@lru_cache(maxsize=1)
def _vendor() -> str:
    """Return the processor's vendor as it names itself, "" if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def most_threads(wanted: int | None = None) -> int | None:
    """Return the most threads that operations run on at present, or None without a limit.

    `wanted`: fix it to this many from now on, or with 0 let it follow the cores that other programs leave, as it does
    at first. Default: only ask. The bits of results do not depend on it.
    """
    most: int = library().fastddpm_cpu_most_threads(-1 if wanted is None else wanted)
    return most or None


def cores_are_far(wanted: Literal["near", "far", "measured"] | None = None) -> bool:
    """Return whether the threads' cores share no cache: each then rather computes anew what another has.

    `wanted`: fix it, or let it be measured twice a second, as at first. Default: only ask. The bits of results do not
    depend on it.
    """
    choice = -1 if wanted is None else ("near", "far", "measured").index(wanted)
    return bool(library().fastddpm_cpu_cores_are_far(choice))


def dtype_code(dtype: torch.dtype) -> int:
    return _DTYPES[dtype]


def unsupported_dtype(x: Tensor) -> str | None:
    """Return why the library does not compute on images of x's dtype, or None."""
    if x.dtype in (torch.float32, torch.bfloat16):
        return None
    return f"the compiled CPU library computes on float32 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a CPU tensor's first element. Raises ValueError for a tensor on another device."""
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise ValueError(f"the compiled CPU library reads tensors on the CPU; got one on {tensor.device}")
    return tensor.data_ptr()


def key(images: Tensor, seed: Tensor, step: Tensor) -> interface.Key:
    """Return the structure that names an operation's random numbers: int64, images dense (N,), seed and step 0-d."""
    return interface.Key(images=pointer(images), seed=pointer(seed), step=pointer(step))


def call(operation: str, args: ctypes.Structure) -> None:
    """Run an operation of csrc/fastddpm.h with torch's number of threads. Raises RuntimeError if it fails."""
    check(operation, getattr(library(), f"fastddpm_cpu_{operation}")(ctypes.byref(args), torch.get_num_threads()))


def check(operation: str, code: int) -> None:
    """Raise RuntimeError, with the library's message, unless its return code is 0."""
    if code:
        raise RuntimeError(f"{operation}: {library().fastddpm_error_text(code).decode()}")


def digest(memory: Sequence[Tensor]) -> int:
    """Return a 64-bit digest of the bytes of 1-D dense tensors on the CPU; not cryptographic, any number of threads.

    Raises RuntimeError without a library.
    """
    out = ctypes.c_uint64()
    parts = (ctypes.c_void_p * len(memory))(*(pointer(part) for part in memory))
    sizes = (ctypes.c_int64 * len(memory))(*(part.nbytes for part in memory))
    args = interface.Digest(
        parts=ctypes.addressof(parts), bytes=ctypes.addressof(sizes), out=ctypes.addressof(out), num=len(memory)
    )
    call("digest", args)
    return out.value


def crc32c(data: np.ndarray) -> int:
    """Return the CRC32C of a dense array's bytes. Raises RuntimeError without a library."""
    out = ctypes.c_uint32()
    args = interface.Crc32c(data=data.ctypes.data, out=ctypes.addressof(out), bytes=data.nbytes)
    check("crc32c", library().fastddpm_cpu_crc32c(ctypes.byref(args)))
    return out.value


def random_normal(num: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """Return `num` standard normals per image, float32 (N, num), the same bits on every machine.

    `images`: int64 (N,) on the CPU. `seed`, `step`: 0-d int64. Raises ValueError for other images, and RuntimeError
    without a library.
    """
    out = torch.empty(len(images), num, dtype=torch.float32, device="cpu")
    args, _keep = _random_args(out, num, images, seed, step, stream)
    call("random_normal", args)
    return out


def philox_words(num_blocks: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """Return the raw Philox words, uint32 (N, num_blocks, 4). Arguments and errors are those of `random_normal`."""
    out = torch.empty(len(images), num_blocks, 4, dtype=torch.uint32, device="cpu")
    args, _keep = _random_args(None, num_blocks, images, seed, step, stream)
    library().fastddpm_cpu_philox(ctypes.byref(args), ctypes.c_void_p(out.data_ptr()), torch.get_num_threads())
    return out


def _random_args(
    out: Tensor | None, num: int, images: Tensor, seed: Tensor, step: Tensor, stream: int
) -> tuple[interface.RandomNormal, tuple[Tensor, ...]]:
    """Return the structure, and the tensors that must live as long as it is in use."""
    if images.dtype != torch.int64 or images.device.type != "cpu":
        # The library gets addresses, not tensors.
        raise ValueError(f"random_normal: images must be int64 on the CPU; got {images.dtype} on {images.device}")
    images = images.contiguous()
    args = interface.RandomNormal(
        out=pointer(out), n=len(images), num=num, stream_id=stream, key=key(images, seed, step)
    )
    return args, (images, seed, step)
