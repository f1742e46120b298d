"""Bits per dimension: the variational bound of a data set, term by term (equation 5 of the paper).

One noise draw for each image and timestep, x_0 predictions clipped to [-1, 1], the decoder's normal CDF by tanh, as the
published figures were measured. The network is evaluated at (image, timestep) pairs, so its batches are full whatever
the number of images is; everything behind it is float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.data.dataset import Images
from fastddpm.data.order import epoch_order
from fastddpm.diffusion import Diffusion, Gaussian, decoder_bits, kl_bits
from fastddpm.errors import UsageError
from fastddpm.kernels.philox import STREAM_BOUND
from fastddpm.kernels.philox.reference import philox
from fastddpm.ops import random_normal
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup, all_gather_object
from fastddpm.sampling.sampler import Sampler

from .options import BitsOptions

Progress = Callable[[int, int], None]

BLOCK = 32  # images whose sums are taken together: the order of additions is the same for every batch and process
_BATCHES = 16  # at least, between two rests of pairs that fill no batch


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The bound on -log2 p(x_0) for each dimension, a mean over N images; float64 throughout.

    `total` is `prior` (L_T) + the sum of `terms` (T,), of which terms[0] is the decoder's (L_0 in the paper) and
    terms[t] the KL divergence of timestep t. `mse` (T,): mean squared error of the clipped x_0 prediction from x_t, in
    units of [-1, 1]. `per_image` (N,): the bound of each image; where only some timesteps were evaluated, an unbiased
    estimate of it. `indices` (N,): which images. `counts` (T,): images that each timestep was evaluated for. Standard
    errors, of the noise and of the choice of images and timesteps together, are NaN where one image cannot tell.
    """

    total: float
    standard_error: float
    prior: float
    terms: np.ndarray
    term_errors: np.ndarray
    mse: np.ndarray
    mse_errors: np.ndarray
    counts: np.ndarray
    indices: np.ndarray
    per_image: np.ndarray
    conditioning: str

    @property
    def decoder(self) -> float:
        """L_0: what the last step, to whole pixel values, costs."""
        return float(self.terms[0])

    @property
    def num_images(self) -> int:
        return len(self.indices)

    @property
    def evaluations(self) -> int:
        """How often the network was evaluated, for one image each."""
        return int(self.counts.sum())

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists, for JSON; NaN is None. Without what is known of each image."""
        numbers = {name: getattr(self, name) for name in ("total", "standard_error", "prior", "decoder")}
        lists = {name: getattr(self, name) for name in ("terms", "term_errors", "mse", "mse_errors", "counts")}
        return {
            **{name: or_none(value) for name, value in numbers.items()},
            **{name: [or_none(value) for value in values.tolist()] for name, values in lists.items()},
            "num_images": self.num_images,
            "evaluations": self.evaluations,
            "conditioning": self.conditioning,
        }


@dataclass(frozen=True, eq=False)
class Plan:
    """Which images, `indices` (N,), and which timesteps of each: 0, and offset + 1, offset + 1 + every, and so on.

    In each `every` images one behind the other there are all offsets, in an order drawn by Philox. So every timestep is
    as likely for an image as another, and the spread of the terms over t, much larger than that over images, stays out
    of the sum.
    """

    indices: np.ndarray
    offsets: np.ndarray
    every: int
    timesteps: int

    @staticmethod
    def of(num_images: int, timesteps: int, options: BitsOptions) -> "Plan":
        """For a data set of `num_images`; `UsageError` for more than it has, or too few for `every`."""
        wanted, every = options.images or num_images, options.every
        if wanted > num_images:
            raise UsageError(f"{wanted} images were asked for; the data set has {num_images}")
        if every > 1 and (every >= timesteps or wanted < 2 * every):
            raise UsageError(
                f"every {every} needs {every + 1} timesteps and {2 * every} images (each timestep is seen by two); "
                f"got {timesteps} and {wanted}"
            )
        indices = np.arange(num_images)
        if wanted < num_images:
            indices = epoch_order(num_images, options.seed, 0)[:wanted].copy()
        places = np.arange(-(-wanted // every) * every)
        keys = philox(np.zeros(1), places, np.array([timesteps]), np.array([STREAM_BOUND]), options.seed)[0]
        shuffled = keys.reshape(-1, every).argsort(axis=1, kind="stable")
        return Plan(indices, shuffled.reshape(-1)[:wanted], every, timesteps)

    def __len__(self) -> int:
        return len(self.indices)

    def evaluated(self) -> np.ndarray:
        """Images that each timestep is evaluated for, int64 (T,)."""
        by_offset = np.bincount(self.offsets, minlength=self.every)
        return np.append(len(self), by_offset[np.arange(self.timesteps - 1) % self.every])

    def places(self, blocks: Sequence[int]) -> np.ndarray:
        """Those of the images of some blocks."""
        return np.concatenate([np.arange(n * BLOCK, min((n + 1) * BLOCK, len(self))) for n in blocks])

    def num_pairs(self, places: np.ndarray) -> int:
        """How many `pairs` will be."""
        return int((1 - (1 + self.offsets[places] - self.timesteps) // self.every).sum())

    def pairs(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(image, t) of the images at `places`, (P,) each: image as a position in `places`; t ascends."""
        own = [np.append(0, np.arange(1 + offset, self.timesteps, self.every)) for offset in self.offsets[places]]
        rows, t = np.repeat(np.arange(len(places)), [len(each) for each in own]), np.concatenate(own)
        order = np.argsort(t, kind="stable")
        return rows[order], t[order]


