"""The options of all commands that draw images: reverse chain, noise and engine. Imports no torch."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes

from fastddpm.config import EngineConfig, Method, SampleConfig, Spacing
from fastddpm.errors import all_problems, problem, refuse
from fastddpm.runtime.checks import MAX_GUIDANCE
from fastddpm.runtime.progress import announced, log

if TYPE_CHECKING:
    import torch

    from fastddpm.pretrained.model import Model

    from .classifier import ClassifierGuidance
    from .sampler import Sampler


@dataclass(frozen=True)
class StepOptions:
    """Options of the steps of a reverse chain. Default: the run's."""

    method: Method | Literal["auto"] | None = None
    """Sampling method: ancestral (Algorithm 2), ddim, or DPM-Solver++(2M): dpm2m, with noise dpm2m-sde. auto: the one
    that suits the number of steps, with its spacing. Default: the run's."""
    steps: int | None = None
    """Steps of the chain, 1..T; fewer than T are spread over the timesteps as --spacing says. Default: the run's."""
    spacing: Spacing | None = None
    """Timesteps of a shorter chain: even; logsnr or karras, denser where the noise changes faster; or linspace,
    leading, trailing as in diffusers. Default: the run's."""
    eta: float | None = None
    """Noise of DDIM, from 0 (none, deterministic) to 1 (as much as ancestral sampling). Default: the run's."""
    steps_offset: int | None = None
    """Added to each timestep of spacing leading, as in diffusers. Default: the run's."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 means none. Default: the run's."""
    guidance_interval: tuple[int, int] | None = None
    """First and last timestep, of 0..T-1, with classifier-free guidance. At the others the network is evaluated once,
    not twice. 0 and T-1: all. Default: the run's."""
    guidance_rescale: float | None = None
    """Bring the standard deviation of the guided prediction back to that of the class's, from 0 (not at all) to 1
    (fully). Default: the run's."""
    dynamic_threshold: float | None = None
    """Dynamic thresholding of x_0 predictions: clip them to [-s, s] and divide by s, where s is this quantile, in
    (0, 1), of the image's |x_0|, at least 1. 0: none, clip to [-1, 1]. Default: the run's."""
    dynamic_threshold_max: float | None = None
    """Largest s of dynamic thresholding, 1 or more. Default: the run's, or none with --dynamic-threshold."""
    clip_x0: Literal["on", "off"] | None = None
    """Clip x_0 predictions to [-1, 1]. Default: the model's."""

    def __post_init__(self) -> None:
        SampleConfig(**{"method": "ddim", **self._given()})  # raises UsageError for values that suit no run

    def _given(self) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(SampleConfig)} - {"count"}
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if given.get("method") == "auto":  # resolved once the number of timesteps is known
            del given["method"]
        if "dynamic_threshold" in given:
            given["dynamic_threshold"] = given["dynamic_threshold"] or None
            given.setdefault("dynamic_threshold_max", None)  # a run's is of its threshold
        if given.get("method", "ddim") != "ddim":
            given.setdefault("eta", 0.0)  # a run's eta is of its ddim
        return given

    def _config(self, model: "Model", report: Callable[[str], None], *, multistep: bool) -> SampleConfig:
        """Return the run's sampling with what is given. Without `multistep`, a run's DPM-Solver++ becomes ancestral."""
        from .spacing import method_for
        from .step_table import MULTISTEP

        own, given = model.preset.sample, self._given()
        if self.method == "auto":
            steps = given.get("steps", own.steps) or model.diffusion.timesteps
            method, spacing = method_for(steps, multistep=multistep)
            given = {"method": method, "spacing": spacing, "eta": 0.0} | given
        elif self.method is None and own.method in MULTISTEP and not multistep:
            report(f"note: the run's method {own.method} does not go with this; it is ancestral here (--method)")
            given = {"method": "ancestral", "spacing": "even"} | given
        return dataclasses.replace(own, **given)

    def sampler(
        self, model: "Model", report: Callable[[str], None] = log, *, multistep: bool = True, **options: Any
    ) -> "Sampler":
        """Return a sampler of `model` with these options and `options`; `report` gets notes on them.

        `multistep`: whether DPM-Solver++ may be chosen where no method is named. Raises `UsageError` for values out of
        range.
        """
        from fastddpm.diffusion import Diffusion

        from .sampler import Sampler

        config, diffusion = self._config(model, report, multistep=multistep), model.diffusion
        if self.clip_x0 is not None:
            diffusion = Diffusion(dataclasses.replace(diffusion.config, clip_x0=self.clip_x0 == "on"))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sampler = Sampler(
                model.unet, diffusion, config.steps, config.method, config.eta,
                **config.spacing_options(), **config.guidance_options(), **options,
            )  # fmt: skip
        for warning in said:
            report(f"note: {warning.message}")
        if self.steps_offset and config.spacing != "leading":
            report("note: --steps-offset is without effect; it is of --spacing leading")
        if self.dynamic_threshold_max is not None and config.dynamic_threshold is None:
            report("note: --dynamic-threshold-max is without effect; add --dynamic-threshold 0.995")
        if config.guidance == 1:
            given = {"--guidance-interval": self.guidance_interval, "--guidance-rescale": self.guidance_rescale}
            idle = [name for name, value in given.items() if value]
            if idle:
                report(f"note: {' and '.join(idle)} without effect, because guidance 1 means none; add --guidance 2")
        return sampler


