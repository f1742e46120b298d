"""Where the network runs."""

import torch

from fastddpm.errors import UsageError


def choose_device(name: str) -> torch.device:
    """The device called auto, cpu or cuda (which ROCm builds answer to as well); `UsageError` without one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no device is visible" if built else "this build of torch has no CUDA or ROCm"
        raise UsageError(f"device cuda was asked for, but {reason}; use --device cpu")
    return torch.device(name)
