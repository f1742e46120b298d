"""The optimizer: gradient clipping, Adam with warm-up, and exponential moving averages (EMA) of the weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastddpm.config import TrainConfig
from fastddpm.errors import DataError
from fastddpm.runtime.network import trained

from .power_average import decay_of, exponent_of

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
_CLIP_EPS = 1e-6  # that torch adds to the norm by which it divides
PAPER_SHARDS = 8  # the released code trains on 8 TPU cores and clips the gradient of each


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of step 0, 1, ..: linear warm-up, then constant or a cosine to zero.

    Standard mode warms up as (step + 1) / warmup; paper mode as step / warmup, so that its first update is 0.
    """
    done = step if config.mode == "paper" else step + 1
    rate = config.lr * min(1.0, done / config.warmup) if config.warmup else config.lr
    if config.decay == "cosine" and step >= config.warmup:
        rate *= 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))
    return rate


def _order_in_memory(tensor: Tensor) -> tuple[int, ...]:
    """Return the order of dimensions in which the tensor is contiguous; the given order if there is none."""
    given = tuple(range(tensor.ndim))
    order = tuple(sorted(given, key=lambda d: (-tensor.stride()[d], d)))
    return order if tensor.permute(order).is_contiguous() and not tensor.is_contiguous() else given


def decay_at(config: TrainConfig, decay: float, step: int) -> float:
    """Return the decay of an average at step 0, 1, ..: `decay`, limited by TensorFlow's ramp if ema_ramp is set."""
    return min(decay, (1 + step) / (10 + step)) if config.ema_ramp else decay


