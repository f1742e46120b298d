"""Options of the metrics and pictures, as frozen dataclasses. Imports no torch, which keeps `--help` fast."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastddpm.config import MOST_IN_GRID
from fastddpm.errors import refuse
from fastddpm.runtime.checks import check_seed, choice_problems, positive


@dataclass(frozen=True)
class BitsOptions:
    """Options of bits per dimension and of the rate-distortion curve."""

    images: int | None = None
    """Number of images to evaluate, chosen at random by the seed. Default: all images of the data set."""
    every: int = 1
    """Evaluate only every k-th timestep of each image, different ones for consecutive images. The result is an estimate
    with its standard error. 1: all timesteps."""
    seed: int = 0
    """Seed of the noise and of the choice of images and timesteps, a signed 64-bit number."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        refuse(positive(self, "every", *(() if self.images is None else ("images",))))


@dataclass(frozen=True)
class OdeBitsOptions:
    """Options of bits per dimension by the probability-flow ODE (metric ode-bpd)."""

    images: int = 64
    """Number of images to evaluate, chosen at random by the seed; all if there are fewer."""
    draws: int = 1
    """Draws of dequantisation and probe for each image; more of them lower the standard error, at their cost."""
    steps: int | None = None
    """Steps of the solver, of three evaluations each, at most half of the timesteps. Default: 100, or as many as
    there can be."""
    end: Literal["uniform", "decoder"] = "uniform"
    """From pixels to the first noise level: add uniform noise of a bin's width (uniform), or the noise of that level,
    and decode the pixels as the bound does (decoder)."""
    exact_trace: bool = False
    """Compute the divergence exactly, by as many derivatives as an image has values, instead of Hutchinson's
    estimate."""
    seed: int = 0
    """Seed of the draws and of the choice of images, a signed 64-bit number."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        yield from positive(self, "images", "draws", *(() if self.steps is None else ("steps",)))
        yield from choice_problems(self, "end")


QUALITY_METRICS = ("fid", "is", "kid", "pr")


@dataclass(frozen=True)
class QualityOptions:
    """Options of FID, Inception Score, KID, precision and recall, and of their counterparts with other networks."""

    samples: int = 50_000
    """Number of images to draw, of seeds 0, 1, .. Published scores are of 50,000; scores of fewer are not comparable
    with them."""
    splits: int = 10
    """Inception Score: number of parts of the samples, over which mean and standard deviation are taken."""
    kid_subsets: int = 100
    """KID: number of pairs of subsets, over which mean and standard deviation are taken."""
    kid_subset_size: int = 1000
    """KID: images in a subset; all images if there are fewer."""
    neighbours: int = 3
    """Precision and recall: the k-th nearest neighbour gives the radius of the manifold around an image."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        yield from positive(self, "splits", "kid_subsets", "neighbours")
        if not 2 <= self.samples <= 2**32:
            yield f"samples must be in 2..{2**32}; got {self.samples}"
        if self.kid_subset_size < 2:
            yield f"kid_subset_size must be 2 or more; got {self.kid_subset_size}"


PICTURE_NAMES = (
    "progressive",
    "shared-latent",
    "interpolation",
    "interpolation-depths",
    "neighbours",
    "strips",
    "classes",
)
PICTURES_OF_DATA = ("interpolation", "interpolation-depths", "neighbours", "strips")  # they show images of the data set


@dataclass(frozen=True)
class PictureOptions:
    """Options of the pictures; each picture uses those that apply to it."""

    rows: int = 8
    """Rows of a picture: images, chains or pairs of images."""
    columns: int = 11
    """Columns of a picture: steps of a chain or of the forward process, or samples of a class."""
    first_seed: int = 0
    """Seed of the first row; the others follow in order. In the picture of classes: of the first column."""
    depths: tuple[int, ...] = ()
    """Depths at which chains are stopped or images are mixed, in steps of the forward process, 0..T. Default, as in the
    paper: T, 3/4 T, T/2 and T/4 for shared-latent, T/2 for interpolation, T to 0 in steps of T/8 for
    interpolation-depths."""
    lambdas: int = 11
    """Interpolation: images per row, from lambda = 0 to 1, both ends included."""
    one_noise: bool = False
    """Interpolation: use the same noise for both images, instead of independent noise."""
    continuations: int = 3
    """Images drawn from each shared latent."""
    neighbours: int = 8
    """Nearest images of the data set to show beside each sample."""
    crop: int | None = None
    """Nearest neighbours by pixels: side of the central square to compare, in pixels. Default: the whole image."""
    features: str | None = None
    """Also draw the nearest neighbours by features of this network: inception, digits, efficientnet-lite0, or a .pth or
    .safetensors file of Inception weights. Default: by pixels only."""
    scales: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Guidance scales in the picture of classes; only 1 is drawn if the network was not trained for guidance."""
    frames: int = 40
    """Frames of an animation; fewer if it would be larger than 2 MB."""

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[str]:
        for name in ("rows", "columns", "lambdas", "continuations", "neighbours", "frames"):
            if not 1 <= getattr(self, name) <= MOST_IN_GRID:
                yield f"{name} must be in 1..{MOST_IN_GRID}; got {getattr(self, name)}"
        if self.lambdas < 2:
            yield f"lambdas must be 2 or more, because both ends are shown; got {self.lambdas}"
        highest = 2**32 - max(self.rows, self.columns)
        if not 0 <= self.first_seed <= highest:
            yield f"first_seed must be in 0..{highest}; got {self.first_seed}"
        if not self.scales:
            yield "scales must hold at least one guidance scale; got none"

    @property
    def seeds(self) -> range:
        """The seed of each row."""
        return range(self.first_seed, self.first_seed + self.rows)

    @property
    def column_seeds(self) -> range:
        """The seed of each column of the picture of classes."""
        return range(self.first_seed, self.first_seed + self.columns)
