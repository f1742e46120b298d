"""Contexts in which the network is evaluated alike, whatever mode the caller and the network are in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Compute as the engine says: without gradients, whatever autocast or inference mode surrounds the call."""
    if not torch.is_autocast_enabled(device.type) and not torch.is_inference_mode_enabled():
        with torch.no_grad():
            yield
        return
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put `module` into evaluation mode, and its parts back into training mode afterwards."""
    training = [inner for inner in module.modules() if inner.training]
    module.eval()
    try:
        yield
    finally:
        for inner in training:
            inner.training = True
