"""What the pictures show, as a frozen dataclass. Imports no torch, so `--help` is quick."""

from dataclasses import dataclass

from fastddpm.config import MOST_IN_GRID
from fastddpm.errors import UsageError

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
