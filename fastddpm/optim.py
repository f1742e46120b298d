"""One optimizer step: gradient clipping, Adam with warm-up, and the moving average of the weights."""

import math
from collections.abc import Mapping

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


class Optimizer:
    """Adam on a network's parameters, its clipping, and the exponential moving average (EMA) of the weights.

    A step whose loss or gradient is not finite changes nothing: no weight, no moment, no average. That is
    decided on the device, without waiting for it.
    """

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.names = [name for name, _ in network.named_parameters()]
        self.parameters: list[Tensor] = list(network.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self._adam = torch.optim.Adam(self.parameters, config.lr, ADAM_BETAS, ADAM_EPS, fused=True)
        for p in self.parameters:
            self._adam.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self._shard_sum: list[Tensor] | None = None

    def end_shard(self) -> None:
        """Paper mode: clip the gradient of the shard just differentiated, and keep its share of the mean."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_gradient)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self._shard_sum is None:
            self._shard_sum = [torch.zeros_like(g) for g in gradients]
        torch._foreach_add_(self._shard_sum, gradients, alpha=1 / PAPER_SHARDS)
        self._adam.zero_grad()

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the accumulated gradients as step number `step`; `loss` is the step's 0-d loss.

        Returns (gradient norm before clipping, whether the step was applied), 0-d float32 and bool.
        """
        if self._shard_sum is not None:
            for p, total in zip(self.parameters, self._shard_sum, strict=True):
                p.grad = total
            self._shard_sum = None
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_gradient)
        applied = torch.isfinite(norm) & torch.isfinite(loss)

        group = self._adam.param_groups[0]
        group["lr"] = learning_rate(self.config, step)
        if self.config.mode == "paper":
            # TensorFlow adds eps to sqrt(v) before the bias correction, torch after it.
            group["eps"] = ADAM_EPS / math.sqrt(1 - ADAM_BETAS[1] ** (step + 1))
        # Adam's fused kernel skips the update where found_inf is 1, as GradScaler has it do.
        self._adam.found_inf = (~applied).to(torch.float32)  # type: ignore[attr-defined]
        self._adam.step()
        self._adam.zero_grad()
        self._update_average(applied)
        return norm, applied

    @torch.no_grad()
    def _update_average(self, applied: Tensor) -> None:
        change = torch._foreach_sub(self.parameters, self.average)
        torch._foreach_mul_(change, (1 - self.config.ema) * applied)
        torch._foreach_add_(self.average, change)

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and step counts by name, for a checkpoint; `averaged` gives the EMA."""
        tensors = {}
        for name, p in zip(self.names, self.parameters, strict=True):
            tensors[f"weight.{name}"] = p.detach()
            for part, value in self._adam.state[p].items():
                tensors[f"{part}.{name}"] = value
        return tensors

    def averaged(self) -> dict[str, Tensor]:
        """The EMA of each parameter, by the network's own names."""
        return dict(zip(self.names, self.average, strict=True))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], averaged: Mapping[str, Tensor]) -> None:
        """Take over what `state` and `averaged` gave; KeyError for a missing name."""
        for name, p, average in zip(self.names, self.parameters, self.average, strict=True):
            p.copy_(state[f"weight.{name}"])
            average.copy_(averaged[name])
            for part, value in self._adam.state[p].items():
                value.copy_(state[f"{part}.{name}"])