@dataclass(frozen=True)
class ChainOptions(StepOptions):
    """Options of the reverse chain. Default of all but classifier, noise and engine: the run's."""

    classifier: Path | None = None
    """Guide the chain by a classifier of noisy images: the directory that python -m fastddpm.classifier trained it in,
    or one of its checkpoints. --guidance 0: by it alone, without the class in the network. Default: none."""
    classifier_scale: float = 1.0
    """Scale of the classifier's gradient, 0 or more."""
    noise_seed: int = 0
    """64-bit key of all noise. Another key draws another image for every seed."""
    engine: Annotated[EngineConfig, OmitArgPrefixes] = dataclasses.field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if not 0 <= self.classifier_scale <= MAX_GUIDANCE:
            yield f"classifier_scale must be in 0..{MAX_GUIDANCE:g}; got {self.classifier_scale}"
        if self.classifier_scale != 1 and self.classifier is None:
            yield "classifier_scale is of a classifier; name one with --classifier"

    def sampler(
        self, model: "Model", report: Callable[[str], None] = log, *, multistep: bool = True, **options: Any
    ) -> "Sampler":
        """Return a sampler of `model` as that of `StepOptions`; also raises what reading the classifier raises."""
        own = {"seed": self.noise_seed, "engine": self.engine, "cond_fn": self._cond_fn(model, report)}
        return super().sampler(model, report, multistep=multistep, **own | options)

    def _cond_fn(self, model: "Model", report: Callable[[str], None]) -> "ClassifierGuidance | None":
        """Return the guidance by --classifier, on the device of the model; None without one."""
        if self.classifier is None:
            return None
        from fastddpm.runtime.network import device_of

        from .classifier import Classifier

        with announced(f"reading {self.classifier}", report):
            classifier = Classifier.from_pretrained(self.classifier, device_of(model.unet))
        return classifier.cond_fn(self.classifier_scale)

    def open(
        self,
        checkpoint: Path,
        device: "torch.device",
        batch: int | None,
        report: Callable[[str], None] = log,
        *,
        multistep: bool = True,
        check: "Callable[[Model], None] | None" = None,
    ) -> "tuple[Model, Sampler, int]":
        """Load the model at `checkpoint` onto `device`; return it, its sampler and the batch size.

        `batch`: images evaluated at once. None: as many as memory holds, at most 512 on a GPU and 64 on a CPU.
        `report` gets notes on the options. `multistep`: of `sampler`. `check`: raises `UsageError` for other options
        that do not fit the model, which are refused together with those of the chain.
        """
        from fastddpm.pretrained import load

        from . import batch_size

        model = load(checkpoint, device)
        sampler: Sampler | None = None
        with all_problems():
            with problem():
                sampler = self.sampler(model, report, multistep=multistep)
            if check is not None:
                check(model)
        assert sampler is not None  # otherwise the block has raised
        return model, sampler, batch or batch_size.choose(sampler.probe, model.unet.config, device)
