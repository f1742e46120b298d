"""Guidance: classifier-free, by the gradient of a classifier, and what keeps a strong one in range."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError, refuse
from fastddpm.runtime.checks import guidance_problems

from .classifier import ClassifierGuidance

CondFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""cond_fn(x, t, label): the gradient of log p(label | x_t) with respect to x_t, float32 (N, C, H, W) like `x`.

It is called with gradients enabled. `x`: a copy of x_t that requires grad. `t`: int64 (N,). `label`: int64 (N,), or
None without labels. A factor on the result is the scale of the guidance. That of a trained classifier is
`Classifier.cond_fn`.
"""

Timesteps = TypeVar("Timesteps", np.ndarray, Tensor)


@dataclass(frozen=True)
class Guidance:
    """What a chain adds to the network's predictions.

    `scale`: of classifier-free guidance, w in u + w (c - u) for the prediction c with the label and u without (Ho and
    Salimans 2022); 1 means none. `interval`: (low, high), the first and last timestep of 0..T-1 with this guidance
    (Kynkäänniemi et al. 2024); at others the prediction is c. Default: all. `rescale`: phi in [0, 1] of `combine`.
    `dynamic_threshold`: p in (0, 1) of `thresholded`. Default: x_0 is clipped. `dynamic_threshold_max`: its largest s.
    Default: none. `cond_fn`: classifier guidance, `Correction`. Raises `UsageError` for values out of range, except the
    scale's (`check_chain`).
    """

    scale: float = 1.0
    interval: tuple[int, int] | None = None
    rescale: float = 0.0
    dynamic_threshold: float | None = None
    cond_fn: CondFn | None = None
    dynamic_threshold_max: float | None = None

    def __post_init__(self) -> None:
        refuse(guidance_problems(self.interval, self.rescale, self.dynamic_threshold, self.dynamic_threshold_max))
        if self.cond_fn is not None and not callable(self.cond_fn):
            raise UsageError(f"cond_fn must be a function of (x, t, label); got {self.cond_fn!r:.100}")

    @property
    def classes(self) -> int:
        """The number of classes that `cond_fn` guides to, 0 if it does not tell."""
        return self.cond_fn.num_classes if isinstance(self.cond_fn, ClassifierGuidance) else 0

    def check(self, diffusion: Diffusion, timesteps: np.ndarray, method: str, shape: tuple[int, int, int]) -> None:
        """Raise `UsageError` if a chain of `diffusion` through `timesteps`, of images of `shape`, cannot be guided so.

        `shape`: (C, H, W).
        """
        if isinstance(self.cond_fn, ClassifierGuidance):
            self.cond_fn.check(diffusion, shape)
        config, values = diffusion.config, (self.interval, self.rescale, self.dynamic_threshold)
        refuse(guidance_problems(*values, timesteps=config.timesteps, prediction=config.prediction, method=method))
        if self.cond_fn is not None and method != "ancestral" and not diffusion.alpha_bar[timesteps].all():
            raise UsageError(
                f"cond_fn with method {method} divides by sqrt(alpha_bar), which is 0 at timestep {timesteps[0]}; "
                "begin at an earlier one, or take method ancestral"
            )

    def inside(self, timesteps: Timesteps) -> Timesteps:
        """Return whether the interval holds each of `timesteps`, bool of the same shape."""
        low, high = (0, math.inf) if self.interval is None else self.interval
        return (low <= timesteps) & (timesteps <= high)

    def combine(self, both: Tensor, channels: int, scale: Tensor | None = None) -> Tensor:
        """Return the guided network output, (N, C, H, W) or (N, 2C, H, W), of `both`: (2N, ..), first those with label.

        The first `channels`, C, are extrapolated, g = u + w (c - u). With `rescale`, g is multiplied by
        phi std(c) / std(g) + 1 - phi, standard deviations over the C, H, W of each image: Lin, Liu, Li, Yang 2023,
        equations 15 and 16. That is done to the network's output, be it eps, x_0 or v, as in the paper, whose network
        predicts v, and in diffusers: the output is what guidance extrapolates, and what the network has learned the
        deviation of. The other channels, a learned variance, stay those of the class. `scale`: default that of `self`.
        """
        half = both.shape[0] // 2  # not chunk(2), from which torch.export cannot prove that the halves are equal
        conditional, unconditional = both[:half], both[half:]
        guided = unconditional + (self.scale if scale is None else scale) * (conditional - unconditional)
        if self.rescale:
            of_class, of_guided = _deviation(conditional[:, :channels]), _deviation(guided[:, :channels])
            ratio = torch.where(of_guided > 0, of_class / of_guided, 1.0)
            guided = (guided.float() * (self.rescale * ratio + (1 - self.rescale))).to(guided.dtype)
        guided[:, channels:] = conditional[:, channels:]
        return guided

    def settings(self) -> dict[str, Any]:
        """Return what else than the scale determines an image, for JSON; nothing by default.

        A classifier is told by the sha256 of its weights and its scale. Another `cond_fn` is named only: whether two of
        one name are the same is for the user to know.
        """
        found: dict[str, Any] = {}
        if self.scale != 1 and self.interval is not None:
            found["guidance_interval"] = [int(end) for end in self.interval]
        if self.scale != 1 and self.rescale:
            found["guidance_rescale"] = float(self.rescale)
        if self.dynamic_threshold is not None:
            found["dynamic_threshold"] = float(self.dynamic_threshold)
            if self.dynamic_threshold_max is not None:
                found["dynamic_threshold_max"] = float(self.dynamic_threshold_max)
        if isinstance(self.cond_fn, ClassifierGuidance):
            found |= self.cond_fn.settings()
        elif self.cond_fn is not None:
            function: Any = self.cond_fn
            while isinstance(function, functools.partial):
                function = function.func
            named = function if hasattr(function, "__qualname__") else type(function)
            found["cond_fn"] = f"{named.__module__}.{named.__qualname__}"
        return found

    def correction(
        self, diffusion: Diffusion, timesteps: np.ndarray, method: str, device: torch.device
    ) -> "Correction | None":
        """Return what is to be done about each step beside its network output, on `device`; None if nothing is."""
        if self.cond_fn is None and self.dynamic_threshold is None:
            return None
        config, process, bar = diffusion.config, diffusion.respaced(timesteps), diffusion.alpha_bar[timesteps]
        ancestral = method == "ancestral"
        low, high = np.log(np.maximum(process.variance, 1e-20)), np.log(process.beta)
        if not config.learned_variance:
            low = high = high if config.variance == "fixedlarge" else low
        from_gradient = np.zeros_like(bar) if ancestral else (1 - bar) / np.sqrt(bar)
        columns = (*(column[timesteps] for column in diffusion.x0_coefficients()), from_gradient, low, high)
        rows = torch.tensor(np.stack(columns, axis=1), dtype=torch.float32, device=device)
        return Correction(self, rows, ancestral=ancestral, variance=config.variance)


