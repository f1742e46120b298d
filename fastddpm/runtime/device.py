"""Where the network runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastddpm.errors import UsageError


def choose_device(name: str, index: int = 0) -> torch.device:
    """The device called auto, cpu or cuda (which ROCm builds answer to as well); `UsageError` without one.

    `index`: which of several GPUs, made the current one; a process of its own for each is started with another.
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
        raise UsageError(f"process {index} of this machine has no GPU: {torch.cuda.device_count()} are visible")
    torch.cuda.set_device(index)
    return torch.device(name, index)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread in the block, so that sums of PyTorch's own are in the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
