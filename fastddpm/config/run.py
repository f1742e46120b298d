"""Configuration of all but the network: diffusion, training, sampling, engine, codec; and of a whole run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import arg

from fastddpm.errors import UsageError, refuse
from fastddpm.runtime.checks import (
    beta_problems,
    chain_problems,
    check_seed,
    choice_problems,
    guidance_problems,
    positive,
    range_problems,
    snapshot_problems,
)
from fastddpm.storage.documents import LATER

from .unet import UNetConfig

Schedule = Literal["linear", "cosine", "quad", "const", "jsd"]
Prediction = Literal["eps", "x0", "xprev", "v"]
Variance = Literal["fixedlarge", "fixedsmall", "learned", "learned_range"]
Loss = Literal["simple", "vlb", "hybrid", "min_snr"]
Method = Literal["ancestral", "ddim", "dpm2m", "dpm2m-sde"]
Spacing = Literal["even", "logsnr", "karras", "linspace", "leading", "trailing"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
MOST_IN_GRID = 10_000
MAX_TIMESTEPS = 100_000


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, what the network predicts, and the loss."""

    timesteps: int = 1000
    """T, the number of diffusion steps."""
    schedule: Schedule = "linear"
    """Schedule of beta_t over t = 0..T-1."""
    beta_start: float = 1e-4
    """beta of the first timestep (schedules linear and quad)."""
    beta_end: float = 0.02
    """beta of the last timestep (schedules linear, quad and const)."""
    prediction: Prediction = "eps"
    """What the network predicts: the noise (eps), x_0, the posterior mean of x_{t-1} (xprev), or v."""
    variance: Variance = "fixedlarge"
    """Variance of p(x_{t-1} | x_t): beta_t (fixedlarge), the posterior's (fixedsmall), learned, or learned between the
    two (learned_range)."""
    loss: Loss = "simple"
    """Training loss: L_simple, the variational bound, hybrid (simple + hybrid_weight T bound), or min-SNR weighting."""
    hybrid_weight: float = 1e-3
    """Weight of the bound, summed over T timesteps, in the hybrid loss."""
    min_snr_gamma: float = 5.0
    """Upper limit of the signal-to-noise ratio in min-SNR weighting."""
    clip_x0: bool = True
    """Clip the prediction of x_0 to [-1, 1] when sampling."""
    zero_terminal_snr: bool = field(default=False, metadata=LATER)
    """Rescale the schedule so that x_t at the last timestep is noise alone (Lin et al. 2023); not with prediction eps,
    which x_0 cannot be computed from there."""
    betas: Annotated[tuple[float, ...] | None, arg(metavar="FLOAT [FLOAT ...]")] = field(default=None, metadata=LATER)
    """beta of each timestep, T of them, in place of schedule, beta_start and beta_end. Default: the schedule's."""

    def __post_init__(self) -> None:
        if self.betas is not None:  # an array of NumPy, too
            object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if not 2 <= self.timesteps <= MAX_TIMESTEPS:
            yield f"timesteps must be in 2..{MAX_TIMESTEPS}; got {self.timesteps}"
        if not 0 < self.beta_start < 1 or not 0 < self.beta_end < 1:
            yield f"beta_start and beta_end must be in (0, 1); got {self.beta_start}, {self.beta_end}"
        for name in ("schedule", "prediction", "variance", "loss"):
            yield from choice_problems(self, name)
        yield from positive(self, "hybrid_weight", "min_snr_gamma")
        if self.loss == "hybrid" and not self.variance.startswith("learned"):
            yield (f"loss hybrid trains a learned variance; variance is {self.variance}, use learned or learned_range")
        if self.variance.startswith("learned") and self.loss in ("simple", "min_snr"):
            yield f"variance {self.variance} gets no gradient from loss {self.loss}; use hybrid or vlb"
        if self.loss == "min_snr" and self.prediction == "xprev":
            yield ("min_snr weighting is defined for predictions eps, x0 and v, not xprev; choose another prediction")
        if self.betas is not None:
            yield from beta_problems(self.betas, self.timesteps)

    @property
    def learned_variance(self) -> bool:
        """Whether the variance is learned, which gives the network 2C output channels."""
        return self.variance.startswith("learned")


