"""Bits per dimension by the probability-flow ODE: the likelihood of the model itself, where the bound bounds it.

The ODE gives the density of x at the first noise level, t = 0. How integer pixels become such an x is a choice:

uniform  x = alpha_0 (x_0 + u), u uniform in the pixel's bin, 2/255 wide: the bits of the model whose images are
         x / alpha_0, which are -log2 p(x) - D log2(alpha_0 2/255), with D the number of values.
decoder  x = alpha_0 x_0 + sigma_0 eps, and x_0 is decoded from it as in the bound (equation 13): the bound with the
         exact density of x in place of L_T and of the terms of t > 0. -log2 p(x_0 | x) - log2 p(x) + log2 q(x | x_0).

Both are upper bounds of the model's bits, by Jensen's inequality over u or eps, and exact in the ODE.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.data.dataset import Images
from fastddpm.data.order import epoch_order
from fastddpm.diffusion import decoder_bits
from fastddpm.kernels.philox import STREAM_FLOW
from fastddpm.kernels.philox.eager import normals, per_image_words
from fastddpm.sampling.isolation import evaluating, isolated
from fastddpm.sampling.sampler import Sampler

from .bits_per_dim import Float64Diffusion, conditioning, or_none
from .options import OdeBitsOptions
from .probability_flow import STAGES, ProbabilityFlow, most_steps, spread

BLOCK = 32  # images that are kept together when an evaluation is interrupted
_STEPS = 100  # of the solver, unless the options say otherwise
_LOG_2 = math.log(2.0)
_BIN = 2 / 255


@dataclass(frozen=True, eq=False)
class OdeBits:
    """Bits per dimension of N images by the ODE; float64.

    `total`: the mean. `standard_error`: over the images, which includes the draws, as they differ between images; NaN
    for one image. `draws_error`: the part of it that more draws would remove; NaN for one draw. `per_image` (N,): means
    over the draws. `indices` (N,): the images. `halved_difference`: mean of the bits with all steps minus those with
    half as many, over the first images, same draws; the error of the solver is about a seventh of it. NaN if there is
    one step. `steps`: of the solver. `conditioning`: how the network was told the class.
    """

    total: float
    standard_error: float
    draws_error: float
    per_image: np.ndarray
    indices: np.ndarray
    halved_difference: float
    steps: int
    conditioning: str

    def to_dict(self) -> dict[str, Any]:
        """Return numbers for JSON, with None for NaN."""
        names = ("total", "standard_error", "draws_error", "halved_difference")
        numbers = {name: or_none(getattr(self, name)) for name in names}
        return {**numbers, "steps": self.steps, "num_images": len(self.indices), "conditioning": self.conditioning}


class OdeEvaluator:
    """Evaluates images of a data set, uint8 (N, C, H, W), by the ODE of the sampler's network, without guidance.

    `labels`, int64 (N,) or None: as for `bits_per_dim`. `batch`: pairs of image and draw evaluated at once. Draws are
    functions of (options.seed, index, draw): results depend on `batch` as far as the network's output does. Raises
    `UsageError` for options that do not fit the data or the model.
    """

    def __init__(
        self, sampler: Sampler, images: Images, labels: np.ndarray | None, options: OdeBitsOptions, batch: int
    ) -> None:
        self.images, self.options, self.batch, self.device = images, options, batch, sampler.device
        self.labels, self.conditioning = conditioning(sampler, labels, len(images))
        self.network, self.diffusion = sampler.network, Float64Diffusion(sampler.diffusion.config)
        self.flow = ProbabilityFlow(sampler.network, self.diffusion)
        self.indices = chosen_images(len(images), options)
        self.steps = options.steps or min(_STEPS, most_steps(self.diffusion.timesteps))
        self.nodes = spread(self.flow.angles, self.steps)
        self.halved = np.unique(np.append(self.nodes[::2], self.nodes[-1]))

    def blocks(self) -> list[np.ndarray]:
        """Return the positions, in `indices`, of the images of each block."""
        positions = np.arange(len(self.indices))
        return [positions[start : start + BLOCK] for start in range(0, len(positions), BLOCK)]

    def evaluate(
        self, positions: np.ndarray, nodes: np.ndarray, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Return the bits per dimension, float64 (n, draws), of the images at `positions`, stepping through `nodes`.

        `progress` is called with the number of evaluations of the network that a batch has taken.
        """
        draws = self.options.draws
        rows = [(int(index), draw) for index in self.indices[positions] for draw in range(draws)]
        found = []
        with isolated(self.device), evaluating(self.network):
            for start in range(0, len(rows), self.batch):
                part = rows[start : start + self.batch]
                found.append(self._bits([index for index, _ in part], [draw for _, draw in part], nodes))
                if progress is not None:
                    progress(len(part) * STAGES * (len(nodes) - 1))
        return np.concatenate(found).reshape(len(positions), draws)

    def _bits(self, indices: list[int], draws: list[int], nodes: np.ndarray) -> np.ndarray:
        chosen = np.array(indices)
        # A data set that is a memory map or a pack takes each index once, in order.
        unique, where = np.unique(chosen, return_inverse=True)
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[unique][where])).to(self.device)
        label = None if self.labels is None else torch.from_numpy(self.labels[chosen]).to(self.device)
        x0 = pixels.double() / 127.5 - 1
        alpha, sigma = float(self.flow.alpha[0]), float(self.flow.sigma[0])
        size = x0[0].numel()
        if self.options.end == "uniform":
            x = alpha * (x0 + _BIN * (self._uniforms(x0, chosen, draws) - 0.5))
            beside = torch.full_like(x[:, 0, 0, 0], -size * math.log(alpha * _BIN))
        else:
            eps = self._noise(x0, chosen, draws)
            x = alpha * x0 + sigma * eps
            beside = -0.5 * (eps.square() + math.log(2 * math.pi * sigma**2)).sum((1, 2, 3))
            beside = beside + size * _LOG_2 * self._decoded(x0, x, label)
        probe = None if self.options.exact_trace else self._signs(x0, chosen, draws)
        flow = self.flow.solve(x, nodes.tolist(), label, probe)
        prior = -0.5 * (flow.x.square() + math.log(2 * math.pi)).sum((1, 2, 3))
        return ((beside - prior - flow.log_density) / (size * _LOG_2)).cpu().numpy()

    def _decoded(self, x0: Tensor, x: Tensor, label: Tensor | None) -> Tensor:
        """Return the bits per dimension of x_0 decoded from x, float64 (N,), as in the bound's term at t = 0."""
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        arguments = (x.float(), t) if label is None else (x.float(), t, label)
        model, _ = self.diffusion.p(self.network(*arguments), x, t, clip=True)
        return decoder_bits(x0, model)

    def _words(self, like: Tensor, indices: np.ndarray, draws: list[int], purpose: int) -> tuple[Tensor, Tensor]:
        """Return two 32-bit words for each value of images like `like`, int64 (N, C, H, W) each."""
        images, seed, step = self._counter(indices, draws, purpose)
        first, second, _, _ = per_image_words(like[0].numel(), images, seed, step, STREAM_FLOW)
        return first.reshape(like.shape), second.reshape(like.shape)

    def _counter(self, indices: np.ndarray, draws: list[int], purpose: int) -> tuple[Tensor, Tensor, Tensor]:
        step = 2 * torch.tensor(draws, dtype=torch.int64, device=self.device) + purpose
        seed = torch.tensor(self.options.seed, dtype=torch.int64, device=self.device)
        return torch.from_numpy(indices).to(self.device), seed, step

    def _uniforms(self, like: Tensor, indices: np.ndarray, draws: list[int]) -> Tensor:
        return self._words(like, indices, draws, 0)[0] * 2.0**-32 + 2.0**-33

    def _signs(self, like: Tensor, indices: np.ndarray, draws: list[int]) -> Tensor:
        return 1.0 - 2.0 * (self._words(like, indices, draws, 1)[0] >= 2**31).double()

    def _noise(self, like: Tensor, indices: np.ndarray, draws: list[int]) -> Tensor:
        images, seed, step = self._counter(indices, draws, 0)
        return normals(like[0].numel(), images, seed, step, STREAM_FLOW).double().reshape(like.shape)


