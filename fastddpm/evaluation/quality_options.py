"""What the scores of samples are made of, as a frozen dataclass. Imports no torch, so `--help` is quick."""

from dataclasses import dataclass

from fastddpm.errors import UsageError

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
