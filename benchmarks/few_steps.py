"""How good digits are after few evaluations of the network: every method and spacing, over several noise keys.

    python benchmarks/few_steps.py [--model digits] [--steps 5 10 20 50] [--images 256] [--rounds 3] [--plot FILE.png]
        [--out FILE.json]

Each of `--rounds` draws the same seeds with another noise key, with the guidance of the model's run. The score is the
classifier Fréchet distance of benchmarks/digits.py, beside the share of images that the classifier is confident of and
recall; real digits of that number are the floor. `evaluations`: steps that are left of those asked for, as a spacing
may name a timestep twice; guidance doubles them for the network. `seconds`: of drawing them, medians over the rounds.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import numpy as np
import torch

import fastddpm
from fastddpm.pretrained.model import Model
from fastddpm.sampling.images import to_uint8

sys.path.insert(0, str(Path(__file__).parent))
import machine
from digits import Scorer, figures_of, real_at

CHAINS = [
    ("ancestral", "even"), ("ddim", "even"), ("ddim", "trailing"), ("dpm2m", "even"), ("dpm2m", "logsnr"),
    ("dpm2m", "trailing"), ("dpm2m-sde", "even"), ("dpm2m-sde", "logsnr"),
]  # fmt: skip
AT_ONCE = 64
FIGURES = ("classifier_frechet_distance", "confident_share", "recall")


def measure(
    model: Model, scorer: Scorer, method: str, spacing: str, steps: int, images: int, rounds: int
) -> dict[str, Any]:
    """Mean and standard deviation of each figure over the rounds, and the seconds of a round."""
    labels = [seed % 10 for seed in range(images)]
    scores: list[dict[str, Any]] = []
    seconds = []
    for key in range(rounds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `evaluations` tells how many timesteps are left
            sampler = fastddpm.Sampler(
                model.unet, model.diffusion, steps, method,
                spacing=spacing, guidance=model.preset.sample.guidance, seed=key,
            )  # fmt: skip
        start = perf_counter()
        parts = [sampler.sample(range(i, min(i + AT_ONCE, images)), labels[i : i + AT_ONCE])
                 for i in range(0, images, AT_ONCE)]  # fmt: skip
        seconds.append(perf_counter() - start)
        scores.append(figures_of(scorer, to_uint8(torch.cat(parts)), np.array(labels)))
    row: dict[str, Any] = {
        "method": method, "spacing": spacing, "steps": steps, "evaluations": sampler.steps, "seconds": median(seconds),
    }  # fmt: skip
    for name in FIGURES:
        values = [float(score[name]) for score in scores]
        row |= {name: mean(values), f"{name}_sd": stdev(values) if rounds > 1 else None}
    return row


def plot(rows: Sequence[dict[str, Any]], floor: float, path: Path) -> None:
    """Draw the Fréchet distance against evaluations, a line for each method and spacing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, spacing in dict.fromkeys((row["method"], row["spacing"]) for row in rows):
        own = [row for row in rows if (row["method"], row["spacing"]) == (method, spacing)]
        axes.errorbar(
            [row["evaluations"] for row in own], [row[FIGURES[0]] for row in own],
            [row[f"{FIGURES[0]}_sd"] or 0.0 for row in own], marker="o", capsize=3, label=f"{method}, {spacing}",
        )  # fmt: skip
    axes.axhline(floor, color="grey", linestyle="--", label="real digits, as many")
    axes.set(xscale="log", yscale="log", xlabel="evaluations of an image", ylabel="classifier Fréchet distance")
    axes.legend()
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--model", default="digits", help="a model of digits: digits, or what fastddpm.load reads")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = machine.parse(parser, arguments)
    model = fastddpm.load(options.model)
    scorer = Scorer(model.preset.unet.image_size)
    floor = real_at(scorer, options.images)
    print(f"real digits, as many: {floor[FIGURES[0]]:.4f}", flush=True)
    rows = []
    for method, spacing in CHAINS:
        for steps in options.steps:
            row = measure(model, scorer, method, spacing, steps, options.images, options.rounds)
            rows.append(row)
            figures = "  ".join(f"{name} {row[name]:.4f}" for name in FIGURES)
            print(f"{method:9} {spacing:8} {row['evaluations']:3}  {figures}  {row['seconds']:.1f} s", flush=True)
    machine.write(options, model=str(options.model), images=options.images, real=floor, rows=rows)
    if options.plot is not None:
        plot(rows, floor[FIGURES[0]], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
