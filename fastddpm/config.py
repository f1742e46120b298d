"""What a run is, as frozen dataclasses. Imports no torch, so `--help` is quick."""

import math
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import Suppress

from fastddpm.errors import UsageError

Schedule = Literal["linear", "cosine", "quad", "const", "jsd"]
Prediction = Literal["eps", "x0", "xprev", "v"]
Variance = Literal["fixedlarge", "fixedsmall", "learned", "learned_range"]
Loss = Literal["simple", "vlb", "hybrid", "min_snr"]
Method = Literal["ancestral", "ddim"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
MOST_IN_GRID = 10_000
MAX_GUIDANCE = 1e6  # far above any that is of use, far below what overflows float32


def check_seed(seed: int) -> None:
    """`UsageError` for a key that has more than 64 bits."""
    if not -(2**63) <= seed < 2**63:
        raise UsageError(f"seed must be in -2^63..2^63-1; got {seed}")


def check_chain(method: str, eta: float, guidance: float) -> None:
    """`UsageError` for noise of DDIM in another method, and for a scale of guidance that is out of range."""
    if eta and method != "ddim":
        raise UsageError(f"eta is of method ddim, ancestral sampling has none; got {eta}")
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise UsageError(f"guidance must be in 0..{MAX_GUIDANCE:g}; got {guidance}")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise UsageError(f"{name} must be positive; got {value}")


def _require_range(config: Any, name: str, low: float, high: float, *, closed: bool = False) -> None:
    value = getattr(config, name)
    if not (low <= value < high or (closed and value == high)):
        raise UsageError(f"{name} must be in [{low}, {high}{']' if closed else ')'}; got {value}")


def _require_choice(config: Any, name: str) -> None:
    choices = typing.get_args(typing.get_type_hints(type(config))[name])
    value = getattr(config, name)
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


@dataclass(frozen=True)
class UNetConfig:
    """The network. Defaults are the paper's CIFAR-10 model."""

    image_size: int = 32
    """Height and width of the images, pixels; divisible by 2^(levels - 1)."""
    image_channels: int = 3
    """1 for grey, 3 for colour."""
    width: int = 128
    """Channels of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, in widths; every level but the last ends in a downsampling by 2."""
    blocks: int = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Image sizes at which every residual block is followed by attention; the middle always has it."""
    dropout: float = 0.1
    """Dropout probability between the second SiLU and the second convolution of a residual block."""
    groups: int = 32
    """Groups of each GroupNorm; divides the width and every level's channels."""
    num_classes: int = 0
    """Class-conditioning: number of labels, 0 for none."""
    label_dropout: float = 0.0
    """Fraction of training labels replaced by "no label", which classifier-free guidance needs."""
    learned_variance: Annotated[bool, Suppress] = False
    """A second half of output channels for the variance; follows the diffusion's variance."""

    def __post_init__(self) -> None:
        _require_positive(self, "image_size", "image_channels", "width", "blocks", "groups")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UsageError(f"multipliers must be one or more positive integers; got {self.multipliers}")
        if self.width % 2 or self.width < 4:
            raise UsageError(f"width must be even and at least 4 (the time embedding halves it); got {self.width}")
        divisor = 2 ** (len(self.multipliers) - 1)
        if self.image_size % divisor:
            raise UsageError(
                f"image_size must be divisible by {divisor} for {len(self.multipliers)} levels; got {self.image_size}"
            )
        for multiplier in (1, *self.multipliers):  # the first convolution's output has one width
            if self.width * multiplier % self.groups:
                raise UsageError(
                    f"groups must divide each level's channels; {self.groups} does not divide {self.width * multiplier}"
                )
        _require_range(self, "dropout", 0.0, 0.999)
        _require_range(self, "label_dropout", 0.0, 1.0)
        if self.num_classes < 0:
            raise UsageError(f"num_classes must be 0 or more; got {self.num_classes}")
        if self.label_dropout > 0 and self.num_classes == 0:
            raise UsageError("label_dropout needs num_classes > 0")
        too_large = {
            "image_size": (self.image_size, 4096),
            "image_channels": (self.image_channels, 64),
            "width": (self.width, 4096),
            "blocks": (self.blocks, 64),
            "levels": (len(self.multipliers), 12),
            "the largest multiplier": (max(self.multipliers), 64),
            "num_classes": (self.num_classes, 1_000_000),
        }
        for name, (value, limit) in too_large.items():
            if value > limit:
                raise UsageError(f"{name} must be at most {limit}; got {value}")


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, what the network predicts, and the loss."""

    timesteps: int = 1000
    """T, the number of diffusion steps."""
    schedule: Schedule = "linear"
    """How beta_t grows with t."""
    beta_start: float = 1e-4
    """beta of the first step (linear and quad)."""
    beta_end: float = 0.02
    """beta of the last step (linear, quad and const)."""
    prediction: Prediction = "eps"
    """The network's output: the noise, x_0, the posterior mean of x_{t-1}, or v."""
    variance: Variance = "fixedlarge"
    """Variance of p(x_{t-1} | x_t): beta_t, the posterior's, or learned (directly or between the two)."""
    loss: Loss = "simple"
    """L_simple, the variational bound, hybrid (simple + hybrid_weight * T * bound) or min-SNR weighting."""
    hybrid_weight: float = 1e-3
    """Weight of the bound, summed over T steps, in the hybrid loss."""
    min_snr_gamma: float = 5.0
    """Largest signal-to-noise ratio that min-SNR weighting counts."""
    clip_x0: bool = True
    """Clip the x_0 prediction to [-1, 1] when sampling."""

    def __post_init__(self) -> None:
        if not 2 <= self.timesteps <= 100_000:
            raise UsageError(f"timesteps must be in 2..100000; got {self.timesteps}")
        if not 0 < self.beta_start < 1 or not 0 < self.beta_end < 1:
            raise UsageError(f"beta_start and beta_end must be in (0, 1); got {self.beta_start}, {self.beta_end}")
        for name in ("schedule", "prediction", "variance", "loss"):
            _require_choice(self, name)
        _require_positive(self, "hybrid_weight", "min_snr_gamma")
        if self.loss == "hybrid" and not self.variance.startswith("learned"):
            raise UsageError(f"loss hybrid trains a learned variance; variance is {self.variance}")
        if self.variance.startswith("learned") and self.loss in ("simple", "min_snr"):
            raise UsageError(f"variance {self.variance} gets no gradient from loss {self.loss}; use hybrid or vlb")
        if self.loss == "min_snr" and self.prediction == "xprev":
            raise UsageError("min_snr weighting is defined for predictions eps, x0 and v, not xprev")

    @property
    def learned_variance(self) -> bool:
        """Whether the network has 2C output channels."""
        return self.variance.startswith("learned")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. Defaults are the paper's for CIFAR-10."""

    steps: int = 800_000
    """Optimizer steps of the whole run."""
    batch: int = 128
    """Images per optimizer step."""
    accumulate: int = 1
    """Micro-batches that a batch is split into, to fit memory; the result is that of the whole batch."""
    lr: float = 2e-4
    """Adam's learning rate after warm-up."""
    warmup: int = 5000
    """Steps of linear warm-up."""
    decay: Literal["none", "cosine"] = "none"
    """Learning rate after warm-up: constant, or a cosine to zero at the last step."""
    clip_gradient: float = 1.0
    """Largest norm of the gradient."""
    ema: float | tuple[float, ...] = 0.9999
    """Decay of the exponential moving average of the weights. Given several decays, an average of each is kept; samples
    are drawn from the first."""
    ema_ramp: bool = False
    """Average over few steps at first: at step n = 0, 1, .. the decay is at most (1 + n) / (10 + n). For runs that are
    short beside 1 / (1 - ema); the paper has none."""
    flip: bool = True
    """Mirror half of the images, at random."""
    mode: Literal["standard", "paper"] = "standard"
    """paper: details of the released code where today's habits differ (docs/paper.md)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the network under autocast; weights, diffusion and loss stay float32."""
    compile: bool = False
    """Compile network, noise and loss with torch.compile."""
    checkpoint_blocks: bool = False
    """Keep no activations inside residual blocks but compute them again for the backward pass: a batch takes less
    memory and more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: ddp has the whole state in each; fsdp (FSDP2) divides it among them."""
    seed: int = 0
    """Names the run's randomness: weights, data order, t, noise, dropout. A 64-bit key, -2^63..2^63-1."""
    log_every: int = 50
    """Steps between lines in the log."""
    save_every: int = 5000
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept."""
    preview_every: int = 5000
    """Steps between previews: a grid of fixed seeds drawn from the averaged weights. 0 for none."""
    preview_steps: int = 20
    """Steps of a preview's chain, by DDIM."""
    patience: int = 3
    """Steps in a row with a NaN or infinite loss after which the run stops."""

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "batch", "accumulate", "log_every", "save_every", "keep", "patience")
        _require_positive(self, "preview_steps")
        if self.preview_every < 0:
            raise UsageError(f"preview_every must be 0 (for none) or more; got {self.preview_every}")
        _require_positive(self, "lr", "clip_gradient")
        if self.lr == math.inf:
            raise UsageError("lr must be finite; got inf")
        for name in ("mode", "precision", "decay", "parallel"):
            _require_choice(self, name)
        check_seed(self.seed)
        if self.warmup < 0:
            raise UsageError(f"warmup must be 0 or more; got {self.warmup}")
        self._check_decays()
        if self.batch % self.accumulate:
            raise UsageError(f"accumulate must divide batch; {self.accumulate} does not divide {self.batch}")
        if self.mode == "paper" and self.batch % 8:
            raise UsageError(f"mode paper clips each of 8 shards of a batch; 8 does not divide batch {self.batch}")
        if self.mode == "paper" and self.accumulate != 1:
            raise UsageError("mode paper takes its batch in 8 shards already; leave accumulate at 1")
        if self.parallel == "fsdp" and (self.mode == "paper" or self.compile):
            what = "mode paper, which clips gradients before they are summed" if self.mode == "paper" else "compile"
            raise UsageError(f"parallel fsdp does not go with {what}; use parallel ddp")

    def _check_decays(self) -> None:
        if isinstance(self.ema, tuple) and len(self.ema) == 1:
            object.__setattr__(self, "ema", self.ema[0])
        if not self.decays or len(set(self.decays)) < len(self.decays):
            raise UsageError(f"ema must be one decay, or several that differ; got {self.ema}")
        for decay in self.decays:
            if not 0.0 <= decay < 1.0:
                raise UsageError(f"ema must be in [0.0, 1.0); got {decay}")

    @property
    def decays(self) -> tuple[float, ...]:
        """Those of `ema`, one or several."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)


@dataclass(frozen=True)
class SampleConfig:
    """How a run draws its samples, and what `python -m fastddpm.sample` does unless told otherwise."""

    method: Method = "ancestral"
    """Ancestral sampling (Algorithm 2 of the paper) or DDIM."""
    steps: int | None = None
    """Steps of the chain: all T unless given; fewer are spread evenly, both ends included."""
    eta: float = 0.0
    """DDIM's noise: 0 deterministic, 1 that of ancestral sampling."""
    guidance: float = 1.0
    """Classifier-free guidance: 1 none, more for samples closer to their class."""
    count: int = 64
    """Images in the sample grid, 0 for none."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            _require_positive(self, "steps")
        _require_choice(self, "method")
        _require_range(self, "eta", 0.0, 1.0, closed=True)
        check_chain(self.method, self.eta, self.guidance)
        if not 0 <= self.count <= MOST_IN_GRID:
            raise UsageError(f"count must be in 0..{MOST_IN_GRID}; got {self.count}")


@dataclass(frozen=True)
class EngineConfig:
    """How the sampler evaluates the network. The images stay, up to rounding, whatever is switched but fp8."""

    precision: Precision = "auto"
    """Of the network: auto is bf16 on a GPU and fp32 on a CPU. The chain itself is float32."""
    native: bool = True
    """On a CPU in fp32: the compiled library's network; then the switches below do not matter."""
    channels_last: bool = True
    """Weights and images with the channels of a pixel side by side."""
    time_table: bool = True
    """All time embeddings and their projections computed once, before the chain."""
    fused_qkv: bool = True
    """One projection for queries, keys and values."""
    phase_convolutions: bool = True
    """Doubling and the convolution behind it as 2x2 convolutions with summed weights."""
    accumulate: bool = True
    """Shortcuts added by the matrix product that computes them."""
    graph: bool = True
    """On a CUDA device: a step captured once and replayed."""
    compile: bool = False
    """The network through torch.compile (minutes, once)."""
    fp8: bool = False
    """Convolutions of residual blocks in 8-bit floating point, on a GPU that has it. This changes the images: how far
    the network's output is from what it was is said when it is prepared."""

    def __post_init__(self) -> None:
        _require_choice(self, "precision")


