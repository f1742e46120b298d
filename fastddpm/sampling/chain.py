"""The reverse chain of one batch: its state in fixed memory, and the step that advances it.

A step reads its row index, the seed and the image numbers from device memory and the host takes no decision. One step,
captured as a CUDA graph and replayed, therefore runs the whole chain; two if guidance has an interval.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm.errors import UsageError
from fastddpm.kernels.philox import STREAM_INITIAL
from fastddpm.ops import random_normal, reverse_step

from .cuda_graph import Replay, capture, failure
from .guidance import Correction

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class ChainTables:
    """The tensors and constants that all batches of a sampler share.

    `table`, `timesteps`, `seed`, `clip` and `variance` are those of `reverse_step`, the tensors on the device. `total`:
    T of the diffusion; all timesteps are below it. `shape`: (C, H, W) of an image. `first_order`: the table of the same
    steps without the x_0 prediction of the step before, float32 like `table`; None for methods of one step. `guided`:
    for each step, whether it takes classifier-free guidance. Default: all. `correction`: of each step. If it gives x_0,
    `table` and `first_order` are for a network that predicts x_0.
    """

    table: Tensor
    timesteps: Tensor
    total: int
    seed: Tensor
    shape: tuple[int, int, int]
    clip: float
    variance: str
    first_order: Tensor | None = None
    guided: tuple[bool, ...] | None = None
    correction: Correction | None = None


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

    def check(self, steps: int, shape: tuple[int, int, int, int]) -> None:
        """Raise `UsageError` unless this is a state of images of `shape`, (N, C, H, W), in a chain of `steps`."""
        if not 0 <= self.step < steps:
            raise UsageError(f"start.step must be in 0..{steps - 1}; got {self.step}")
        for name, state in (("x", self.x), ("x0", self.x0)):
            if state is not None and (state.shape != shape or state.dtype != torch.float32):
                raise UsageError(f"start.{name} must be float32 {shape}; got {state.dtype} {tuple(state.shape)}")
        if self.x0 is not None and self.step == 0:
            raise UsageError("start.x0 is of a step before; step 0 has none")

    def part(self, images: slice) -> "StartState":
        """Return the state of some of the images."""
        return StartState(self.x[images], self.step, None if self.x0 is None else self.x0[images])


class ReverseChain:
    """The reverse chain of `batch` images: call `begin`, then `advance` once for each row of the step table.

    `predict(x_t, t, label)` evaluates the network; its `t` is int64 (batch,), expanded from one value. `plain`: the
    same for the steps that `tables.guided` leaves out. `labels`: there are labels. `x`: the state, float32
    (batch, C, H, W). `x0`: the x_0 prediction of the last step taken with `keep_x0`, of the same shape; with a
    `first_order` table, of the last step, and part of the state. Between two steps `x` may be written to, and `rewind`
    returns to an earlier row.
    `graph`: capture a step as a CUDA graph when it is first taken; ignored without a CUDA device. If the capture fails,
    steps are launched one by one, and a warning gives the reason.
    """

    def __init__(
        self,
        predict: Predict,
        tables: ChainTables,
        batch: int,
        *,
        plain: Predict | None = None,
        labels: bool = False,
        graph: bool = False,
    ) -> None:
        device = tables.table.device
        self.batch, self.labels, self._tables = batch, labels, tables
        self._predict, self._plain = predict, plain or predict
        self.x = torch.zeros(batch, *tables.shape, dtype=torch.float32, device=device)
        self.x0 = torch.zeros_like(self.x)
        self._images = torch.zeros(batch, dtype=torch.int64, device=device)
        self._label = torch.zeros_like(self._images) if labels else None
        self._index = torch.zeros((), dtype=torch.int64, device=device)
        self._table = tables.table.clone()
        self._counters = tables.timesteps.clone()  # the Philox step counter of each row's noise
        self._graph = graph and device.type == "cuda"
        self._steps: dict[tuple[bool, bool], Replay] = {}
        self._row = 0  # the index, as the host knows it

    def begin(self, images: Tensor, label: Tensor | None, start: StartState | None = None) -> None:
        """Set the state to x_T of the image numbers `images`, int64 (n,) with n <= batch, or to `start`.

        `label`: int64 (n,), required with `labels`. The other batch - n images are padding: they are
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
        self._row = step
        self._index.fill_(step)
        if self._tables.first_order is not None:
            self._table.copy_(self._tables.table)
            if first_order:
                self._table[step].copy_(self._tables.first_order[step])

    def step(self, keep_x0: bool, *, guided: bool = True) -> None:
        """Launch the kernels of one step: x_t becomes x_{t-1}, and the index moves to the next row.

        `keep_x0`: also write the x_0 prediction to `x0`. `guided`: by `predict`, otherwise by `plain`.
        """
        tables, correction, shift = self._tables, self._tables.correction, None
        keep_x0 = keep_x0 or tables.first_order is not None
        row = self._index.reshape(1)
        t = tables.timesteps.index_select(0, row).expand(self.batch)
        out = (self._predict if guided else self._plain)(self.x, t, self._label)
        if correction is not None:
            out, shift = correction(self.x, out, t, self._label, row)
        reverse_step(
            self.x, out, self._table, self._counters, self._index, self._images, tables.seed,
            clip=tables.clip, variance=tables.variance, x0=self.x0 if keep_x0 else None,
        )  # fmt: skip
        if shift is not None:
            self.x.add_(shift)
        self._index.add_(1)

    def advance(self, keep_x0: bool) -> None:
        """Take one step, by replaying its CUDA graph if there is one. `keep_x0`: as for `step`.

        A graph cannot branch, but the host knows the row: steps with and without guidance are two graphs.
        """
        keep_x0 = keep_x0 or self._tables.first_order is not None  # one graph does
        guided = self._tables.guided is None or self._tables.guided[self._row]
        kind = (keep_x0, guided)
        if kind not in self._steps:
            self._steps[kind] = self._capture(*kind) if self._graph else lambda: self.step(keep_x0, guided=guided)
        self._steps[kind]()
        self._row += 1

    def _capture(self, keep_x0: bool, guided: bool) -> Replay:
        """Capture the step without changing the state; return its replay, or `step` itself if the capture fails."""
        state = (self.x, self.x0, self._index)
        before = [tensor.clone() for tensor in state]

        def restore() -> None:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        try:
            return capture(lambda: self.step(keep_x0, guided=guided), restore, self.x.device)
        except RuntimeError as error:
            warnings.warn(
                f"sampling without a CUDA graph, since a step could not be captured: {failure(error)}", stacklevel=2
            )
            self._graph = False
            restore()
            return lambda: self.step(keep_x0, guided=guided)
