"""The reverse chain of one batch: its state in fixed memory, and the step that advances it.

A step reads its row index, the seed and the image numbers from device memory and the host takes no decision. One step,
captured as a CUDA graph and replayed, therefore runs the whole chain.
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
    """The tensors and constants that all batches of a sampler share.

    `table`, `timesteps`, `seed`, `clip` and `variance` are those of `reverse_step`, the tensors on the device. `total`:
    T of the diffusion; all timesteps are below it. `shape`: (C, H, W) of an image. `first_order`: the table of the same
    steps without the x_0 prediction of the step before, float32 like `table`; None for methods of one step.
    """

    table: Tensor
    timesteps: Tensor
    total: int
    seed: Tensor
    shape: tuple[int, int, int]
    clip: float
    variance: str
    first_order: Tensor | None = None


@dataclass(frozen=True)
class StartState:
    """The state that a chain starts from instead of noise.

    `x`: float32 (n, C, H, W), the input of row `step` of the step table. `x0`: the x_0 prediction of the step before,
    like `x`, with which dpm2m and dpm2m-sde continue a chain exactly. Default: none; their step `step` is then
    first-order. Other methods do not read it.
    """

    x: Tensor
    step: int
    x0: Tensor | None = None

    def part(self, images: slice) -> "StartState":
        """Return the state of some of the images."""
        return StartState(self.x[images], self.step, None if self.x0 is None else self.x0[images])


class ReverseChain:
    """The reverse chain of `batch` images: call `begin`, then `advance` once for each row of the step table.

    `predict(x_t, t, label)` evaluates the network; its `t` is int64 (batch,), expanded from one value. `labels`: the
    network takes labels. `x`: the state, float32 (batch, C, H, W). `x0`: the x_0 prediction of the last step taken with
    `keep_x0`, of the same shape; with a `first_order` table, of the last step, and part of the state. Between two steps
    `x` may be written to, and `rewind` returns to an earlier row.
    `graph`: capture a step as a CUDA graph when it is first taken; ignored without a CUDA device. If the capture fails,
    steps are launched one by one, and a warning gives the reason.
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
        self._table = tables.table.clone()
        self._counters = tables.timesteps.clone()  # the Philox step counter of each row's noise
        self._graph = graph and device.type == "cuda"
        self._steps: dict[bool, Replay] = {}

    def begin(self, images: Tensor, label: Tensor | None, start: StartState | None = None) -> None:
        """Set the state to x_T of the image numbers `images`, int64 (n,) with n <= batch, or to `start`.

        `label`: int64 (n,), required if the network takes labels. The other batch - n images are padding: they are
        drawn as image 0 with label 0.
        """
        self._images.zero_()
        self._images[: len(images)] = images
        if self._label is not None:
            assert label is not None
            self._label.zero_()
            self._label[: len(label)] = label
        tables = self._tables
        self._counters.copy_(tables.timesteps)
        self._begin_at(0 if start is None else start.step, first_order=start is None or start.x0 is None)
        first = torch.zeros_like(tables.seed)
        self.x.copy_(random_normal(tables.shape, self._images, tables.seed, first, STREAM_INITIAL))
        if start is not None:
            self.x[: len(start.x)] = start.x
            if start.x0 is not None:
                self.x0[: len(start.x0)] = start.x0

    def rewind(self, step: int) -> None:
        """Return to row `step` of the table, with fresh noise for all rows to come. The caller sets `x` accordingly.

        The step is first-order, because `x` does not follow from the step before.
        """
        self._begin_at(step, first_order=True)
        self._counters.add_(self._tables.total)

    def _begin_at(self, step: int, first_order: bool) -> None:
        self._index.fill_(step)
        if self._tables.first_order is not None:
            self._table.copy_(self._tables.table)
            if first_order:
                self._table[step].copy_(self._tables.first_order[step])

    def step(self, keep_x0: bool) -> None:
        """Launch the kernels of one step: x_t becomes x_{t-1}, and the index moves to the next row.

        `keep_x0`: also write the x_0 prediction to `x0`.
        """
        tables = self._tables
        keep_x0 = keep_x0 or tables.first_order is not None
        t = tables.timesteps.index_select(0, self._index.reshape(1)).expand(self.batch)
        out = self._predict(self.x, t, self._label)
        reverse_step(
            self.x, out, self._table, self._counters, self._index, self._images, tables.seed,
            clip=tables.clip, variance=tables.variance, x0=self.x0 if keep_x0 else None,
        )  # fmt: skip
        self._index.add_(1)

    def advance(self, keep_x0: bool) -> None:
        """Take one step, by replaying its CUDA graph if there is one. `keep_x0`: as for `step`."""
        keep_x0 = keep_x0 or self._tables.first_order is not None  # one graph does
        if keep_x0 not in self._steps:
            self._steps[keep_x0] = self._capture(keep_x0) if self._graph else lambda: self.step(keep_x0)
        self._steps[keep_x0]()

    def _capture(self, keep_x0: bool) -> Replay:
        """Capture the step without changing the state; return its replay, or `step` itself if the capture fails."""
        state = (self.x, self.x0, self._index)
        before = [tensor.clone() for tensor in state]

        def restore() -> None:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        try:
            return capture(lambda: self.step(keep_x0), restore, self.x.device)
        except RuntimeError as error:
            # If the step raises, ending the capture raises as well, with the step's error as its context.
            reason = str(error.__context__ or error).partition("\n")[0]
            warnings.warn(f"sampling without a CUDA graph, since a step could not be captured: {reason}", stacklevel=2)
            self._graph = False
            restore()
            return lambda: self.step(keep_x0)