@dataclass(frozen=True)
class Preset:
    """A complete, consistent configuration."""

    name: str
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if self.unet.learned_variance != self.diffusion.learned_variance:
            raise UsageError(
                f"variance {self.diffusion.variance} needs learned_variance={self.diffusion.learned_variance} "
                f"in the network; got {self.unet.learned_variance}"
            )
        if self.sample.steps is not None and self.sample.steps > self.diffusion.timesteps:
            raise UsageError(
                f"sample steps must be at most timesteps, {self.diffusion.timesteps}; got {self.sample.steps}"
            )
        if self.sample.guidance != 1.0 and self.unet.label_dropout == 0:
            raise UsageError("guidance needs a network trained with label_dropout > 0")


# How images are coded, as a frozen dataclass. Imports no torch, so `--help` is quick.


@dataclass(frozen=True)
class CodecOptions:
    """Of the encoder; who decodes reads them in the file."""

    steps: int | None = 100
    """Timesteps of the chain, picked for the images at hand; all of them where there are no more. None: all."""
    lossy: int | None = None
    """Timestep that the chain stops at, 0..T-2: pixels as coarse as the noise there. None: every pixel exactly."""
    batch: int = 64
    """Most images coded side by side; the first ones are coded alone."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 2:
            raise UsageError(f"steps must be at least 2; got {self.steps}")
        if self.lossy is not None and self.lossy < 0:
            raise UsageError(f"lossy must be a timestep, 0 or more; got {self.lossy}")
        if not 1 <= self.batch <= 4096:
            raise UsageError(f"batch must be in 1..4096; got {self.batch}")

    def last(self, timesteps: int) -> int:
        """The timestep that the chain stops at; `UsageError` for one that T, `timesteps`, does not have."""
        if self.lossy is not None and self.lossy > timesteps - 2:
            raise UsageError(f"lossy must be a timestep in 0..{timesteps - 2}; got {self.lossy}")
        return self.lossy or 0