@dataclass(frozen=True)
class Correction:
    """Changes to a step that need x_t: the classifier's gradient, and dynamic thresholding.

    `rows`: float32 (S, 5), for each step x0_from_x and x0_from_out of `StepTable`, (1 - alpha_bar) / sqrt(alpha_bar),
    and the logarithms of the variance's lower and upper limit, which are equal if it is fixed. `ancestral`: the method.
    `variance`: of `DiffusionConfig`.

    Ancestral steps add variance * gradient to the mean: Dhariwal and Nichol 2021, algorithm 1. Other methods subtract
    sqrt(1 - alpha_bar) * gradient from eps, algorithm 2, which adds (1 - alpha_bar) / sqrt(alpha_bar) * gradient to the
    x_0 prediction, whatever the network predicts. x_0 is clipped, or thresholded, afterwards; the mean of an ancestral
    step is computed from a clipped x_0 and then moved.
    """

    guidance: Guidance
    rows: Tensor
    ancestral: bool
    variance: str

    @property
    def gives_x0(self) -> bool:
        """Whether the result of a call is the x_0 prediction, in place of what the network predicts."""
        return self.guidance.dynamic_threshold is not None or not self.ancestral

    def __call__(
        self, x: Tensor, out: Tensor, t: Tensor, label: Tensor | None, index: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the network output as `reverse_step` shall see it, like `out`, and what to add to its result, or None.

        `x`: x_t, float32 (N, C, H, W). `out`: (N, C, H, W) or (N, 2C, H, W). `t`, `label`: as the network gets them.
        `index`: int64 (1,), the row.
        """
        from_x, from_out, from_gradient, low, high = self.rows.index_select(0, index)[0]
        prediction, log_variance = out[:, : x.shape[1]].float(), out[:, x.shape[1] :].float()
        cond_fn, threshold = self.guidance.cond_fn, self.guidance.dynamic_threshold
        gradient, shift = None if cond_fn is None else gradient_of(cond_fn, x, t, label), None
        if gradient is not None and self.ancestral:
            learned = {"learned": log_variance, "learned_range": low + (high - low) * (log_variance + 1) / 2}
            shift = gradient * learned.get(self.variance, low).exp()
        if not self.gives_x0:
            return out, shift
        x0 = from_x * x + from_out * prediction
        if gradient is not None and not self.ancestral:
            x0 = x0 + from_gradient * gradient
        if threshold is not None:
            x0 = thresholded(x0, threshold, self.guidance.dynamic_threshold_max)
        return torch.cat([x0, log_variance], dim=1), shift


def gradient_of(cond_fn: CondFn, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Return cond_fn(x, t, label), float32 (N, C, H, W), called with gradients enabled and on copies.

    Raises `UsageError` for anything but a floating tensor like `x`, without NaN and infinity.
    """
    with torch.inference_mode(False), torch.enable_grad():
        copy = x.detach().clone().requires_grad_()
        gradient = cond_fn(copy, t.clone(), None if label is None else label.clone())
    if not isinstance(gradient, Tensor):
        raise UsageError(f"cond_fn must return a tensor {tuple(x.shape)}; got a {type(gradient).__name__}")
    if gradient.shape != x.shape or not gradient.is_floating_point() or gradient.device != x.device:
        raise UsageError(
            f"cond_fn must return the gradient with respect to x, floating {tuple(x.shape)} on {x.device}; got "
            f"{gradient.dtype} {tuple(gradient.shape)} on {gradient.device}"
        )
    gradient = gradient.detach().float()
    if not bool(torch.isfinite(gradient).all()):
        raise UsageError(f"cond_fn returned NaN or infinity at t = {int(t[0])}")
    return gradient


def thresholded(x0: Tensor, fraction: float, largest_s: float | None = None) -> Tensor:
    """Return x_0 predictions, float32 (N, C, H, W), clipped to [-s, s] and divided by s: Saharia et al. 2022, 2.3.

    s is 1 or, if larger, the quantile `fraction`, in (0, 1), of the image's |x_0|, interpolated linearly; it is at most
    `largest_s`, 1 or more. Default: no limit.
    """
    magnitudes = x0.abs().flatten(1)
    place = fraction * (magnitudes.shape[1] - 1)
    # The quantile lies between the two smallest of these. torch.quantile sorts all, and takes 2^24 values at most.
    largest = magnitudes.topk(magnitudes.shape[1] - math.floor(place), dim=1).values
    below, above = largest[:, -1], largest[:, max(largest.shape[1] - 2, 0)]
    s = torch.lerp(below, above, place % 1).clamp(min=1, max=largest_s).reshape(-1, 1, 1, 1)
    return torch.maximum(torch.minimum(x0, s), -s) / s


def _deviation(values: Tensor) -> Tensor:
    """Return the standard deviation of each image, float32 (N, 1, 1, 1)."""
    return values.float().std(dim=(1, 2, 3), correction=0, keepdim=True)
