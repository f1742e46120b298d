"""What guidance by a trained classifier does to digits that are drawn without a class: as asked, and like digits.

    python -m fastddpm.classifier digits --steps 2500 --batch 32 --out CLASSIFIER
    python benchmarks/classifier_guidance.py CLASSIFIER [--scales 0 1 3 10] [--images 64] [--steps 40]
        [--method ancestral] [--out FILE.json]

The network of the digits model gets its label for "none" (guidance 0); only the classifier of noisy images knows which
digit is asked for. All scales draw the same seeds. Scores are those of benchmarks/digits.py, by classifiers of clean
digits that the guiding one has nothing to do with: the share of images recognised as the digit asked for, and the
Fréchet distance to held-out digits, beside as many real ones. At scale 0 nothing is asked for. The last row is
classifier-free guidance of the same network, which was trained with the classes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import fastddpm
from fastddpm.sampling.images import to_uint8

sys.path.insert(0, str(Path(__file__).parent))
import machine
from digits import Scorer, figures_of, real_at

AT_ONCE = 64
FIGURES = ("recognised_share", "confident_share", "classifier_frechet_distance", "recall")


def measure(sampler: fastddpm.Sampler, scorer: Scorer, images: int) -> dict[str, Any]:
    """The figures of `images` images of digits 0, 1, .. 9, 0, .., and the seconds of drawing them."""
    labels = [seed % 10 for seed in range(images)]
    start = perf_counter()
    parts = [
        sampler.sample(range(i, min(i + AT_ONCE, images)), labels[i : i + AT_ONCE]) for i in range(0, images, AT_ONCE)
    ]
    seconds = perf_counter() - start
    found = figures_of(scorer, to_uint8(torch.cat(parts)), np.array(labels))
    return {name: found[name] for name in FIGURES} | {"seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("classifier", type=Path, help="directory that python -m fastddpm.classifier digits wrote")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 3.0, 10.0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--method", choices=("ancestral", "ddim", "dpm2m", "dpm2m-sde"), default="ancestral")
    options = machine.parse(parser, arguments)
    model, classifier = fastddpm.load("digits"), fastddpm.Classifier.from_pretrained(options.classifier)
    scorer = Scorer(model.preset.unet.image_size)
    floor = real_at(scorer, options.images)
    print("real digits, as many: " + "  ".join(f"{name} {floor[name]:.3f}" for name in FIGURES), flush=True)
    chains: list[tuple[str, dict[str, Any]]] = [
        (f"classifier, scale {scale:g}", {"guidance": 0.0, "cond_fn": classifier.cond_fn(scale)})
        for scale in options.scales
    ]
    chains.append(("classifier-free, scale 2", {"guidance": 2.0}))
    rows = []
    for name, guided in chains:
        sampler = fastddpm.Sampler(model.unet, model.diffusion, options.steps, options.method, **guided)
        rows.append({"guidance": name, **measure(sampler, scorer, options.images)})
        print(f"{name:26}" + "  ".join(f"{figure} {rows[-1][figure]:.3f}" for figure in FIGURES), flush=True)
    weights = classifier.cond_fn().settings()["classifier"]
    machine.write(
        options, classifier=weights, images=options.images, method=options.method, steps=options.steps, real=floor,
        rows=rows,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
