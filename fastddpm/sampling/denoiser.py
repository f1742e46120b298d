"""The network alone, evaluated as fast as the sampler evaluates it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fastddpm.config import EngineConfig
from fastddpm.errors import UsageError
from fastddpm.runtime.network import Network, device_of, precision_of_weights

from .captured_network import CapturedNetwork
from .engine import is_current, prepare
from .isolation import evaluating, isolated


class Denoiser:
    """Evaluates a network without gradients, as a step of the sampler does: `Denoiser(unet)(x_t, t, label)`.

    A `UNet` is prepared at the first call (`fastddpm.sampling.engine.prepare`), and again when its weights have changed
    since: on a CPU it is evaluated by the compiled library, on a GPU with fused blocks, from the second call of a shape
    on as a CUDA graph. Other networks are called as they are, in evaluation mode. `engine`: as of a `Sampler`. Default:
    `EngineConfig()`. Raises `UsageError` if `network` is not a module.

    `x_t`: float32 (N, C, H, W). `t`: int64 (N,). `label`: int64 (N,) if the network takes labels. Returns floating
    (N, C, H, W), or (N, 2C, H, W) with a learned variance, within the rounding of the engine's precision of
    `network(x_t, t, label)`. Raises ValueError for other arguments of a `UNet`. Neither gradients nor autocast pass
    through it.
    """

    def __init__(self, network: nn.Module, engine: EngineConfig | None = None) -> None:
        if not isinstance(network, nn.Module):
            raise UsageError(f"a network must be a torch.nn.Module; got {type(network).__name__}")
        self.network, self.engine = network, engine or EngineConfig()
        self._prepared: Network | None = None
        self._captured: CapturedNetwork | None = None
        self._held = 0  # blocks of `unchanging`
        self._lock = threading.Lock()

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        arguments = (x_t, t) if label is None else (x_t, t, label)
        with isolated(device_of(self.network)):
            with self._lock:
                prepared = self._current()
                if self._captured is not None:
                    return self._captured(arguments)
            if not isinstance(prepared, nn.Module):
                return prepared(*arguments)
            with evaluating(prepared):
                return prepared(x_t.to(precision_of_weights(prepared)), *arguments[1:])

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """Promise that the network does not change inside the block: it is compared once, not at every call."""
        with isolated(device_of(self.network)), self._lock:
            self._current()
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1

    def _current(self) -> Network:
        """Return the network as prepared; prepare it again if it has changed."""
        if self._prepared is None or not (self._held or is_current(self._prepared, self.network, self.engine)):
            self._prepared = prepare(self.network, (), self.engine)
            on_gpu = device_of(self.network).type == "cuda" and not isinstance(self._prepared, nn.Module)
            self._captured = CapturedNetwork(self._prepared) if on_gpu and self.engine.graph else None
        return self._prepared

    def __getstate__(self) -> dict[str, object]:
        """Copy and pickle without what is prepared; a copy prepares its own."""
        return {"network": self.network, "engine": self.engine}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _prepared=None, _captured=None, _held=0, _lock=threading.Lock())