def chosen_images(num_images: int, options: OdeBitsOptions) -> np.ndarray:
    """Return the indices of the images to evaluate, the same that the bound of as many and of this seed takes."""
    return epoch_order(num_images, options.seed, 0)[: options.images].copy()


def ode_bits_per_dim(
    sampler: Sampler, images: Images, labels: np.ndarray | None, options: OdeBitsOptions, batch: int
) -> OdeBits:
    """Return the bits per dimension of images, uint8 (N, C, H, W), by the ODE; arguments as for `OdeEvaluator`."""
    evaluator = OdeEvaluator(sampler, images, labels, options, batch)
    blocks = evaluator.blocks()
    bits = [evaluator.evaluate(block, evaluator.nodes) for block in blocks]
    halved = evaluator.evaluate(blocks[0], evaluator.halved)
    return summary(evaluator, bits, halved)


def summary(evaluator: OdeEvaluator, bits: Sequence[np.ndarray], halved: np.ndarray) -> OdeBits:
    """Return the result from the bits of each block, (n, draws), and those of the first with half of the steps."""
    whole = np.concatenate(bits)
    count, draws = whole.shape
    means = whole.mean(1)
    return OdeBits(
        total=float(means.mean()),
        standard_error=float(means.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
        draws_error=math.sqrt(float(whole.var(1, ddof=1).sum()) / draws) / count if draws > 1 else math.nan,
        per_image=means,
        indices=evaluator.indices,
        halved_difference=float((bits[0] - halved).mean()) if evaluator.steps > 1 else math.nan,
        steps=evaluator.steps,
        conditioning=evaluator.conditioning,
    )