@dataclass(frozen=True)
class TrainConfig:
    """Training. Without a preset the defaults are the paper's for CIFAR-10."""

    steps: int = 800_000
    """Optimizer steps of the whole run, including those before a resume."""
    batch: int = 128
    """Images per optimizer step, over all processes."""
    accumulate: int = 1
    """Micro-batches that each batch is split into, to save memory. The gradient is that of the whole batch."""
    lr: float = 2e-4
    """Learning rate of Adam after warm-up."""
    warmup: int = 5000
    """Steps of linear learning rate warm-up."""
    decay: Literal["none", "cosine"] = "none"
    """Learning rate after warm-up: constant (none), or a cosine to zero at the last step."""
    clip_gradient: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    ema: Annotated[float | tuple[float, ...], arg(metavar="FLOAT [FLOAT ...]")] = 0.9999
    """Decay of the exponential moving average (EMA) of the weights. With several decays, an average is kept for each;
    samples are drawn from the first."""
    ema_ramp: bool = False
    """Limit the decay at step n = 0, 1, .. to (1 + n) / (10 + n), for runs that are short compared with 1 / (1 - ema).
    The paper does not do this."""
    ema_snapshots: int = 0
    """Steps between snapshots of power-function averages of the weights, from which `python -m fastddpm.average` makes
    an average of any length after the run (Karras et al. 2024). The last step has one, too. 0: none."""
    ema_snapshot_lengths: Annotated[tuple[float, ...], arg(metavar="FLOAT [FLOAT ...]")] = (0.05, 0.1)
    """Length sigma_rel of each of these averages: the standard deviation of its weighting over the steps, as a
    fraction of the run. With two, other lengths are reconstructed well; more take more memory."""
    ema_snapshot_dtype: Literal["float16", "float32"] = "float16"
    """Numbers of the snapshots. float32 takes twice the disk space."""
    flip: bool = True
    """Flip images horizontally, with probability 1/2."""
    mode: Literal["standard", "paper"] = "standard"
    """paper: follow the released code where it differs from common practice today (docs/paper.md)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: run the network under autocast. Weights, diffusion and loss stay float32. On a CPU that is faster where the
    processor multiplies bfloat16 (AVX512-BF16)."""
    compile: bool = False
    """Compile network, noise and loss with torch.compile."""
    graph: bool = True
    """On one CUDA device, in mode standard, not compiled: capture a step as a CUDA graph and replay it. For a UNet;
    other networks may read values or draw random numbers on the host."""
    checkpoint_blocks: bool = False
    """Activation checkpointing: recompute residual blocks in the backward pass, which takes less memory and more
    time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Strategy of several processes: ddp replicates the state in each, fsdp (FSDP2) shards it among them."""
    seed: int = 0
    """Seed of initial weights, data order, t, noise and dropout: 64 bits, -2^63..2^63-1."""
    log_every: int = 50
    """Steps between lines of the log."""
    save_every: int = 5000
    """Steps between checkpoints."""
    keep: int = 2
    """Number of checkpoints to keep; older ones are removed."""
    preview_every: int = 5000
    """Steps between previews, grids of samples with fixed seeds drawn from the EMA weights. 0: no previews."""
    preview_steps: int = 20
    """DDIM steps of the reverse chain of a preview."""
    patience: int = 3
    """Steps in a row with a loss or gradient that is not finite after which the run stops."""

    def __post_init__(self) -> None:
        if isinstance(self.ema, tuple) and len(self.ema) == 1:
            object.__setattr__(self, "ema", self.ema[0])
        check_seed(self.seed)
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        yield from positive(self, "steps", "batch", "accumulate", "log_every", "save_every", "keep", "patience")
        yield from positive(self, "preview_steps")
        if self.preview_every < 0:
            yield f"preview_every must be 0 (for none) or more; got {self.preview_every}"
        yield from positive(self, "lr", "clip_gradient")
        if self.lr == math.inf:
            yield "lr must be finite; got inf"
        for name in ("mode", "precision", "decay", "parallel", "ema_snapshot_dtype"):
            yield from choice_problems(self, name)
        if self.warmup < 0:
            yield f"warmup must be 0 or more; got {self.warmup}"
        if not self.decays or len(set(self.decays)) < len(self.decays):
            yield f"ema must be one decay, or several that differ; got {self.ema}"
        for decay in self.decays:
            if not 0.0 <= decay < 1.0:
                yield f"ema must be in [0.0, 1.0); got {decay}"
        yield from snapshot_problems(self.ema_snapshots, self.ema_snapshot_lengths)
        if self.accumulate > 0 and self.batch % self.accumulate:
            yield f"accumulate must divide batch; {self.accumulate} does not divide {self.batch}"
        if self.mode == "paper" and self.batch % 8:
            yield f"mode paper clips each of 8 shards of a batch; 8 does not divide batch {self.batch}"
        if self.mode == "paper" and self.accumulate != 1:
            yield "mode paper takes its batch in 8 shards already; leave accumulate at 1"
        if self.parallel == "fsdp" and (self.mode == "paper" or self.compile):
            conflict = "mode paper, which clips gradients before they are summed" if self.mode == "paper" else "compile"
            yield f"parallel fsdp does not go with {conflict}; use parallel ddp"

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays in `ema` as a tuple, also if it is a single number."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)


