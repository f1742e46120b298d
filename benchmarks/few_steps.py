"""How good images are after few evaluations of the network: methods, spacings, guidance and clipping, by noise key.

    python benchmarks/few_steps.py [--model digits] [--data DATA] [--chains dpm2m:logsnr ddim:even ..]
        [--steps 5 10 20 50] [--guidance 2 ..] [--clip on off] [--reference 100] [--images 256] [--rounds 3]
        [--precision fp32 bf16] [--plot FILE.png [--rows FILE.json ..]] [--out FILE.json]

Each of `--rounds` draws the same seeds with another noise key, and scores them. For digits the score is the classifier
Fréchet distance of benchmarks/digits.py, with the share of images that the classifier is confident of and recall; real
digits of that number are the floor. For other images it is the kernel distance, in thousandths, between features of
EfficientNet-Lite0 and those of 2,000 images of `--data`, whose floor is 0; and if they have classes, the share of
images that a linear classifier, fitted to the features of 4,000 others, recognises as the class asked for.
`evaluations`: steps that are left of those asked for, as a spacing may name a timestep twice; guidance doubles them for
the network. `seconds`: of drawing, medians over the rounds. With `--reference N` a row also has `distance`, the root
mean square difference of its images from those of N even steps of dpm2m, the same model's ODE solved nearly exactly,
which a method without noise aims at. A chain may also name its timesteps, descending: dpm2m:999,872,476,105,14,0.

With several precisions of the network (`--precision fp32 bf16`) all draw the same seeds with the same noise keys. A row
of a later one has `beside`, its difference from the first: of each score the mean over the keys, its standard deviation
over them, and that of the first's own scores, the spread that a difference must exceed to mean something; and `images`,
the root mean square difference of the images, whose values are in [-1, 1].
"""

