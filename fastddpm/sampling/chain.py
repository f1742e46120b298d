"""The reverse process of one batch: its state, in memory that stays where it is, and the step that moves it on.

A step reads its index, the seed and the images' numbers where they lie on the device and the host decides nothing: so a
CUDA graph of one step, replayed, is the whole chain.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm.kernels.philox import STREAM_INITIAL
from fastddpm.ops import random_normal, reverse_step

from .cuda_graph import Replay, capture

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class ChainTables:
    """What every batch of a sampler shares. `table`, `timesteps`: as `reverse_step` takes them, on the device.

    `total`: T, which all timesteps are below.
    """

    table: Tensor
    timesteps: Tensor
    total: int
    seed: Tensor
    shape: tuple[int, int, int]
    clip: float
    variance: str


@dataclass(frozen=True)
class StartState:
    """Where a chain begins other than with noise: `x`, (n, C, H, W), is the state that row `step` takes."""

    x: Tensor
    step: int


class ReverseChain:
    """`batch` images from noise to the end: `begin`, then `advance` once for each row of the process' table.

    `predict(x_t, t, label)`: the network; `t` int64 (batch,) expanded from one value. `x`, `x0`: float32 (batch, C, H,
    W), the state and, after `advance(keep_x0=True)`, the x_0 prediction of that step. Between two steps `x` may be
    written to, and `rewind` goes back to an earlier row. With `graph` a step is captured when it is first taken, on a
    CUDA device; if that fails, steps are launched one by one, and a warning says why.
    """

    def __init__(
        self, predict: Predict, tables: ChainTables, batch: int, *, labels: bool = False, graph: bool = False
    ) -> None:
        device = tables.table.device
        self.batch, self._predict, self._tables = batch, predict, tables
        self.x = torch.zeros(batch, *tables.shape, dtype=torch.float32, device=device)
        self.x0 = torch.zeros_like(self.x)
        self._images = torch.zeros(batch, dtype=torch.int64, device=device)
        self._label = torch.zeros_like(self._images) if labels else None
        self._index = torch.zeros((), dtype=torch.int64, device=device)
        self._counters = tables.timesteps.clone()  # what names the noise of each row
        self._graph = graph and device.type == "cuda"
        self._steps: dict[bool, Replay] = {}

    def begin(self, images: Tensor, label: Tensor | None, start: StartState | None = None) -> None:
        """x_T of `images`, int64 (n,) with n <= batch, or the state of `start`, (n, C, H, W).

        The rest of the batch draws the image 0 and is of no account.
        """
        self._images.zero_()
        self._images[: len(images)] = images
        if self._label is not None:
            assert label is not None
            self._label.zero_()
            self._label[: len(label)] = label
        tables = self._tables
        self._counters.copy_(tables.timesteps)
        self._index.fill_(0 if start is None else start.step)
        first = torch.zeros_like(tables.seed)
        self.x.copy_(random_normal(tables.shape, self._images, tables.seed, first, STREAM_INITIAL))
        if start is not None:
            self.x[: len(start.x)] = start.x

    def rewind(self, step: int) -> None:
        """Take the rows from `step` on once more, with noise that no row has drawn before; `x` is the caller's."""
        self._index.fill_(step)
        self._counters.add_(self._tables.total)

    def step(self, keep_x0: bool) -> None:
        """One step as the host launches it: x_t becomes x_{t-1}, the index moves on."""
        tables = self._tables
        t = tables.timesteps.index_select(0, self._index.reshape(1)).expand(self.batch)
        out = self._predict(self.x, t, self._label)
        reverse_step(
            self.x, out, tables.table, self._counters, self._index, self._images, tables.seed,
            clip=tables.clip, variance=tables.variance, x0=self.x0 if keep_x0 else None,
        )  # fmt: skip
        self._index.add_(1)

    def advance(self, keep_x0: bool) -> None:
        """One step, replayed where it is captured."""
        if keep_x0 not in self._steps:
            self._steps[keep_x0] = self._captured(keep_x0) if self._graph else lambda: self.step(keep_x0)
        self._steps[keep_x0]()

    def _captured(self, keep_x0: bool) -> Replay:
        """A replay of the step; capturing it leaves the state as it was."""
        before = [tensor.clone() for tensor in (self.x, self._index)]

        def restore() -> None:
            for tensor, value in zip((self.x, self._index), before, strict=True):
                tensor.copy_(value)

        try:
            return capture(lambda: self.step(keep_x0), restore, self.x.device)
        except RuntimeError as error:
            # What the step raised, where ending the capture failed in its wake.
            reason = str(error.__context__ or error).partition("\n")[0]
            warnings.warn(f"sampling without a CUDA graph, since a step could not be captured: {reason}", stacklevel=2)
            self._graph = False
            restore()
            return lambda: self.step(keep_x0)
