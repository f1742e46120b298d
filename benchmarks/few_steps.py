"""How good images are after few evaluations of the network: methods, spacings, guidance and clipping, by noise key.

    python benchmarks/few_steps.py [--model digits] [--data DATA] [--chains dpm2m:logsnr ddim:even ..]
        [--steps 5 10 20 50] [--guidance 2 ..] [--clip on off] [--reference 100] [--images 256] [--rounds 3]
        [--plot FILE.png] [--out FILE.json]

Each of `--rounds` draws the same seeds with another noise key, and scores them. For digits the score is the classifier
Fréchet distance of benchmarks/digits.py, with the share of images that the classifier is confident of and recall; real
digits of that number are the floor. For other images it is the kernel distance, in thousandths, between features of
EfficientNet-Lite0 and those of 2,000 images of `--data`; it has no floor but 0. `evaluations`: steps that are left of
those asked for, as a spacing may name a timestep twice; guidance doubles them for the network. `seconds`: of drawing,
medians over the rounds. With `--reference N` a row also has `distance`, the root mean square difference of its images
from those of N even steps of dpm2m, the same model's ODE solved nearly exactly, which a method without noise aims at. A
chain may also name its timesteps, descending: dpm2m:999,872,476,105,14,0.
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastddpm
from fastddpm.data import open_dataset
from fastddpm.metrics.kid import kernel_distance
from fastddpm.metrics.networks import open_network
from fastddpm.pretrained.model import Model
from fastddpm.sampling.images import to_uint8

sys.path.insert(0, str(Path(__file__).parent))
import machine
from digits import Scorer, figures_of, real_at

CHAINS = [
    "ancestral:even", "ddim:even", "ddim:trailing", "dpm2m:even", "dpm2m:logsnr", "dpm2m:trailing", "dpm2m-sde:even",
    "dpm2m-sde:logsnr",
]  # fmt: skip
AT_ONCE = 64
DIGITS = ("classifier_frechet_distance", "confident_share", "recall")
REAL_IMAGES = 2000

Score = Callable[[np.ndarray, np.ndarray], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Judge:
    """`score` of images uint8 (N, C, H, W) asked to be of classes (N,), its `names`, best first, and real `floor`."""

    score: Score
    names: Sequence[str]
    floor: dict[str, Any]


def of_digits(scorer: Scorer, images: int) -> Judge:
    return Judge(lambda drawn, labels: figures_of(scorer, drawn, labels), DIGITS, real_at(scorer, images))


def of_data(data: str, model: Model) -> Judge:
    """The kernel distance to the first images of `data`, times 1000."""
    channels, size, _ = model.unet.image_shape
    network = open_network("efficientnet-lite0", image_size=size)
    images = torch.from_numpy(open_dataset(data, image_size=size, channels=channels).images[:REAL_IMAGES])
    real = network(images).features

    def score(drawn: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"kernel_distance": 1000 * kernel_distance(network(torch.from_numpy(drawn)).features, real)}

    return Judge(score, ["kernel_distance"], {"kernel_distance": 0.0})


def draw(sampler: fastddpm.Sampler, labels: Sequence[int] | None, images: int) -> Tensor:
    """Images of seeds 0..images-1, float32 (N, C, H, W)."""
    batches = [range(i, min(i + AT_ONCE, images)) for i in range(0, images, AT_ONCE)]
    return torch.cat([sampler.sample(b, None if labels is None else [labels[i] for i in b]) for b in batches])


def measure(
    model: Model,
    judge: Judge,
    chain: str,
    steps: int,
    images: int,
    rounds: int,
    *,
    guidance: float,
    clip: bool = True,
    references: Sequence[Tensor] = (),
) -> dict[str, Any]:
    """One row: mean and standard deviation of each figure over the rounds, and the seconds of a round."""
    method, spacing = chain.split(":")
    classes = model.unet.num_classes
    labels = [seed % classes for seed in range(images)] if classes else None
    diffusion = fastddpm.Diffusion(dataclasses.replace(model.preset.diffusion, clip_x0=clip))
    scores: list[dict[str, float]] = []
    seconds, distances = [], []
    for key in range(rounds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `evaluations` tells how many timesteps are left
            taken: dict[str, Any] = {"steps": steps, "spacing": spacing}
            if spacing[0].isdecimal():
                taken = {"timesteps": [int(t) for t in spacing.split(",")]}
            sampler = fastddpm.Sampler(model.unet, diffusion, method=method, guidance=guidance, seed=key, **taken)
        start = perf_counter()
        drawn = draw(sampler, labels, images)
        seconds.append(perf_counter() - start)
        scores.append(judge.score(to_uint8(drawn), np.array(labels or [0] * images)))
        if references:
            distances.append(float((drawn - references[key]).square().mean().sqrt()))
    row: dict[str, Any] = {
        "method": method, "spacing": spacing, "guidance": guidance, "clip": clip, "steps": steps,
        "evaluations": sampler.steps, "seconds": median(seconds),
    }  # fmt: skip
    for name in judge.names:
        values = [float(score[name]) for score in scores]
        row |= {name: mean(values), f"{name}_sd": stdev(values) if rounds > 1 else None}
    return row | ({"distance": mean(distances)} if distances else {})


def solutions(model: Model, steps: int, images: int, rounds: int, guidance: float, clip: bool) -> list[Tensor]:
    """The images of each noise key by `steps` even steps of dpm2m."""
    classes = model.unet.num_classes
    labels = [seed % classes for seed in range(images)] if classes else None
    diffusion = fastddpm.Diffusion(dataclasses.replace(model.preset.diffusion, clip_x0=clip))
    samplers = (
        fastddpm.Sampler(model.unet, diffusion, steps, "dpm2m", guidance=guidance, seed=key) for key in range(rounds)
    )
    return [draw(sampler, labels, images) for sampler in samplers]


def plot(rows: Sequence[dict[str, Any]], judge: Judge, path: Path) -> None:
    """Draw the first score against evaluations, a line for each method and spacing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    name = judge.names[0]
    for key in dict.fromkeys((row["method"], row["spacing"], row["guidance"], row["clip"]) for row in rows):
        own = [row for row in rows if (row["method"], row["spacing"], row["guidance"], row["clip"]) == key]
        axes.errorbar(
            [row["evaluations"] for row in own], [row[name] for row in own], [row[f"{name}_sd"] or 0.0 for row in own],
            marker="o", capsize=3, label=f"{key[0]}, {key[1]}",
        )  # fmt: skip
    if judge.floor[name]:
        axes.axhline(judge.floor[name], color="grey", linestyle="--", label="real images, as many")
    axes.set(xscale="log", yscale="log", xlabel="evaluations of an image", ylabel=name.replace("_", " "))
    axes.legend()
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--model", default="digits", help="digits, or what fastddpm.load reads")
    parser.add_argument("--data", help="data set of a model of other images than digits, to compare with")
    parser.add_argument("--chains", nargs="+", default=CHAINS, help="METHOD:SPACING or METHOD:T,T,.. of each line")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--guidance", type=float, nargs="+", help="default: the model's")
    parser.add_argument("--clip", nargs="+", choices=("on", "off"), default=["on"], help="clip x_0 predictions")
    parser.add_argument("--reference", type=int, default=0, help="steps of the ODE's solution; 0: none")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--plot", type=Path, help="picture to write")
    options = machine.parse(parser, arguments)
    model = fastddpm.load(options.model)
    if options.data is None:
        judge = of_digits(Scorer(model.preset.unet.image_size), options.images)
    else:
        judge = of_data(options.data, model)
    print("real images: " + "  ".join(f"{name} {judge.floor[name]:.4f}" for name in judge.names), flush=True)
    rows = []
    for guidance in options.guidance or [model.preset.sample.guidance]:
        for clip in options.clip:
            references = []
            if options.reference:
                references = solutions(model, options.reference, options.images, options.rounds, guidance, clip == "on")
            for chain in options.chains:
                for steps in options.steps:
                    row = measure(
                        model, judge, chain, steps, options.images, options.rounds,
                        guidance=guidance, clip=clip == "on", references=references,
                    )  # fmt: skip
                    rows.append(row)
                    print(_line(row, judge.names), flush=True)
                    machine.write(options, model=str(options.model), images=options.images, real=judge.floor, rows=rows)
    if options.plot is not None:
        plot(rows, judge, options.plot)
    return 0


def _line(row: dict[str, Any], names: Sequence[str]) -> str:
    figures = "  ".join(f"{name} {row[name]:.4f}" for name in names)
    settings = f"{row['method']:9} {row['spacing']:8} w {row['guidance']:g} clip {row['clip']:d}"
    distance = f"  distance {row['distance']:.4f}" if "distance" in row else ""
    return f"{settings} {row['evaluations']:3}  {figures}{distance}  {row['seconds']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