class Optimizer:
    """Adam on a network's trained parameters, its clipping, and exponential moving averages (EMA) of the weights.

    A step whose loss or gradient is not finite changes nothing: no weight, no moment, no average. This is
    decided on the device, without a synchronization. Only the power-function averages, whose weighting is a function
    of the step alone, count the unchanged weights once more.

    `local_shards`: this process's shard of each parameter (FSDP2), in the parameter's memory. Default: the parameters.
    `total_norm`: returns the gradient norm, 0-d, over the shards of all processes.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TrainConfig,
        local_shards: Sequence[Tensor] | None = None,
        total_norm: Callable[[list[Tensor]], Tensor] = nn.utils.get_total_norm,
    ) -> None:
        self.config = config
        self.names = list(trained(network))
        self.parameters: list[Tensor] = list(trained(network).values())
        self._local_shards = self.parameters if local_shards is None else list(local_shards)
        self._total_norm = total_norm
        self.averages = {decay: [p.detach().clone() for p in self._local_shards] for decay in config.decays}
        lengths = config.ema_snapshot_lengths if config.ema_snapshots else ()
        self.power_averages = {length: [p.detach().clone() for p in self._local_shards] for length in lengths}
        device = self._local_shards[0].device
        # On the device, so that a captured step reads the numbers of the step at hand.
        self._rate = torch.zeros((), dtype=torch.float32, device=device)
        self._shares = {decay: torch.zeros_like(self._rate) for decay in config.decays}
        self._on_cpu = device.type == "cpu"
        # What Adam sees of each parameter: the dimensions in the order in which they lie in memory. On a CPU its kernel
        # goes through memory, copies every gradient that is not contiguous, and takes one of another layout wrongly.
        self._orders = [_order_in_memory(p) if self._on_cpu else tuple(range(p.ndim)) for p in self._local_shards]
        self._seen = [
            p if order == tuple(range(p.ndim)) else p.detach().permute(order)
            for p, order in zip(self._local_shards, self._orders, strict=True)
        ]
        self._adam = torch.optim.Adam(
            self._seen, self._rate, ADAM_BETAS, ADAM_EPS, fused=True, capturable=device.type == "cuda"
        )
        for p in self._seen:
            self._adam.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        # Plain SGD applies the EMA update as a gradient, so found_inf skips it together with Adam's.
        self._average_sgd = {
            decay: torch.optim.SGD(a, lr=self._shares[decay], fused=True) for decay, a in self.averages.items()
        }
        self.shard_sum: list[Tensor] | None = None

    @property
    def average(self) -> list[Tensor]:
        """The average of the first decay, from which samples are drawn."""
        return self.averages[self.config.decays[0]]

    def end_shard(self) -> None:
        """Paper mode: clip the gradient of one of the batch's 8 shards, and add an eighth of it to `shard_sum`."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_gradient)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        if self.shard_sum is None:
            self.shard_sum = [torch.zeros_like(g) for g in gradients]
        torch._foreach_add_(self.shard_sum, gradients, alpha=1 / PAPER_SHARDS)
        self.zero_grad()

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the accumulated gradients as step number `step` (0, 1, ..); `loss` is the step's 0-d loss.

        Returns (gradient norm before clipping, whether the step was applied), 0-d float32 and 0-d bool.
        """
        self.begin(step)
        result = self.apply(loss)
        self.end(step)
        return result

    def begin(self, step: int) -> None:
        """Write the learning rate and the shares of the averages of step number `step` to the device."""
        self._rate.fill_(learning_rate(self.config, step))
        for decay, share in self._shares.items():
            share.fill_(1 - decay_at(self.config, decay, step))
        if self.config.mode == "paper":
            # TensorFlow adds eps to sqrt(v) before the bias correction, torch after it.
            self._adam.param_groups[0]["eps"] = ADAM_EPS / math.sqrt(1 - ADAM_BETAS[1] ** (step + 1))

    def apply(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the accumulated gradients, and return what `step` does. In mode standard it can be captured."""
        gradients = self._take_gradients()
        norm = self._total_norm(gradients)
        # Where reading the norm costs nothing, a factor of 1 is not multiplied by.
        if self.config.mode == "standard" and not (self._on_cpu and norm + _CLIP_EPS <= self.config.clip_gradient):
            nn.utils.clip_grads_with_norm_(self._local_shards, self.config.clip_gradient, norm)
        applied = torch.isfinite(norm) & torch.isfinite(loss)
        # Adam's fused kernel skips the update if found_inf is 1; GradScaler relies on the same.
        skipped = (~applied).to(torch.float32)
        self._adam.found_inf = skipped  # type: ignore[attr-defined]
        self._show_gradients()
        self._adam.step()
        self.zero_grad()
        for decay, average in self.averages.items():
            self._update_average(average, self._shares[decay], self._average_sgd[decay], skipped)
        return norm, applied

    @torch.no_grad()
    def end(self, step: int) -> None:
        """Update the power-function averages after step number `step`."""
        for sigma_rel, average in self.power_averages.items():
            share = 1 - decay_of(exponent_of(sigma_rel), step + 1)
            torch._foreach_lerp_(average, self._local_shards, share)

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for p in (*self.parameters, *self._local_shards, *self._seen):
            p.grad = None

    def _take_gradients(self) -> list[Tensor]:
        """Move the gradients to this process's shards and return them."""
        for i, (p, shard) in enumerate(zip(self.parameters, self._local_shards, strict=True)):
            if self.shard_sum is not None:
                shard.grad = self.shard_sum[i]
            elif shard is not p and p.grad is not None:
                shard.grad = p.grad.to_local()  # type: ignore[attr-defined]
        self.shard_sum = None
        return [shard.grad for shard in self._local_shards if shard.grad is not None]

    def _show_gradients(self) -> None:
        """Give Adam the gradients in the order of the parameters' dimensions that it sees."""
        for shard, seen, order in zip(self._local_shards, self._seen, self._orders, strict=True):
            if shard.grad is None:
                continue
            if seen is not shard or (self._on_cpu and not shard.grad.is_contiguous()):
                seen.grad = shard.grad.permute(order).contiguous()

    @torch.no_grad()
    def _update_average(self, average: list[Tensor], share: Tensor, sgd: torch.optim.SGD, skipped: Tensor) -> None:
        """Compute average += share * (weight - average), unless the step is skipped."""
        if self._on_cpu:  # reading `skipped` costs nothing here, and lerp is one pass over memory
            if not skipped:
                torch._foreach_lerp_(average, self._local_shards, share.item())
            return
        change = torch._foreach_sub(average, self._local_shards)
        for a, c in zip(average, change, strict=True):
            a.grad = c
        sgd.found_inf = skipped  # type: ignore[attr-defined]
        sgd.step()
        sgd.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """Return weights, moments and step counts of this process's shards, by name; `averaged` returns the EMA."""
        tensors = {}
        for name, p, seen, order in zip(self.names, self._local_shards, self._seen, self._orders, strict=True):
            tensors[f"weight.{name}"] = p.detach()
            back = sorted(range(p.ndim), key=order.__getitem__)
            for kind, value in self._adam.state[seen].items():
                tensors[f"{kind}.{name}"] = value if kind == "step" else value.permute(back)
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor], source: str | Path = "the state dict") -> None:
        """Copy weights, moments and step counts, named as in `state_dict`, into this process's shards.

        `source`: where they come from, for the message. Raises `DataError` if a tensor is missing or has another
        shape. Other names are ignored.
        """
        copy_tensors(self.state_dict(), tensors, source)

    def averaged(self, decay: float | None = None) -> dict[str, Tensor]:
        """Return the EMA of each parameter, by the network's own names. `decay` defaults to the first one."""
        return dict(zip(self.names, self.average if decay is None else self.averages[decay], strict=True))

    def power_averaged(self, sigma_rel: float) -> dict[str, Tensor]:
        """Return the power-function average of length `sigma_rel` of each parameter, by the network's own names."""
        return dict(zip(self.names, self.power_averages[sigma_rel], strict=True))


@torch.no_grad()
def copy_tensors(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy the tensor of the same name into each target. Raises `DataError` if one is missing or has another shape."""
    for name, target in targets.items():
        if name not in tensors:
            raise DataError(f"{source} lacks {name}, which this network has")
        if tensors[name].shape != target.shape:
            raise DataError(
                f"{source}: {name} is {tuple(tensors[name].shape)}, and this network's {tuple(target.shape)}"
            )
        target.copy_(tensors[name])
