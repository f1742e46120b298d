"""Whether a network's weights are still those that something was prepared from."""

from torch import nn


def weight_versions(module: nn.Module) -> list[tuple[int, int]]:
    """Where each parameter lies and how often it was written to; another list after any change."""
    return [(p.data_ptr(), p._version) for p in module.parameters()]
