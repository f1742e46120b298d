"""The paper's table 2 as data: prediction target by training objective. Imports no torch."""

from dataclasses import dataclass, replace

from fastddpm.config import Loss, Prediction, Preset, Variance
from fastddpm.errors import UsageError


@dataclass(frozen=True)
class Cell:
    """A row of the table: a configuration, and the paper's results for it on CIFAR-10 after 800,000 steps.

    `paper_fid`, `paper_score` (Inception Score): None if the paper's training was unstable. `paper_bits`: bits/dim of
    the test set from table 1, an upper bound; None if the paper gives none.
    """

    name: str
    predicts: str
    objective: str
    prediction: Prediction
    variance: Variance
    loss: Loss
    paper_fid: float | None = None
    paper_score: float | None = None
    paper_bits: float | None = None


_MEAN, _EPS = "mean of x_{t-1}", "eps"
_LEARNED, _FIXED, _SIMPLE = "L, learned diagonal Σ", "L, fixed isotropic Σ", "squared error"
CELLS = (
    Cell("mean-bound-learned", _MEAN, _LEARNED, "xprev", "learned", "vlb", 23.69, 7.28),
    Cell("mean-bound", _MEAN, _FIXED, "xprev", "fixedlarge", "vlb", 13.22, 8.06),
    Cell("mean-simple", _MEAN, _SIMPLE, "xprev", "fixedlarge", "simple"),
    Cell("eps-bound-learned", _EPS, _LEARNED, "eps", "learned", "vlb"),
    Cell("eps-bound", _EPS, _FIXED, "eps", "fixedlarge", "vlb", 13.51, 7.67, 3.70),
    Cell("eps-simple", _EPS, f"{_SIMPLE} (L_simple)", "eps", "fixedlarge", "simple", 3.17, 9.46, 3.75),
)


def chosen_cells(names: str) -> list[Cell]:
    """Return the cells named in "NAME,NAME", in the table's order. Raises `UsageError` for an unknown name."""
    wanted = {name.strip() for name in names.split(",")}
    unknown = wanted - {cell.name for cell in CELLS}
    if unknown:
        raise UsageError(f"no cell is called {min(unknown)!r}; there are {', '.join(cell.name for cell in CELLS)}")
    return [cell for cell in CELLS if cell.name in wanted]


def configuration(base: Preset, cell: Cell, seed: int, *, steps: int | None, timesteps: int | None) -> Preset:
    """Return `base` with the cell's objective and the paper's process: linear schedule, no classes.

    `steps`: training steps. Default: those of `base`. `timesteps`: T. Default: that of `base`. Sampling takes all T
    steps, because a prediction of x_{t-1} and a variance learned for one step fit no shorter chain.
    """
    return Preset(
        f"{base.name}-{cell.name}",
        replace(base.unet, num_classes=0, label_dropout=0.0, learned_variance=cell.variance.startswith("learned")),
        replace(
            base.diffusion,
            timesteps=base.diffusion.timesteps if timesteps is None else timesteps,
            schedule="linear",
            prediction=cell.prediction,
            variance=cell.variance,
            loss=cell.loss,
        ),
        replace(base.train, seed=seed, steps=base.train.steps if steps is None else steps),
        replace(base.sample, method="ancestral", steps=None, guidance=1.0, dynamic_threshold=None, count=0),
    )
