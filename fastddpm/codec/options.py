"""How images are coded, as a frozen dataclass. Imports no torch, so `--help` is quick."""

from dataclasses import dataclass

from fastddpm.errors import UsageError


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