def bits_per_dim(
    sampler: Sampler,
    images: Images,
    labels: np.ndarray | None,
    options: BitsOptions,
    batch: int,
    *,
    group: ProcessGroup = SINGLE_PROCESS,
    progress: Progress | None = None,
    known: Mapping[int, "ImageSums"] | None = None,
    keep: Callable[[int, "ImageSums"], None] | None = None,
) -> BitsPerDim:
    """The bound of `images`, uint8 (N, C, H, W), under the sampler's network and the whole T-step process.

    A network with classes is evaluated given `labels`, int64 (N,), without guidance; where there are none, as the
    network without a class. `batch`: pairs of image and timestep evaluated at once. Several processes (`group`, inside
    `distributed.process_group`) share the images, and each returns the whole result. `progress` is told how many pairs
    of this process are on their way, and how many it has to evaluate. `keep` is given each of this process's blocks by
    its number, and `known` the blocks that were kept: so an interrupted bound goes on, to the same bits. Noise is a
    function of (options.seed, index, t), and sums are always taken in the same order: the result depends neither on
    `batch` nor on the number of processes, beyond what the network's output does. Raises `UsageError` for a plan that
    cannot be, and for a network with classes that was never trained without.
    """
    plan = Plan.of(len(images), sampler.diffusion.timesteps, options)
    evaluator = _Evaluator(sampler, plan, images, labels, options.seed, batch, progress)
    mine = range(group.rank, -(-len(plan) // BLOCK), group.world_size)
    at_once = max(1, math.ceil(_BATCHES * batch * len(plan) / (BLOCK * plan.evaluated().sum())))
    calls = [mine[start : start + at_once] for start in range(0, len(mine), at_once)]
    blocks = {} if known is None else dict(known)
    # The images of a call are evaluated together or not at all, so the network sees the same batches after an
    # interruption.
    left = [numbers for numbers in calls if not blocks.keys() >= set(numbers)]
    evaluator.expect(left)
    for numbers in left:
        for number, block in evaluator.blocks(numbers).items():
            blocks[number] = block
            if keep:
                keep(number, block)
    for others in all_gather_object(blocks, group):
        blocks |= others
    return _summary(plan, [blocks[number] for number in sorted(blocks)], evaluator.conditioning)


@dataclass(frozen=True, eq=False)
class ImageSums:
    """Sums of up to 32 images, float64. `prior`, `decoder`, `rest` (n,): the three parts of each image's bound.

    `over_images` (4, T): at each timestep the sums of the terms, of their squares, of the squared errors, of theirs.
    """

    prior: np.ndarray
    decoder: np.ndarray
    rest: np.ndarray
    over_images: np.ndarray


class _Float64Diffusion(Diffusion):
    """The process with float64 tables on the device: a thousand small terms are added up."""

    def _table(self, name: str, values: np.ndarray, device: torch.device) -> Tensor:
        slot = (name, device)
        if slot not in self._tables:
            self._tables[slot] = torch.tensor(values, dtype=torch.float64, device=device)
        return self._tables[slot]


class _Evaluator:
    """Evaluates whole blocks of a plan's images."""

    def __init__(
        self,
        sampler: Sampler,
        plan: Plan,
        images: Images,
        labels: np.ndarray | None,
        seed: int,
        batch: int,
        progress: Progress | None,
    ) -> None:
        self.plan, self.images, self.batch = plan, images, batch
        self.labels, self.conditioning = _conditioning(sampler, labels, len(images))
        self.exact = _Float64Diffusion(sampler.diffusion.config)
        # The given one may take fewer steps, or be guided: the bound is of the trained process itself.
        self.sampler = Sampler(sampler.unet, sampler.diffusion, engine=sampler.engine)
        self.device = next(sampler.unet.parameters()).device
        self.seed = torch.tensor(seed, dtype=torch.int64, device=self.device)
        self.progress, self.done, self.total = progress, 0, 0

    def expect(self, groups: Sequence[Sequence[int]]) -> None:
        """Begin to tell the progress of these groups of blocks."""
        self.total = sum(self.plan.num_pairs(self.plan.places(group)) for group in groups)
        if self.progress is not None and self.total:
            self.progress(0, self.total)

    def blocks(self, numbers: Sequence[int]) -> dict[int, ImageSums]:
        """The sums of the blocks called `numbers`, their pairs evaluated together."""
        places = self.plan.places(numbers)
        rows, t = self.plan.pairs(places)
        prior, terms, errors = self._pairs(self.plan.indices[places], rows, t)
        blocks = {}
        for i, number in enumerate(numbers):
            own = rows // BLOCK == i
            blocks[number] = _block(
                prior[i * BLOCK : (i + 1) * BLOCK], rows[own] - i * BLOCK, t[own], terms[own], errors[own],
                self.plan.timesteps,
            )  # fmt: skip
        return blocks

    def _pairs(self, indices: np.ndarray, rows: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
        """L_T of the images at `indices`; the term and the squared x_0 error of each pair of a row and a t."""
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[indices])).to(self.device)
        labels = None if self.labels is None else torch.from_numpy(self.labels[indices]).to(self.device)
        numbers, image_of, timestep = (torch.from_numpy(values).to(self.device) for values in (indices, rows, t))
        found = []
        for start in range(0, len(t), self.batch):
            part = slice(start, start + self.batch)
            chosen = image_of[part]
            eps = self._noise(pixels.shape[1:], numbers[chosen], timestep[part], t[part])
            label = None if labels is None else labels[chosen]
            found.append(self._terms(pixels[chosen], timestep[part], eps, label, num_first=int((t[part] == 0).sum())))
            self.done += len(chosen)
            if self.progress is not None:
                self.progress(self.done, self.total)
        prior = self.exact.prior_term(pixels.to(torch.float64) / 127.5 - 1)
        terms, errors = (torch.cat(values).cpu().numpy() for values in zip(*found, strict=True))
        return prior.cpu().numpy(), terms, errors

    def _noise(self, shape: Sequence[int], images: Tensor, timestep: Tensor, t: np.ndarray) -> Tensor:
        """eps of each pair, float32 (N, *shape); those of one t are drawn at once. `t` is `timestep`, known here."""
        starts = np.flatnonzero(np.diff(t, prepend=-1))
        groups = zip(starts, np.append(starts[1:], len(t)), strict=True)
        return torch.cat([random_normal(shape, images[a:b], self.seed, timestep[a], STREAM_BOUND) for a, b in groups])

    @torch.no_grad()
    def _terms(
        self, pixels: Tensor, t: Tensor, eps: Tensor, label: Tensor | None, num_first: int
    ) -> tuple[Tensor, Tensor]:
        """The bound's terms and the squared x_0 errors, float64 (N,); the first `num_first` have t = 0."""
        x0 = pixels.to(torch.float64) / 127.5 - 1
        signal, sigma = (self.exact.at(name, t) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
        x_t = (signal * x0 + sigma * eps).to(torch.float32)
        out = self.sampler.denoise(x_t, t, label).contiguous()  # so that sums are in one order
        x_t = x_t.to(torch.float64)
        model, prediction = self.exact.p(out, x_t, t, clip=True)
        terms = kl_bits(self.exact.q_posterior(x0, x_t, t), model)
        if num_first:
            first = Gaussian(model.mean[:num_first], model.log_variance[:num_first])
            terms[:num_first] = decoder_bits(x0[:num_first], first)
        return terms, (prediction - x0).square().mean((1, 2, 3))


def _conditioning(sampler: Sampler, labels: np.ndarray | None, num_images: int) -> tuple[np.ndarray | None, str]:
    """The labels that the network gets, and what the likelihood is one of."""
    num_classes, null_label = sampler.unet.config.num_classes, sampler.unet.null_label
    if not num_classes:
        return None, "unconditional"
    if labels is not None:
        if labels.shape != (num_images,) or labels.min() < 0 or labels.max() >= num_classes:
            raise UsageError(f"labels must be {num_images} numbers in 0..{num_classes - 1}, one for each image")
        return np.ascontiguousarray(labels, dtype=np.int64), "given the class, without guidance"
    if null_label is None:
        raise UsageError("this network wants the class of each image, and the data set has none")
    return np.full(num_images, null_label, dtype=np.int64), "not told the class"


def _block(
    prior: np.ndarray, rows: np.ndarray, t: np.ndarray, terms: np.ndarray, errors: np.ndarray, timesteps: int
) -> ImageSums:
    later = t > 0
    over_images = [np.bincount(t, values, timesteps) for values in (terms, terms**2, errors, errors**2)]
    rest = np.bincount(rows[later], terms[later], len(prior))
    return ImageSums(prior, terms[~later], rest, np.stack(over_images))


def _summary(plan: Plan, blocks: Sequence[ImageSums], conditioning: str) -> BitsPerDim:
    prior, decoder, rest = (
        np.concatenate([getattr(block, name) for block in blocks]) for name in ("prior", "decoder", "rest")
    )
    counts = plan.evaluated()
    sums = np.sum([block.over_images for block in blocks], axis=0)
    terms, term_errors = _mean_and_error(sums[0], sums[1], counts)
    mse, mse_errors = _mean_and_error(sums[2], sums[3], counts)
    return BitsPerDim(
        total=float(prior.mean() + terms.sum()),
        standard_error=_error_of_total(plan, prior + decoder, rest),
        prior=float(prior.mean()),
        terms=terms,
        term_errors=term_errors,
        mse=mse,
        mse_errors=mse_errors,
        counts=counts,
        indices=plan.indices,
        per_image=prior + decoder + plan.every * rest,
        conditioning=conditioning,
    )


def _mean_and_error(total: np.ndarray, squares: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and their standard errors from sums over `counts` values."""
    mean = total / counts
    with np.errstate(invalid="ignore", divide="ignore"):
        return mean, np.sqrt(np.maximum(squares / counts - mean**2, 0.0) / (counts - 1))


def _error_of_total(plan: Plan, always: np.ndarray, rest: np.ndarray) -> float:
    """Of mean(always) + the sum, over the offsets, of the mean of `rest` over the images with that offset.

    That is a sum over offsets of means of rest + share x always, whose images are disjoint: their variances add up.
    """
    variance = 0.0
    for offset in range(plan.every):
        own = plan.offsets == offset
        count = int(own.sum())
        if count < 2:
            return math.nan
        variance += float(np.var(rest[own] + count / len(plan) * always[own], ddof=1)) / count
    return math.sqrt(variance)


def or_none(value: float) -> float | None:
    """For JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
