"""The probability-flow ODE of a discrete process, and the log-density that it gives (Song et al. 2021, appendix D).

With alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar), the angle phi = atan2(sigma, alpha) runs from near 0,
where there is little noise, to at most pi / 2. In phi the ODE that has the marginals of q is

    dx / dphi = v(x, phi) = alpha eps - sigma x_0 = (alpha x - x_0) / sigma,

whatever the network predicts, and it stays finite where alpha is 0. The log-density changes along it by the divergence:

    log p(x at phi_0) = log N(x at phi_{T-1}; 0, I) + integral over phi of div v.

A network is known at its T timesteps only. So the solver evaluates it at these and nowhere else: a step goes from one
timestep to a later one by Kutta's method of third order, whose middle stage lies at the timestep between them that is
nearest to the middle in phi, wherever that is exactly. Nothing is interpolated, and no x_0 prediction is clipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.runtime.network import evaluate, precision_of_weights

STAGES = 3  # evaluations of the network in a step
_MIDDLE = (0.2, 0.6)  # of a step, where its middle stage may lie: at 2/3 the method has no solution
_DENSE_BELOW = 0.05  # the angle below which steps are spread evenly in its logarithm, and above which in the angle


@dataclass(frozen=True, eq=False)
class Flow:
    """Points that flow along the ODE: `x` float64 (N, C, H, W), `log_density` float64 (N,), the integral so far."""

    x: Tensor
    log_density: Tensor


class ProbabilityFlow:
    """The ODE of `network`, which is evaluated in evaluation mode, in the precision of its weights, without guidance.

    `angles`: phi at each timestep, float64 (T,), ascending. `alpha`, `sigma`: float64 (T,).
    """

    def __init__(self, network: nn.Module, diffusion: Diffusion) -> None:
        self.network, self.diffusion = network, diffusion
        with np.errstate(divide="ignore"):
            log_alpha_bar = np.cumsum(np.log1p(-diffusion.betas))
        self.alpha, self.sigma = np.exp(log_alpha_bar / 2), np.sqrt(-np.expm1(log_alpha_bar))
        self.angles = np.arctan2(self.sigma, self.alpha)
        from_x, from_out = diffusion.x0_coefficients()
        self._from_x, self._from_out = (self.alpha - from_x) / self.sigma, -from_out / self.sigma

    def velocity(self, x: Tensor, t: int, label: Tensor | None, probe: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return v at timestep t, float64 (N, C, H, W), and its divergence, float64 (N,).

        `x`: float64 (N, C, H, W). `probe`: float64 like `x`, of entries 1 and -1, for Hutchinson's estimate
        probe . J probe, by a forward-mode derivative of the network. None: the exact divergence, by as many derivatives
        as an image has values.
        """
        dtype, channels = precision_of_weights(self.network), x.shape[1]
        timesteps = torch.full((len(x),), t, dtype=torch.int64, device=x.device)

        def predict(x_t: Tensor) -> Tensor:
            learned = self.diffusion.config.learned_variance
            return evaluate(self.network, x_t, timesteps, label, learned_variance=learned)[:, :channels]

        def derivative(direction: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.func.jvp(predict, (x.to(dtype),), (direction.to(dtype),))
            return both[0].double(), (direction * both[1].double()).sum((1, 2, 3))

        if probe is not None:
            out, trace = derivative(probe)
        else:
            trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            for basis in torch.eye(x[0].numel(), dtype=torch.float64, device=x.device):
                out, own = derivative(basis.reshape(x[:1].shape).expand_as(x))
                trace = trace + own
        a, b = float(self._from_x[t]), float(self._from_out[t])
        return a * x + b * out, a * x[0].numel() + b * trace

    def solve(self, x: Tensor, nodes: Sequence[int], label: Tensor | None = None, probe: Tensor | None = None) -> Flow:
        """Flow from timestep nodes[0] to nodes[-1], a step between each two; return the end.

        `x`: float64 (N, C, H, W). `nodes`: ascending. `label`, `probe`: as for `velocity`.
        """
        flow = Flow(x, torch.zeros(len(x), dtype=torch.float64, device=x.device))
        for start, end in pairwise(nodes):
            flow = self._step(flow, start, end, label, probe)
        return flow

    def _step(self, flow: Flow, start: int, end: int, label: Tensor | None, probe: Tensor | None) -> Flow:
        middle = self._middle(start, end)
        if middle is None:
            return self._heun(flow, start, end, label, probe)
        first, h = self.angles[start], self.angles[end] - self.angles[start]
        place = (self.angles[middle] - first) / h
        if not _MIDDLE[0] <= place <= _MIDDLE[1]:
            halfway = self._heun(flow, start, middle, label, probe)
            return self._heun(halfway, middle, end, label, probe)
        # The method of third order with stages at 0, `place` and 1; Kutta's own at 1/2.
        second_weight = 1 / (6 * place * (1 - place))
        third_weight = 0.5 - second_weight * place
        pull = 1 / (6 * third_weight * place)
        v1, div1 = self.velocity(flow.x, start, label, probe)
        v2, div2 = self.velocity(flow.x + h * place * v1, middle, label, probe)
        v3, div3 = self.velocity(flow.x + h * ((1 - pull) * v1 + pull * v2), end, label, probe)
        weights = (1 - second_weight - third_weight, second_weight, third_weight)
        return Flow(
            flow.x + h * (weights[0] * v1 + weights[1] * v2 + weights[2] * v3),
            flow.log_density + h * (weights[0] * div1 + weights[1] * div2 + weights[2] * div3),
        )

    def _heun(self, flow: Flow, start: int, end: int, label: Tensor | None, probe: Tensor | None) -> Flow:
        h = self.angles[end] - self.angles[start]
        v1, div1 = self.velocity(flow.x, start, label, probe)
        v2, div2 = self.velocity(flow.x + h * v1, end, label, probe)
        return Flow(flow.x + h * (v1 + v2) / 2, flow.log_density + h * (div1 + div2) / 2)

    def _middle(self, start: int, end: int) -> int | None:
        """Return the timestep between two others that is nearest to their middle in phi, None if there is none."""
        between = self.angles[start + 1 : end]
        if not len(between):
            return None
        return start + 1 + int(np.abs(between - (self.angles[start] + self.angles[end]) / 2).argmin())


def most_steps(timesteps: int) -> int:
    """Return the number of steps that use every one of T timesteps: each takes two more."""
    return max(1, (timesteps - 1) // 2)


def spread(angles: np.ndarray, steps: int) -> np.ndarray:
    """Return the timesteps, int64 (steps + 1,), between which to step: 0, .., T - 1.

    They are spread evenly in log(1 + phi / 0.05), rounded to timesteps, with at least one timestep between two.
    `angles`: float64 (T,). Raises `UsageError` for steps out of 1..(T - 1) / 2.
    """
    timesteps = len(angles)
    most = most_steps(timesteps)
    if not 1 <= steps <= most:
        raise UsageError(
            f"--ode-bits.steps must be in 1..{most}, half of the {timesteps} timesteps of the model; got {steps}"
        )
    places = np.log1p(angles / _DENSE_BELOW)
    wanted = np.interp(np.linspace(places[0], places[-1], steps + 1), places, np.arange(timesteps))
    nodes = [0]
    for i in range(1, steps):
        nodes.append(int(min(max(round(wanted[i]), nodes[-1] + 2), timesteps - 1 - 2 * (steps - i))))
    return np.array([*nodes, timesteps - 1], dtype=np.int64)
