"""How much is evaluated, as frozen dataclasses. Imports no torch, so `--help` is quick."""

from dataclasses import dataclass

from fastddpm.config import MOST_IN_GRID, check_seed
from fastddpm.errors import UsageError


@dataclass(frozen=True)
class BitsOptions:
    """Of the likelihood: bits per dimension and the rate-distortion curve."""

    images: int | None = None
    """Images of the data set, picked at random by the seed; all of them unless given."""
    every: int = 1
    """1 evaluates all timesteps for every image; k every k-th, and another k-th for the next image: an estimate, with
    its standard error."""
    seed: int = 0
    """64-bit key of the noise, and of what is picked."""

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 1:
            raise UsageError(f"images must be positive; got {self.images}")
        if self.every < 1:
            raise UsageError(f"every must be positive; got {self.every}")
        check_seed(self.seed)


QUALITY_METRICS = ("fid", "is", "kid", "pr")


@dataclass(frozen=True)
class QualityOptions:
    """Of FID, Inception Score, KID, precision and recall, or what they are called with other networks."""

    samples: int = 50_000
    """Images drawn, of seeds 0, 1, ..; the published scores are of 50,000, and fewer are not comparable."""
    splits: int = 10
    """Parts of the samples that the Inception Score is the mean and standard deviation of."""
    kid_subsets: int = 100
    """Pairs of subsets that the kernel distance is the mean and standard deviation of."""
    kid_subset_size: int = 1000
    """Images of each subset; fewer where there are fewer."""
    neighbours: int = 3
    """k of the nearest neighbours that span the manifolds of precision and recall."""

    def __post_init__(self) -> None:
        for name in ("samples", "splits", "kid_subsets", "neighbours"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be positive; got {getattr(self, name)}")
        if not 2 <= self.samples <= 2**32:
            raise UsageError(f"samples must be in 2..{2**32}; got {self.samples}")
        if self.kid_subset_size < 2:
            raise UsageError(f"kid_subset_size must be 2 or more; got {self.kid_subset_size}")


PICTURE_NAMES = (
    "progressive",
    "shared-latent",
    "interpolation",
    "interpolation-depths",
    "neighbours",
    "strips",
    "classes",
)


@dataclass(frozen=True)
class PictureOptions:
    """Of all pictures; each takes what it needs."""

    rows: int = 8
    """Images, chains or pairs of images, one below the other."""
    columns: int = 11
    """Times of a chain or of the forward process, or samples of a class, side by side."""
    first_seed: int = 0
    """The rows' seeds are this one and those behind it; the columns' where rows are classes."""
    depths: tuple[int, ...] = ()
    """Steps of the forward process, 0..T: where chains are stopped, or images mixed. Without it, as in the paper:
    T, 3/4 T, T/2 and T/4 for shared latents, T/2 for interpolation, T to 0 by T/8 for its depths."""
    lambdas: int = 11
    """Places between the two images of an interpolation, both ends included."""
    one_noise: bool = False
    """Interpolation: the same noise for both images, instead of each its own."""
    continuations: int = 3
    """Images drawn from one shared latent."""
    neighbours: int = 8
    """Nearest images of the data set beside each sample."""
    crop: int | None = None
    """Nearest neighbours by pixels: only the central square of this side is compared."""
    features: str | None = None
    """Nearest neighbours by features of this network, too: inception, digits, efficientnet-lite0, or a .pth or
    .safetensors of Inception weights."""
    scales: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Scales of guidance in the grid of classes, where the network was trained for guidance."""
    frames: int = 40
    """Frames of an animation."""

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "lambdas", "continuations", "neighbours", "frames"):
            if not 1 <= getattr(self, name) <= MOST_IN_GRID:
                raise UsageError(f"{name} must be in 1..{MOST_IN_GRID}; got {getattr(self, name)}")
        if self.lambdas < 2:
            raise UsageError(f"lambdas must be 2 or more, for both ends are shown; got {self.lambdas}")
        highest = 2**32 - max(self.rows, self.columns)
        if not 0 <= self.first_seed <= highest:
            raise UsageError(f"first_seed must be in 0..{highest}; got {self.first_seed}")
        if not self.scales:
            raise UsageError("scales must name one scale of guidance or more")

    @property
    def seeds(self) -> range:
        """A seed for each row."""
        return range(self.first_seed, self.first_seed + self.rows)

    @property
    def column_seeds(self) -> range:
        """A seed for each column, where rows are classes."""
        return range(self.first_seed, self.first_seed + self.columns)
