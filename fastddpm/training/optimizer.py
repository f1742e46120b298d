"""One optimizer step: gradient clipping, Adam with warm-up, and the moving average of the weights."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastddpm.config import TrainConfig

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
PAPER_SHARDS = 8  # the released code trains on 8 TPU cores and clips on each


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, ..: linear warm-up, then constant or a cosine to zero.

    Standard mode warms up as (step + 1) / warmup; paper mode as step / warmup, so that its first update is 0.
    """
    done = step if config.mode == "paper" else step + 1
    rate = config.lr * min(1.0, done / config.warmup) if config.warmup else config.lr
    if config.decay == "cosine" and step >= config.warmup:
        rate *= 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))
    return rate


def decay_at(config: TrainConfig, decay: float, step: int) -> float:
    """What an average of `decay` decays by at step 0, 1, ..; the ramp is that of TensorFlow's averages."""
    return min(decay, (1 + step) / (10 + step)) if config.ema_ramp else decay


class Optimizer:
    """Adam on a network's parameters, its clipping, and exponential moving averages (EMA) of the weights.

    A step whose loss or gradient is not finite changes nothing: no weight, no moment, no average. That is
    decided on the device, without waiting for it.

    `parts`: what this process holds of each parameter, where it is not all of it (FSDP2); they share its memory.
    `total_norm`: the norm of gradients over what all processes hold, 0-d.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TrainConfig,
        parts: Sequence[Tensor] | None = None,
        total_norm: Callable[[list[Tensor]], Tensor] = nn.utils.get_total_norm,
    ) -> None:
        self.config = config
        self.names = [name for name, _ in network.named_parameters()]
        self.parameters: list[Tensor] = list(network.parameters())
        self._parts = self.parameters if parts is None else list(parts)
        self._total_norm = total_norm
        self.averages = {decay: [p.detach().clone() for p in self._parts] for decay in config.decays}
        self._adam = torch.optim.Adam(self._parts, config.lr, ADAM_BETAS, ADAM_EPS, fused=True)
        for p in self._parts:
            self._adam.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self._on_cpu = self._parts[0].device.type == "cpu"
        # Of what an average should move by, as a gradient: the fused kernel skips it where Adam's does.
        self._averaging = {decay: torch.optim.SGD(a, lr=1.0, fused=True) for decay, a in self.averages.items()}
        self.shard_sum: list[Tensor] | None = None

    @property
    def average(self) -> list[Tensor]:
        """The average of the first decay, which samples are drawn from."""
        return self.averages[self.config.decays[0]]

    def end_shard(self) -> None:
        """Paper mode: clip the gradient of the shard just differentiated, and keep its share of the mean."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_gradient)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.shard_sum is None:
            self.shard_sum = [torch.zeros_like(g) for g in gradients]
        torch._foreach_add_(self.shard_sum, gradients, alpha=1 / PAPER_SHARDS)
        self.zero_grad()

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the accumulated gradients as step number `step`; `loss` is the step's 0-d loss.

        Returns (gradient norm before clipping, whether the step was applied), 0-d float32 and bool.
        """
        gradients = self._take_gradients()
        norm = self._total_norm(gradients)
        if self.config.mode == "standard":
            nn.utils.clip_grads_with_norm_(self._parts, self.config.clip_gradient, norm)
        applied = torch.isfinite(norm) & torch.isfinite(loss)

        group = self._adam.param_groups[0]
        group["lr"] = learning_rate(self.config, step)
        if self.config.mode == "paper":
            # TensorFlow adds eps to sqrt(v) before the bias correction, torch after it.
            group["eps"] = ADAM_EPS / math.sqrt(1 - ADAM_BETAS[1] ** (step + 1))
        # Adam's fused kernel skips the update where found_inf is 1, as GradScaler has it do.
        skipped = (~applied).to(torch.float32)
        self._adam.found_inf = skipped  # type: ignore[attr-defined]
        self._adam.step()
        self.zero_grad()
        for decay, average in self.averages.items():
            share = 1 - decay_at(self.config, decay, step)
            self._update_average(average, share, self._averaging[decay], skipped)
        return norm, applied

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in (*self.parameters, *self._parts):
            p.grad = None

    def _take_gradients(self) -> list[Tensor]:
        """The gradients of this process's parts, which carry them from here on."""
        for i, (p, part) in enumerate(zip(self.parameters, self._parts, strict=True)):
            if self.shard_sum is not None:
                part.grad = self.shard_sum[i]
            elif part is not p and p.grad is not None:
                part.grad = p.grad.to_local()  # type: ignore[attr-defined]
        self.shard_sum = None
        return [part.grad for part in self._parts if part.grad is not None]

    @torch.no_grad()
    def _update_average(self, average: list[Tensor], share: float, descent: torch.optim.SGD, skipped: Tensor) -> None:
        """average += share (weight - average), unless the step is skipped."""
        if self._on_cpu:  # where looking costs nothing, and one pass over memory does it
            if not skipped:
                torch._foreach_lerp_(average, self._parts, share)
            return
        change = torch._foreach_sub(average, self._parts)
        torch._foreach_mul_(change, share)
        for a, c in zip(average, change, strict=True):
            a.grad = c
        descent.found_inf = skipped  # type: ignore[attr-defined]
        descent.step()
        descent.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and step counts by name, of this process's parts; `averaged` gives the EMA."""
        tensors = {}
        for name, p in zip(self.names, self._parts, strict=True):
            tensors[f"weight.{name}"] = p.detach()
            for part, value in self._adam.state[p].items():
                tensors[f"{part}.{name}"] = value
        return tensors

    def averaged(self, decay: float | None = None) -> dict[str, Tensor]:
        """The EMA of each parameter, by the network's own names; of the first decay unless given."""
        return dict(zip(self.names, self.average if decay is None else self.averages[decay], strict=True))
