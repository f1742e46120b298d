"""The device that a command computes on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastddpm.errors import UsageError


def choose_device(name: str, index: int = 0) -> torch.device:
    """Return the device named auto, cpu or cuda (also the name of ROCm devices).

    auto: a GPU if there is one, otherwise the CPU. `index`: the GPU to take, in processes that use one each; it is made
    the current one. Raises `UsageError` if there is no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no device is visible" if built else "this build of torch has no CUDA or ROCm"
        raise UsageError(f"device cuda was asked for, but {reason}; use --device cpu")
    if name != "cuda":
        return torch.device(name)
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"process {index} of this machine has no GPU: {torch.cuda.device_count()} are visible; start one process "
            "per GPU"
        )
    torch.cuda.set_device(index)
    return torch.device(name, index)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread inside the block, so that its sums have the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def fastest_convolutions(device: torch.device, timed: bool = True) -> Iterator[None]:
    """On a CUDA device, let cuDNN time its algorithms for each new shape and keep the fastest, in the block."""
    if device.type != "cuda" or not timed or not torch.backends.cudnn.enabled:
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32):
        yield
