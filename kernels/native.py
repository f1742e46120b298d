"""The compiled library beside this file: finds it, loads it, says why not."""

import ctypes
from functools import lru_cache
from pathlib import Path

# torch first: its OpenMP library is then the one that the compiled library uses, with its threads.
import torch
from torch import Tensor

_INT64, _INT32, _POINTER = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
_FOLDER = Path(__file__).parent
_NOT_BUILT = (
    "no compiled library beside kernels/native.py, so noise is drawn 5 to 10 times more slowly; "
    "`pip install -e .` compiles it where there is a C++ compiler"
)


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    files = sorted(_FOLDER.glob("_native.*so"))
    if not files:
        return _why_missing()
    try:
        library = ctypes.CDLL(str(files[0]))
        for name in ("fastddpm_random_normal", "fastddpm_philox"):
            function = getattr(library, name)
            function.argtypes = [_POINTER, _INT64, _POINTER, _INT64, _INT64, _INT64, _INT64, _INT32]
            function.restype = None
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


def random_normal(num: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """`num` standard normals per image, float32 (N, num): the same bits on every machine.

    `images`: int64 (N,) on the CPU. `seed` and `step`: 0-d int64. Raises ValueError for other images and
    RuntimeError without a library.
    """
    out = torch.empty(len(images), num, dtype=torch.float32)
    _call("fastddpm_random_normal", out, num, images, seed, step, stream)
    return out


def philox_words(num_blocks: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """The raw output words, uint32 (N, num_blocks, 4); arguments and errors as `random_normal`."""
    out = torch.empty(len(images), num_blocks, 4, dtype=torch.uint32)
    _call("fastddpm_philox", out, num_blocks, images, seed, step, stream)
    return out


def _call(name: str, out: Tensor, num: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> None:
    library = _loaded()
    if isinstance(library, str):
        raise RuntimeError(library)
    if images.dtype != torch.int64 or images.device.type != "cpu":
        # The library gets addresses, not tensors.
        raise ValueError(f"{name}: images must be int64 on the CPU; got {images.dtype} on {images.device}")
    images = images.contiguous()
    getattr(library, name)(
        out.data_ptr(), num, images.data_ptr(), len(images), int(seed), int(step), stream, torch.get_num_threads()
    )
