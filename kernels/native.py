"""The compiled library beside this file: finds it, loads it, says why not."""

import ctypes
from functools import lru_cache
from pathlib import Path

# torch first: its OpenMP library is then the one that the compiled library uses, with its threads.
import torch
from torch import Tensor

_INT64, _INT32, _POINTER = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
_NOT_BUILT = (
    "no compiled library: there was no C++ compiler when fastddpm was installed; noise is drawn more slowly. "
    "Install a compiler, then install fastddpm again"
)


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    files = sorted([*Path(__file__).parent.glob("_native*.so"), *Path(__file__).parent.glob("_native*.pyd")])
    if not files:
        return _NOT_BUILT
    try:
        library = ctypes.CDLL(str(files[-1]))
        for name in ("fastddpm_random_normal", "fastddpm_philox"):
            function = getattr(library, name)
            function.argtypes = [_POINTER, _INT64, _POINTER, _INT64, _INT64, _INT64, _INT64, _INT32]
            function.restype = None
    except (OSError, AttributeError) as error:
        return f"{files[-1].name} cannot be loaded ({error}); install fastddpm again"
    return library


def unavailable() -> str | None:
    """Why the compiled library cannot be used, or None when it can."""
    library = _loaded()
    return library if isinstance(library, str) else None


def random_normal(num: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """`num` standard normals per image, float32 (N, num); arguments as `kernels.philox.eager.normals`, on the CPU."""
    out = torch.empty(len(images), num, dtype=torch.float32)
    _call("fastddpm_random_normal", out, num, images, seed, step, stream)
    return out


def philox_words(num_blocks: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """The raw output words, uint32 (N, num_blocks, 4)."""
    out = torch.empty(len(images), num_blocks, 4, dtype=torch.uint32)
    _call("fastddpm_philox", out, num_blocks, images, seed, step, stream)
    return out


def _call(name: str, out: Tensor, num: int, images: Tensor, seed: Tensor, step: Tensor, stream: int) -> None:
    library = _loaded()
    if isinstance(library, str):
        raise RuntimeError(library)
    images = images.contiguous()
    getattr(library, name)(
        out.data_ptr(), num, images.data_ptr(), len(images), int(seed), int(step), stream, torch.get_num_threads()
    )