@dataclass(frozen=True)
class SampleConfig:
    """Sampling at the end of a run, and the defaults of `python -m fastddpm.sample`."""

    method: Method = "ancestral"
    """Sampling method: ancestral (Algorithm 2 of the paper), ddim, or DPM-Solver++(2M): dpm2m, with noise dpm2m-sde."""
    steps: int | None = None
    """Steps of the reverse chain. Default: T. Fewer are spread over the timesteps as spacing says."""
    spacing: Spacing = "even"
    """Timesteps of a shorter chain: even, logsnr, karras, or linspace, leading, trailing as in diffusers."""
    steps_offset: int = field(default=0, metadata=LATER)
    """Added to each timestep of spacing leading, as in diffusers."""
    eta: float = 0.0
    """Noise of DDIM, from 0 (none, deterministic) to 1 (as much as ancestral sampling)."""
    guidance: float = 1.0
    """Scale of classifier-free guidance. 1: none. More: samples closer to their class."""
    guidance_interval: tuple[int, int] | None = None
    """First and last timestep, of 0..T-1, with classifier-free guidance. Default: all. Outside the network is evaluated
    once, not twice."""
    guidance_rescale: float = 0.0
    """How far the standard deviation of the guided prediction is brought back to that of the class's, from 0 (not at
    all) to 1 (Lin et al. 2023)."""
    dynamic_threshold: float | None = None
    """Fraction of an image's pixels, in (0, 1), whose |x_0| prediction dynamic thresholding leaves unclipped: x_0 is
    clipped to their largest, or 1, and divided by it (Saharia et al. 2022). Default: x_0 is clipped to [-1, 1]."""
    dynamic_threshold_max: float | None = field(default=None, metadata=LATER)
    """Largest value that dynamic thresholding clips x_0 to, 1 or more. Default: no limit."""
    count: int = 64
    """Images in the grid of final samples. 0: no samples."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.steps is not None:
            yield from positive(self, "steps")
        yield from (*choice_problems(self, "method"), *choice_problems(self, "spacing"))
        yield from range_problems(self, "eta", 0.0, 1.0, closed=True)
        yield from chain_problems(self.method, self.eta, self.guidance)
        yield from guidance_problems(
            self.guidance_interval, self.guidance_rescale, self.dynamic_threshold, self.dynamic_threshold_max
        )
        if not 0 <= self.steps_offset <= MAX_TIMESTEPS:
            yield f"steps_offset must be in 0..{MAX_TIMESTEPS}; got {self.steps_offset}"
        if not 0 <= self.count <= MOST_IN_GRID:
            yield f"count must be in 0..{MOST_IN_GRID}; got {self.count}"

    def spacing_options(self) -> dict[str, Any]:
        """Return the fields that choose the timesteps of a shorter chain, by name, as `Sampler` takes them."""
        return {"spacing": self.spacing, "steps_offset": self.steps_offset if self.spacing == "leading" else 0}

    def guidance_options(self) -> dict[str, Any]:
        """Return the fields that change the network's predictions, by name, as `Sampler` takes them."""
        names = ("guidance", "guidance_interval", "guidance_rescale", "dynamic_threshold", "dynamic_threshold_max")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class EngineConfig:
    """Evaluation of the network when sampling. Except fp8, options change the images only by rounding."""

    precision: Precision = "auto"
    """Precision of the network. auto: bf16 on a GPU, fp32 on a CPU. The reverse chain itself is float32. On a CPU, bf16
    is faster where the processor has instructions for it (AVX512-BF16), and fp32 is taken instead where it has not."""
    native: bool = True
    """On a CPU in fp32 or bf16: evaluate the network in the compiled library. Then the options below have no effect."""
    channels_last: bool = True
    """Store weights and activations in torch.channels_last."""
    time_table: bool = True
    """Compute all time embeddings and their projections once, before the reverse chain."""
    fused_qkv: bool = True
    """Compute queries, keys and values by one projection."""
    phase_convolutions: bool = True
    """Compute upsampling and the convolution after it as 2x2 convolutions with summed weights."""
    transposed_convolutions: bool = True
    """Compute these 2x2 convolutions as one transposed 4x4 convolution, which needs no copy."""
    accumulate: bool = True
    """Add shortcuts inside the matrix products that compute them."""
    one_product: bool = True
    """Compute a shortcut of features and skip, and its sum with the block's output, by one product of our own. Then
    accumulate has no effect. Needs channels_last."""
    carried_biases: bool = True
    """Add the biases of convolutions where the next operation reads their output."""
    fused_residuals: bool = True
    """Add residuals in the norm that reads the sum, and in folded attention."""
    folded_attention: bool = True
    """With one head: multiply the weights of queries and keys, and of values and projection, beforehand."""
    mirrored: bool = True
    """Evaluate the network on images turned by 180 degrees, with its kernels turned likewise, if it downsamples with
    padding at the right and bottom alone: of images turned that way no padded copy is needed."""
    unpadded: bool = True
    """Without mirrored, downsample by a 4x4 kernel with a row and a column of zeros, which needs no padded copy."""
    direct_input: bool = True
    """Compute the first convolution from the image as it is, of up to 7 channels, by an operation of our own. Needs
    channels_last and carried_biases."""
    padded_channels: bool = True
    """Fill the channels of the network's input (without direct_input) and output up to a multiple of 8 with zeros."""
    timed_convolutions: bool = True
    """On a CUDA device: let cuDNN time its algorithms for each new shape and take the fastest."""
    chunk: int = 0
    """Images of the highest resolution to compute at a time, so that they stay in the cache. Default: all, 0."""
    graph: bool = True
    """On a CUDA device: capture a step of the chain, or an evaluation of a Denoiser, as a CUDA graph and replay it."""
    compile: bool = False
    """Compile the network with torch.compile, which takes minutes once."""
    fp8: bool = False
    """Compute the convolutions of residual blocks in 8-bit floating point, on a GPU of sm_89 or later. This changes the
    images; a warning says how far the network's output is from that without."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        yield from choice_problems(self, "precision")
        if self.chunk < 0:
            yield f"chunk must be 0 or more; got {self.chunk}"


@dataclass(frozen=True)
class Preset:
    """A complete configuration whose parts fit together."""

    name: str
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.unet.learned_variance != self.diffusion.learned_variance:
            yield (
                f"variance {self.diffusion.variance} needs learned_variance={self.diffusion.learned_variance} "
                f"in the network; got {self.unet.learned_variance}"
            )
        if self.sample.steps is not None and self.sample.steps > self.diffusion.timesteps:
            yield (f"sample steps must be at most timesteps, {self.diffusion.timesteps}; got {self.sample.steps}")
        if self.sample.guidance != 1.0 and self.unet.label_dropout == 0:
            yield "guidance needs a network trained with label_dropout > 0"
        sample = self.sample
        yield from guidance_problems(
            sample.guidance_interval,
            sample.guidance_rescale,
            sample.dynamic_threshold,
            timesteps=self.diffusion.timesteps,
            prediction=self.diffusion.prediction,
            method=sample.method,
        )


@dataclass(frozen=True)
class CodecOptions:
    """Options of the encoder. The decoder reads them from the file."""

    steps: int | None = 100
    """Timesteps of the chain, chosen for these images; at most all of them. None: all."""
    lossy: int | None = None
    """Timestep, 0..T-2, at which the chain stops, for lossy coding: pixels are as coarse as the noise there. None:
    lossless."""
    batch: int = 64
    """Largest number of images coded side by side, 1..4096. Coding begins with one image and doubles up to this."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.steps is not None and self.steps < 2:
            yield f"steps must be at least 2; got {self.steps}"
        if self.lossy is not None and self.lossy < 0:
            yield f"lossy must be a timestep, 0 or more; got {self.lossy}"
        if not 1 <= self.batch <= 4096:
            yield f"batch must be in 1..4096; got {self.batch}"

    def last(self, timesteps: int) -> int:
        """Return the timestep at which the chain stops. Raises `UsageError` if it is not in 0..`timesteps` - 2."""
        if self.lossy is not None and self.lossy > timesteps - 2:
            raise UsageError(f"lossy must be a timestep in 0..{timesteps - 2}; got {self.lossy}")
        return self.lossy or 0
