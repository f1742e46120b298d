"""What is known of a model: data, network, training, scores. Model cards and pages of runs are written from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastddpm.config import DiffusionConfig, Preset, UNetConfig
from fastddpm.errors import DataError
from fastddpm.presets import PRESETS
from fastddpm.runtime.image_size import size_text
from fastddpm.storage.documents import difference, read_object
from fastddpm.unet import meta_network

from .scores import FILE, Score, read_scores

# Names of configurations from other implementations' files, which do not tell the training.
DIFFUSERS, CONVERTED = "diffusers", "converted"
OWN = "own"  # of a model made in Python, whose training is not known either
_PREDICTIONS = {"eps": "the noise ε", "x0": "x_0", "xprev": "the mean of x_{t-1}", "v": "v"}
_LOSSES = {"simple": "L_simple", "vlb": "the variational bound", "hybrid": "L_hybrid", "min_snr": "min-SNR weighted"}
_VARIANCES = {
    "fixedlarge": "β_t (fixedlarge)",
    "fixedsmall": "the posterior's (fixedsmall)",
    "learned": "learned",
    "learned_range": "learned between β_t and the posterior's",
}


@dataclass(frozen=True)
class TrainingSet:
    """The images that a model was trained on. `source`: what --data named, None for the embedded digits.

    `images`: their number. `classes`: names of the classes. Both are None if unknown.
    """

    name: str
    checksum: str
    source: str | None = None
    classes: tuple[str, ...] | None = None
    images: int | None = None

    @staticmethod
    def of(document: object) -> "TrainingSet | None":
        """Return what a data.json, or the data of a start in environment.json, tells; None if it is damaged."""
        if not isinstance(document, Mapping):
            return None
        name, checksum, source, classes, images = (
            document.get(field) for field in ("name", "checksum", "source", "classes", "images")
        )
        if not isinstance(name, str) or not isinstance(checksum, str):
            return None
        named = isinstance(classes, list) and all(isinstance(item, str) for item in classes)
        return TrainingSet(
            name,
            checksum,
            source if isinstance(source, str) else None,
            tuple(classes) if named and isinstance(classes, list) else None,
            images if type(images) is int else None,
        )


@dataclass(frozen=True)
class Facts:
    """What is known of a model. `steps` and `data` are None if unknown; `scores` are of these very weights.

    `sigma_rel`: length of the power-function average that the weights are; None if they are the EMA of `preset`.
    """

    preset: Preset
    parameters: int
    steps: int | None
    data: TrainingSet | None
    scores: tuple[Score, ...] = ()
    sigma_rel: float | None = None

    @property
    def sentence(self) -> str:
        """What the model is and what it was trained on, as one sentence."""
        unet = self.preset.unet
        size = size_text(unet.image_size, "×")
        trained = ""
        if self.data is not None:
            count = "" if self.data.images is None else f"{self.data.images:,} images of "
            trained = f", trained on {count}{self.data.name}"
        if self.steps is not None:
            trained += f"{'' if trained else ', trained'} for {self.steps:,} steps of {self.preset.train.batch} images"
        return (
            f"A denoising diffusion model (DDPM) of {self.parameters:,} parameters that draws {size} "
            f"{_channels(unet.image_channels)} images{trained}."
        )

    def rows(self) -> list[tuple[str, str]]:
        """Return the configuration as (name, text), in the field's terms."""
        unet, diffusion, train, sample = (
            getattr(self.preset, name) for name in ("unet", "diffusion", "train", "sample")
        )
        widths = ", ".join(map(str, unet.level_channels))
        _, height, width = unet.image_shape
        attention = ", ".join(size_text((side, side * width // height), "×") for side in unet.attention_resolutions)
        classes = f"; {unet.num_classes} classes" if unet.num_classes else ""
        dropped = f", left out for {unet.label_dropout:.0%} of images" if unet.label_dropout else ""
        decay = ", then a cosine to 0" if train.decay == "cosine" else ""
        emas = "EMA " + ", ".join(f"{decay:g}" for decay in train.decays)
        if self.sigma_rel is not None:
            emas = f"power-function EMA of σ_rel {self.sigma_rel:g}"
        guidance = f", guidance {sample.guidance:g}" if sample.guidance != 1 else ""
        if guidance and sample.guidance_interval is not None:
            guidance += " at t = {} to {}".format(*sample.guidance_interval)
        if guidance and sample.guidance_rescale:
            guidance += f", rescaled by {sample.guidance_rescale:g}"
        if sample.dynamic_threshold is not None:
            guidance += f", dynamic threshold {sample.dynamic_threshold:g}"
            if sample.dynamic_threshold_max is not None:
                guidance += f" of at most {sample.dynamic_threshold_max:g}"
        spacing = f", spacing {sample.spacing}" if sample.spacing != "even" else ""
        if spacing and (offset := sample.spacing_options()["steps_offset"]):
            spacing += f" with offset {offset}"
        rows = [
            ("images", f"{size_text(unet.image_size, '×')}, {_channels(unet.image_channels)}{classes}{dropped}"),
            (
                "network",
                f"U-Net of {self.parameters:,} parameters: channels {widths}; residual blocks per level {unet.blocks}; "
                f"attention at {attention or 'no resolution'}{_options(unet)}; dropout {unet.dropout:g}",
            ),
            (
                "process",
                f"T = {diffusion.timesteps:,}, {_schedule_text(diffusion)}; predicts "
                f"{_PREDICTIONS[diffusion.prediction]}; variance {_VARIANCES[diffusion.variance]}; "
                f"loss {_LOSSES[diffusion.loss]}",
            ),
            (
                "training",
                f"Adam, batch {train.batch}, learning rate {train.lr:g} after {train.warmup:,} steps of warm-up{decay}"
                f"; gradient clipped to {train.clip_gradient:g}; {emas}; "
                f"{'random flips' if train.flip else 'no flips'}; {train.precision}",
            ),
            ("sampling", f"{sample.method}, {sample.steps or diffusion.timesteps:,} steps{spacing}{guidance}"),
        ]
        if self.preset.name in (DIFFUSERS, CONVERTED, OWN):
            rows = rows[:3]
        if self.data is not None:
            rows.insert(0, ("data", _data_text(self.data)))
        return rows

    def changes(self) -> list[str]:
        """Return what differs from the preset that the configuration is named after, as in "lr: 0.002 -> 0.001"."""
        base = PRESETS.get(self.preset.name)
        return [] if base is None else difference(base, self.preset)


def parameters_of(preset: Preset) -> int:
    """Return the number of parameters of a configuration's network."""
    return sum(parameter.numel() for parameter in meta_network(preset.unet).parameters())


def scores_of(run: Path, network: str) -> tuple[Score, ...]:
    """Return the scores in `run`/evaluation that are of the weights with the sha256 `network`; none if damaged."""
    try:
        found = read_scores(run / "evaluation" / FILE)
    except (FileNotFoundError, DataError):
        return ()
    return found.scores if found.network == network else ()


def started_on(run: Path) -> TrainingSet | None:
    """Return the images that the last start in `run`/environment.json names; None if there is none or damage."""
    try:
        sessions = read_object(run / "environment.json").get("sessions")
    except (FileNotFoundError, DataError):
        return None
    last = sessions[-1] if isinstance(sessions, list) and sessions else None
    return TrainingSet.of(last.get("data")) if isinstance(last, dict) else None


def _schedule_text(diffusion: DiffusionConfig) -> str:
    """Name the schedule, as in "linear schedule"."""
    if diffusion.betas is not None:
        return f"betas given one by one, from {diffusion.betas[0]:g} to {diffusion.betas[-1]:g}"
    return f"{diffusion.schedule} schedule"


def _channels(channels: int) -> str:
    return {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")


def _options(unet: UNetConfig) -> str:
    """Name the options with which the network is not the paper's, as in "; norm_eps 1e-05"."""
    paper, names = UNetConfig(), (
        "middle_attention", "heads", "head_channels", "scale_shift", "resample", "downsample_padding", "norm_eps",
        "freq_shift", "time_scale",
    )  # fmt: skip
    values = [(name, getattr(unet, name)) for name in names if getattr(unet, name) != getattr(paper, name)]
    return "".join(f"; {name} {value}" for name, value in values)


def _data_text(data: TrainingSet) -> str:
    count = "" if data.images is None else f", {data.images:,} images"
    classes = "" if data.classes is None else f", {len(data.classes):,} classes"
    return f"{data.name}{count}{classes}; sha256 {data.checksum[:12]}"
