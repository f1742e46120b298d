"""What guidance by a trained classifier does to images that are drawn without a class: as asked, and like real ones.

    python -m fastddpm.classifier digits --steps 2500 --batch 32 --out CLASSIFIER
    python benchmarks/classifier_guidance.py CLASSIFIER [--model digits] [--data DATA] [--scales 0 1 3 10]
        [--free 2] [--images 64] [--steps 40] [--method ancestral] [--out FILE.json]

The network gets its label for "none" (guidance 0); only the classifier of noisy images knows which class is asked for.
All scales draw the same seeds. Scores are those of benchmarks/few_steps.py, by classifiers of clean images that the
guiding one has nothing to do with: the share of images recognised as the class asked for, and the distance to real
images, beside as many real ones. At scale 0 nothing is asked for. The last row is classifier-free guidance of the same
network, which was trained with the classes, at scale `--free`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import fastddpm
from fastddpm.sampling.images import to_uint8

sys.path.insert(0, str(Path(__file__).parent))
import machine
from digits import Scorer
from few_steps import Judge, draw, of_data, of_digits

DIGITS = ("recognised_share", "confident_share", "classifier_frechet_distance", "recall")


def measure(sampler: fastddpm.Sampler, judge: Judge, names: Sequence[str], images: int) -> dict[str, Any]:
    """The figures `names` of images of the classes 0, 1, .., again and again, and the seconds of drawing them."""
    start = perf_counter()
    drawn = draw(sampler, images)
    seconds = perf_counter() - start
    found = judge.score(to_uint8(drawn), np.array(sampler.labels_for(range(images))))
    return {name: found[name] for name in names} | {"seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("classifier", type=Path, help="directory that python -m fastddpm.classifier wrote")
    parser.add_argument("--model", default="digits", help="digits, or what fastddpm.load reads")
    parser.add_argument("--data", help="data set of a model of other images than digits, to compare with")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 3.0, 10.0])
    parser.add_argument("--free", type=float, default=2.0, help="scale of classifier-free guidance")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--method", choices=("ancestral", "ddim", "dpm2m", "dpm2m-sde"), default="ancestral")
    options = machine.parse(parser, arguments)
    model, classifier = fastddpm.load(options.model), fastddpm.Classifier.from_pretrained(options.classifier)
    if options.data is None:
        judge = of_digits(Scorer(model.preset.unet.image_size), options.images)
        names: Sequence[str] = DIGITS
    else:
        judge = of_data(options.data, model)
        names = judge.names
    print("real images: " + "  ".join(f"{name} {judge.floor[name]:.3f}" for name in names), flush=True)
    chains: list[tuple[str, dict[str, Any]]] = [
        (f"classifier, scale {scale:g}", {"guidance": 0.0, "cond_fn": classifier.cond_fn(scale)})
        for scale in options.scales
    ]
    chains.append((f"classifier-free, scale {options.free:g}", {"guidance": options.free}))
    rows = []
    for name, guided in chains:
        sampler = fastddpm.Sampler(model.unet, model.diffusion, options.steps, options.method, **guided)
        rows.append({"guidance": name, **measure(sampler, judge, names, options.images)})
        print(f"{name:26}" + "  ".join(f"{figure} {rows[-1][figure]:.3f}" for figure in names), flush=True)
    weights = classifier.cond_fn().settings()["classifier"]
    machine.write(
        options, classifier=weights, model=str(options.model), images=options.images, method=options.method,
        steps=options.steps, real=judge.floor, rows=rows,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
