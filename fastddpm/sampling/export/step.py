"""One reverse step as a module of tensors alone, which torch.export can trace."""

import torch
from torch import Tensor, nn

from fastddpm.errors import UsageError
from fastddpm.kernels.reverse_step import Arguments, reference
from fastddpm.ops.reverse_step import VARIANCES
from fastddpm.sampling.sampler import Sampler


class ReverseStep(nn.Module):
    """A step of the chain that `sampler` takes, as a function without state: x_t, noise and the step's number in.

    `forward(x_t, step, noise, previous_x0, label, guidance)` returns x_{t-1} and the clipped x_0 prediction, float32
    (N, C, H, W). `step`: int64 (), 0..S-1 in the order of the chain. `noise`: standard normals like x_t, not read by
    the last step. `previous_x0`: the second result of the step before, anything in step 0; None for methods that do not
    read it. `label`: int64 (N,), None without classes. `guidance`: float32 (), the scale of classifier-free guidance,
    None if the network has no null label. Raises `UsageError` for a sampler with `cond_fn`, whose code is not known.
    """

    timesteps: Tensor
    table: Tensor
    guided: Tensor

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        if sampler.guide.cond_fn is not None:
            raise UsageError("a sampler with cond_fn cannot be exported; add the classifier's gradient in your program")
        tables = sampler.tables(sampler.device)
        self.network, self._guide, self._correction = sampler.network, sampler.guide, tables.correction
        self._clip, self._variance = tables.clip, VARIANCES[tables.variance]
        self._null_label = sampler.interface.null_label
        self.register_buffer("timesteps", tables.timesteps)
        self.register_buffer("table", tables.table)
        inside = torch.from_numpy(sampler.guide.inside(sampler.timesteps)).to(tables.table)
        self.register_buffer("guided", inside)  # 1 or 0 for each step

    def forward(
        self,
        x_t: Tensor,
        step: Tensor,
        noise: Tensor,
        previous_x0: Tensor | None = None,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        row = step.reshape(1)
        t = self.timesteps.index_select(0, row).expand(x_t.shape[0])  # len() would fix the batch size
        out = self._predict(x_t, t, row, label, guidance)
        if self._correction is not None:
            out, _ = self._correction(x_t, out, t, label, row)
        x = x_t.clone()
        x0 = torch.zeros_like(x_t) if previous_x0 is None else previous_x0.clone()
        unread = torch.zeros_like(step)  # the noise is given
        reference.forward(
            Arguments(
                x, out, self.table, self.timesteps, step, unread, unread, self._clip, self._variance, noise=noise, x0=x0
            )
        )
        return x, x0

    def _predict(self, x_t: Tensor, t: Tensor, row: Tensor, label: Tensor | None, guidance: Tensor | None) -> Tensor:
        if guidance is None or label is None or self._null_label is None:
            return self.network(x_t, t) if label is None else self.network(x_t, t, label)
        none = torch.full_like(label, self._null_label)
        both = self.network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([label, none]))
        # Outside the interval the scale is 1, which gives the prediction with the label.
        scale = 1 + (guidance - 1) * self.guided.index_select(0, row)[0]
        return self._guide.combine(both, x_t.shape[1], scale)