import dataclasses
import json
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
from fastddpm.config import EngineConfig
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
DIGITS = ("classifier_frechet_distance", "confident_share", "recall", "recognised_share")
REAL_IMAGES = 2000
FITTED_IMAGES = 4000
RIDGE = 0.1  # of the features' unit variance

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
    """The kernel distance to images of `data`, times 1000, and if these have classes, how many are as asked for."""
    size, channels, classes = model.preset.unet.image_size, model.preset.unet.image_channels, model.unet.num_classes
    network = open_network("efficientnet-lite0", image_size=size)

    def features_of(images: np.ndarray) -> Tensor:
        return torch.cat([network(part).features for part in torch.from_numpy(images).split(AT_ONCE)])

    dataset = open_dataset(data, image_size=size, channels=channels)
    chosen = np.random.default_rng(0).permutation(len(dataset.images))[: REAL_IMAGES + FITTED_IMAGES]
    features = features_of(dataset.images[chosen])
    real, names, floor = features[:REAL_IMAGES], ["kernel_distance"], {"kernel_distance": 0.0}
    if classes:
        asked = torch.as_tensor(dataset.labels[chosen])
        recognise = probe(features[REAL_IMAGES:], asked[REAL_IMAGES:], classes)
        names.append("recognised_share")
        floor["recognised_share"] = float((recognise(real) == asked[:REAL_IMAGES]).double().mean())

    def score(drawn: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        features = features_of(drawn)
        found = {"kernel_distance": 1000 * kernel_distance(features, real)}
        if classes:
            found["recognised_share"] = float((recognise(features) == torch.from_numpy(labels)).double().mean())
        return found

    return Judge(score, names, floor)


def probe(features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """A linear classifier of features (N, D): ridge regression to the classes 0..classes-1."""
    x = features.double()
    centre, scale = x.mean(0), x.std(0) + 1e-6
    x = (x - centre) / scale
    target = torch.nn.functional.one_hot(labels.long(), classes).double() - 1 / classes
    weights = torch.linalg.solve(x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ target)
    return lambda other: ((other.double() - centre) / scale @ weights).argmax(1)


def draw(sampler: fastddpm.Sampler, images: int) -> Tensor:
    """Images of seeds 0..images-1, each of the class that `labels_for` gives it, float32 (N, C, H, W)."""
    return torch.cat([sampler.sample(range(i, min(i + AT_ONCE, images))) for i in range(0, images, AT_ONCE)])


def process(model: Model, *, clip: bool) -> fastddpm.Diffusion:
    return fastddpm.Diffusion(dataclasses.replace(model.preset.diffusion, clip_x0=clip))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The images of each noise key, float32 (N, C, H, W), the median seconds and evaluations that they took, scores."""

    images: list[Tensor]
    seconds: float
    evaluations: int
    scores: list[dict[str, float]]


def drawn(
    model: Model, judge: Judge, chain: str, steps: int, images: int, rounds: int, guidance: float, clip: bool,
    precision: str,
) -> Drawn:  # fmt: skip
    method, spacing = chain.split(":")
    found, seconds, scores = [], [], []
    for key in range(rounds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `evaluations` tells how many timesteps are left
            taken: dict[str, Any] = {"steps": steps, "spacing": spacing}
            if spacing[0].isdecimal():
                taken = {"timesteps": [int(t) for t in spacing.split(",")]}
            sampler = fastddpm.Sampler(
                model.unet, process(model, clip=clip), method=method, guidance=guidance, seed=key,
                engine=EngineConfig(precision=precision), **taken,
            )  # fmt: skip
        start = perf_counter()
        found.append(draw(sampler, images))
        seconds.append(perf_counter() - start)
        labels = sampler.labels_for(range(images)) or [0] * images
        scores.append(judge.score(to_uint8(found[-1]), np.array(labels)))
    return Drawn(found, median(seconds), sampler.steps, scores)


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
    precisions: Sequence[str] = ("auto",),
) -> list[dict[str, Any]]:
    """A row for each precision: mean and standard deviation of each figure over the rounds, and seconds of a round."""
    method, spacing = chain.split(":")
    rows: list[dict[str, Any]] = []
    first = None
    for precision in precisions:
        new = drawn(model, judge, chain, steps, images, rounds, guidance, clip, precision)
        row: dict[str, Any] = {
            "method": method, "spacing": spacing, "guidance": guidance, "clip": clip, "precision": precision,
            "steps": steps, "evaluations": new.evaluations, "seconds": new.seconds,
        }  # fmt: skip
        for name in judge.names:
            values = [float(score[name]) for score in new.scores]
            row |= {name: mean(values), f"{name}_sd": spread(values)}
        if references:
            row["distance"] = mean(map(rms, new.images, references))
        if first is not None:
            row["beside"] = beside(first, new, judge.names)
        first = first or new
        rows.append(row)
    return rows


def rms(images: Tensor, others: Tensor) -> float:
    return float((images - others).square().mean().sqrt())


def spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def beside(first: Drawn, other: Drawn, names: Sequence[str]) -> dict[str, Any]:
    """The differences of `other` from `first`, which has the same seeds and noise keys."""
    found: dict[str, Any] = {"images": mean(map(rms, other.images, first.images))}
    for name in names:
        before, after = ([float(score[name]) for score in one.scores] for one in (first, other))
        changes = [b - a for a, b in zip(before, after, strict=True)]
        found[name] = {"difference": mean(changes), "difference_sd": spread(changes), "first_sd": spread(before)}
    return found


def solutions(model: Model, steps: int, images: int, rounds: int, guidance: float, clip: bool) -> list[Tensor]:
    """The images of each noise key by `steps` even steps of dpm2m."""
    diffusion = process(model, clip=clip)
    samplers = (
        fastddpm.Sampler(model.unet, diffusion, steps, "dpm2m", guidance=guidance, seed=key) for key in range(rounds)
    )
    return [draw(sampler, images) for sampler in samplers]


def line_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What a line of the picture is of: method and spacing, and the precision if one was asked for."""
    precision = row.get("precision", "auto")
    return (row["method"], row["spacing"], *([] if precision == "auto" else [precision]))


def plot(rows: Sequence[dict[str, Any]], real: dict[str, Any], path: Path) -> None:
    """Draw the first score against evaluations: a panel for each guidance and clipping, a line for each chain."""
    from matplotlib.figure import Figure

    name = next(key for key in rows[0] if f"{key}_sd" in rows[0])
    panels = list(dict.fromkeys((row["guidance"], row["clip"]) for row in rows))
    chains = list(dict.fromkeys(map(line_of, rows)))
    figure = Figure(figsize=(1 + 5 * len(panels), 5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (guidance, clip) in zip(all_axes, panels, strict=True):
        for i, chain in enumerate(chains):
            own = [row for row in rows if (row["guidance"], row["clip"]) == (guidance, clip)]
            own = sorted((row for row in own if line_of(row) == chain), key=lambda row: row["evaluations"])
            axes.errorbar(
                [row["evaluations"] for row in own], [row[name] for row in own],
                [row[f"{name}_sd"] or 0.0 for row in own], color=f"C{i}", marker="o", capsize=3, label=", ".join(chain),
            )  # fmt: skip
        if real[name]:
            axes.axhline(real[name], color="grey", linestyle="--", label="real images, as many")
        axes.set(xscale="log", yscale="log", xlabel="evaluations of an image")
        axes.set_title(f"guidance {guidance:g}, x_0 {'clipped' if clip else 'not clipped'}")
        asked = sorted({row["steps"] for row in rows})
        axes.set_xticks(asked, [str(steps) for steps in asked])
        axes.tick_params(axis="x", which="minor", labelbottom=False)
    all_axes[0].set_ylabel(name.replace("_", " "))
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--model", default="digits", help="digits, or what fastddpm.load reads")
    parser.add_argument("--data", help="data set of a model of other images than digits, to compare with")
    parser.add_argument("--chains", nargs="*", default=CHAINS, help="METHOD:SPACING or METHOD:T,T,.. of each line; "
                        "none: only draw --rows")  # fmt: skip
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--guidance", type=float, nargs="+", help="default: the model's")
    parser.add_argument("--clip", nargs="+", choices=("on", "off"), default=["on"], help="clip x_0 predictions")
    parser.add_argument("--reference", type=int, default=0, help="steps of the ODE's solution; 0: none")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), nargs="+", default=["auto"])
    parser.add_argument("--plot", type=Path, help="picture to write")
    parser.add_argument("--rows", type=Path, nargs="+", default=[], help="files of --out to draw in it, too")
    options = machine.parse(parser, arguments)
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in options.rows]
    earlier = [row for document in documents for row in document["rows"]]
    if not options.chains and documents:
        plot(earlier, documents[0]["real"], options.plot)
        return 0
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
                    new = measure(
                        model, judge, chain, steps, options.images, options.rounds, guidance=guidance,
                        clip=clip == "on", references=references, precisions=options.precision,
                    )  # fmt: skip
                    rows += new
                    print("\n".join(_line(row, judge.names) for row in new), flush=True)
                    machine.write(options, model=str(options.model), images=options.images, real=judge.floor, rows=rows)
    if options.plot is not None:
        plot([*earlier, *rows], judge.floor, options.plot)
    return 0


def _line(row: dict[str, Any], names: Sequence[str]) -> str:
    figures = "  ".join(f"{name} {row[name]:.4f}" for name in names)
    precision = "" if row["precision"] == "auto" else f"{row['precision']} "
    settings = f"{row['method']:9} {row['spacing']:8} {precision}w {row['guidance']:g} clip {row['clip']:d}"
    distance = f"  distance {row['distance']:.4f}" if "distance" in row else ""
    lines = [f"{settings} {row['evaluations']:3}  {figures}{distance}  {row['seconds']:.1f} s"]
    if "beside" in row:
        lines.append(f"  beside the first precision: images {row['beside']['images']:.4f}")
        for name in names:
            found = {key: "-" if value is None else f"{value:.4f}" for key, value in row["beside"][name].items()}
            lines.append(f"    {name} {row['beside'][name]['difference']:+.4f} (sd of that {found['difference_sd']}, "
                         f"of the first's own {found['first_sd']})")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
