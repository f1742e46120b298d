"""Bits per dimension: the variational bound of a data set, term by term (equation 5 of the paper).

As for the published numbers, there is one noise draw per image and timestep, x_0 predictions are clipped to [-1, 1],
and the decoder's normal CDF is approximated by tanh. The network is evaluated in batches of (image, timestep) pairs,
which are full whatever the number of images is. Everything after the network is float64.
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
"""Takes the number of evaluated pairs and the total number."""

BLOCK = 32  # images whose terms are summed together, which fixes the order of additions for any batch and process
_BATCHES = 16  # least number of full batches before one may be only partly filled


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The bound on -log2 p(x_0) per dimension, averaged over N images; float64.

    `total` = `prior` (L_T) + the sum of `terms` (T,); terms[0] is the decoder's term (L_0 in the paper) and terms[t]
    the KL divergence of timestep t. `mse` (T,): mean squared error of the clipped x_0 prediction from x_t, in units of
    [-1, 1] squared. `counts` (T,): number of images that each timestep was evaluated for. `indices` (N,): the images.
    `per_image` (N,): the bound of each image, an unbiased estimate of it if only some timesteps were evaluated.
    `conditioning`: how the network was told the class. `standard_error`, `term_errors` and `mse_errors`: standard
    errors, which include the noise and the choice of images and timesteps; NaN if there are too few images.
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
        """L_0, the term of the last step, which gives integer pixel values."""
        return float(self.terms[0])

    @property
    def num_images(self) -> int:
        return len(self.indices)

    @property
    def evaluations(self) -> int:
        """The number of network evaluations, each of one image at one timestep."""
        return int(self.counts.sum())

    def to_dict(self) -> dict[str, Any]:
        """Return numbers and lists for JSON, with None for NaN, without the arrays over images."""
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
    """The images, `indices` (N,), and the timesteps of each: 0, and offset + 1, offset + 1 + every, and so on.

    Each run of `every` consecutive images contains each of the `offsets` (N,) once, in a random (Philox) order. Every
    timestep is therefore equally likely for an image, and the variance of the terms over t, which is much larger than
    that over images, does not enter the sum.
    """

    indices: np.ndarray
    offsets: np.ndarray
    every: int
    timesteps: int

    @staticmethod
    def of(num_images: int, timesteps: int, options: BitsOptions) -> "Plan":
        """Return the plan for a data set of `num_images`.

        Raises `UsageError` if `options` asks for more images than there are, or too few for `every`.
        """
        wanted, every = options.images or num_images, options.every
        if wanted > num_images:
            raise UsageError(f"--bits.images must be at most {num_images}, the size of the data set; got {wanted}")
        if every > 1 and every >= timesteps:
            raise UsageError(
                f"--bits.every must be below {timesteps}, the number of timesteps of the model; got {every}"
            )
        if wanted < 2 * every and every > 1:
            given = f"--bits.images is {wanted}" if options.images else f"the data set has {wanted}"
            more = f"use --bits.images {2 * every} or more, or" if 2 * every <= num_images else "use"
            most = f"--bits.every {wanted // 2} or less" if wanted >= 4 else "--bits.every 1"
            raise UsageError(
                f"too few images for --bits.every {every}: it needs {2 * every}, two for each timestep, and {given}; "
                f"{more} {most}"
            )
        indices = np.arange(num_images)
        if wanted < num_images:
            indices = epoch_order(num_images, options.seed, 0)[:wanted].copy()
        positions = np.arange(-(-wanted // every) * every)
        keys = philox(np.zeros(1), positions, np.array([timesteps]), np.array([STREAM_BOUND]), options.seed)[0]
        shuffled = keys.reshape(-1, every).argsort(axis=1, kind="stable")
        return Plan(indices, shuffled.reshape(-1)[:wanted], every, timesteps)

    def __len__(self) -> int:
        return len(self.indices)

    def evaluated(self) -> np.ndarray:
        """Return the number of images that each timestep is evaluated for, int64 (T,)."""
        by_offset = np.bincount(self.offsets, minlength=self.every)
        return np.append(len(self), by_offset[np.arange(self.timesteps - 1) % self.every])

    def positions(self, blocks: Sequence[int]) -> np.ndarray:
        """Return the positions in the plan of the images of the blocks with these numbers."""
        return np.concatenate([np.arange(n * BLOCK, min((n + 1) * BLOCK, len(self))) for n in blocks])

    def num_pairs(self, positions: np.ndarray) -> int:
        """Return the number of pairs that `pairs` will return."""
        return int((1 - (1 + self.offsets[positions] - self.timesteps) // self.every).sum())

    def pairs(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (row, t) of all pairs of the images at `positions`, (P,) each; row indexes `positions`, t ascends."""
        own = [np.append(0, np.arange(1 + offset, self.timesteps, self.every)) for offset in self.offsets[positions]]
        rows, t = np.repeat(np.arange(len(positions)), [len(each) for each in own]), np.concatenate(own)
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
    """Return the bound of `images`, uint8 (N, C, H, W), under the sampler's network and all T steps of the process.

    `labels`, int64 (N,) or None: a network with classes is given them, without guidance; without labels it gets its
    null label. `batch`: (image, timestep) pairs evaluated at once. `group`: processes that share the images, inside
    `distributed.process_group`; each returns the whole result. Default: this process alone. `progress` counts the pairs
    of this process. `keep` is called with the number and the sums of each block of 32 images that this process
    finishes; passed back as `known`, they let an interrupted evaluation go on to the same bits.

    Noise is a function of (options.seed, index, t), and sums are always taken in the same order. The result depends on
    `batch` and on the number of processes only as far as the network's output does. Raises `UsageError` for options
    that do not fit the data set, and if labels are missing for a network without a null label.
    """
    plan = Plan.of(len(images), sampler.diffusion.timesteps, options)
    evaluator = _Evaluator(sampler, plan, images, labels, options.seed, batch, progress)
    own_blocks = range(group.rank, -(-len(plan) // BLOCK), group.world_size)
    at_once = max(1, math.ceil(_BATCHES * batch * len(plan) / (BLOCK * plan.evaluated().sum())))
    calls = [own_blocks[start : start + at_once] for start in range(0, len(own_blocks), at_once)]
    sums = {} if known is None else dict(known)
    # The blocks of a call are evaluated together or not at all, so the network sees the same batches after an
    # interruption.
    left = [blocks for blocks in calls if not sums.keys() >= set(blocks)]
    evaluator.expect(left)
    with evaluator.sampler.unchanging():
        for blocks in left:
            for number, block_sums in evaluator.evaluate(blocks).items():
                sums[number] = block_sums
                if keep:
                    keep(number, block_sums)
    for others in all_gather_object(sums, group):
        sums |= others
    return _summary(plan, [sums[number] for number in sorted(sums)], evaluator.conditioning)


@dataclass(frozen=True, eq=False)
class ImageSums:
    """The terms of a block of up to 32 images, summed over timesteps and over images; float64.

    `prior`, `decoder`, `rest` (n,): L_T, L_0 and the sum of the evaluated terms with t > 0, of each image.
    `over_images` (4, T): sums over the images, at each timestep, of the terms, of their squares, of the squared x_0
    errors, and of the squares of these errors.
    """

    prior: np.ndarray
    decoder: np.ndarray
    rest: np.ndarray
    over_images: np.ndarray


class Float64Diffusion(Diffusion):
    """The process with float64 tables on the device, because a thousand small terms are added up."""

    def _table(self, name: str, values: np.ndarray, device: torch.device) -> Tensor:
        slot = (name, device)
        if slot not in self._tables:
            self._tables[slot] = torch.tensor(values, dtype=torch.float64, device=device)
        return self._tables[slot]


class _Evaluator:
    """Evaluates the terms of blocks of a plan's images."""

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
        self.labels, self.conditioning = conditioning(sampler, labels, len(images))
        self.exact = Float64Diffusion(sampler.diffusion.config)
        # The given sampler may take fewer steps or use guidance; the bound is that of the trained process.
        self.sampler = sampler.unguided()
        self.device = sampler.device
        self.seed = torch.tensor(seed, dtype=torch.int64, device=self.device)
        self.progress, self.done, self.total = progress, 0, 0

    def expect(self, calls: Sequence[Sequence[int]]) -> None:
        """Set the total of `progress` to the pairs of all blocks in `calls`, and report the start."""
        self.total = sum(self.plan.num_pairs(self.plan.positions(blocks)) for blocks in calls)
        if self.progress is not None and self.total:
            self.progress(0, self.total)

    def evaluate(self, blocks: Sequence[int]) -> dict[int, ImageSums]:
        """Return the sums of the blocks with these numbers, evaluating their pairs together."""
        positions = self.plan.positions(blocks)
        rows, t = self.plan.pairs(positions)
        prior, terms, errors = self._pairs(self.plan.indices[positions], rows, t)
        sums = {}
        for i, number in enumerate(blocks):
            own = rows // BLOCK == i
            sums[number] = _sums(
                prior[i * BLOCK : (i + 1) * BLOCK], rows[own] - i * BLOCK, t[own], terms[own], errors[own],
                self.plan.timesteps,
            )  # fmt: skip
        return sums

    def _pairs(self, indices: np.ndarray, rows: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return L_T of the images at `indices`, and the term and squared x_0 error of each pair (row, t)."""
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
        """Draw eps of each pair, float32 (N, *shape), one call per timestep. `t`: `timestep` on the host."""
        starts = np.flatnonzero(np.diff(t, prepend=-1))
        groups = zip(starts, np.append(starts[1:], len(t)), strict=True)
        return torch.cat([random_normal(shape, images[a:b], self.seed, timestep[a], STREAM_BOUND) for a, b in groups])

    @torch.no_grad()
    def _terms(
        self, pixels: Tensor, t: Tensor, eps: Tensor, label: Tensor | None, num_first: int
    ) -> tuple[Tensor, Tensor]:
        """Return the bound's terms and the squared x_0 errors, float64 (N,); the first `num_first` pairs have t = 0."""
        x0 = pixels.to(torch.float64) / 127.5 - 1
        signal, sigma = (self.exact.at(name, t) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
        x_t = (signal * x0 + sigma * eps).to(torch.float32)
        out = self.sampler.denoise(x_t, t, label).contiguous()  # a fixed layout fixes the order of the sums below
        x_t = x_t.to(torch.float64)
        model, prediction = self.exact.p(out, x_t, t, clip=True)
        terms = kl_bits(self.exact.q_posterior(x0, x_t, t), model)
        if num_first:
            first = Gaussian(model.mean[:num_first], model.log_variance[:num_first])
            terms[:num_first] = decoder_bits(x0[:num_first], first)
        return terms, (prediction - x0).square().mean((1, 2, 3))


def conditioning(sampler: Sampler, labels: np.ndarray | None, num_images: int) -> tuple[np.ndarray | None, str]:
    """Return the labels that the network is given, and a description for `BitsPerDim.conditioning`."""
    num_classes, null_label = sampler.interface.num_classes, sampler.interface.null_label
    if not num_classes:
        return None, "unconditional"
    if labels is not None:
        if labels.shape != (num_images,) or labels.min() < 0 or labels.max() >= num_classes:
            raise UsageError(f"labels must be {num_images} numbers in 0..{num_classes - 1}, one per image")
        return np.ascontiguousarray(labels, dtype=np.int64), "given the class, without guidance"
    if null_label is None:
        raise UsageError("this network needs the class of each image, and the data set has no labels")
    return np.full(num_images, null_label, dtype=np.int64), "not told the class"


def _sums(
    prior: np.ndarray, rows: np.ndarray, t: np.ndarray, terms: np.ndarray, errors: np.ndarray, timesteps: int
) -> ImageSums:
    """Return the sums of a block from the terms and errors of its pairs (row, t)."""
    later = t > 0
    over_images = [np.bincount(t, values, timesteps) for values in (terms, terms**2, errors, errors**2)]
    rest = np.bincount(rows[later], terms[later], len(prior))
    return ImageSums(prior, terms[~later], rest, np.stack(over_images))


def _summary(plan: Plan, sums: Sequence[ImageSums], conditioning: str) -> BitsPerDim:
    """Return the result from the sums of all blocks, in order."""
    prior, decoder, rest = (
        np.concatenate([getattr(block_sums, name) for block_sums in sums]) for name in ("prior", "decoder", "rest")
    )
    counts = plan.evaluated()
    total = np.sum([block_sums.over_images for block_sums in sums], axis=0)
    terms, term_errors = _mean_and_error(total[0], total[1], counts)
    mse, mse_errors = _mean_and_error(total[2], total[3], counts)
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
    """Return means and their standard errors, from sums of `counts` values and of their squares."""
    mean = total / counts
    with np.errstate(invalid="ignore", divide="ignore"):
        return mean, np.sqrt(np.maximum(squares / counts - mean**2, 0.0) / (counts - 1))


def _error_of_total(plan: Plan, always: np.ndarray, rest: np.ndarray) -> float:
    """Return the standard error of mean(always) + the sum over offsets of the mean of `rest` over that offset's images.

    This is a sum over offsets of the means of rest + share * always. The offsets' images are disjoint, so the variances
    of the means add up.
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
    """Return `value`, or None if it is NaN or infinite, which JSON cannot hold."""
    return value if math.isfinite(value) else None
