"""How much is evaluated, as frozen dataclasses. Imports no torch, so `--help` is quick."""

from dataclasses import dataclass

from fastddpm.config import check_seed
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
