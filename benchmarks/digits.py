"""How good are generated digits? A small classifier judges them beside held-out real digits and noise.

    python benchmarks/digits.py SAMPLES.npz [--json FILE]

SAMPLES.npz holds `images`, uint8 (N, 1, S, S), and perhaps `labels`, int64 (N,), the classes that were asked for.

The scorer is three nets of fastddpm.metrics.digits trained on 4,000 of the embedded digits at the samples' size; 1,000
are held out. Half of those, the probe, plays the part of the samples; the other half is the reference that everything
is compared with, and on which the temperature is fitted. The nets have seen random fields without a class, and the
figures for noise say whether that worked. Of 1,000 held-out digits at 16x16 about 93% are given a class with more than
0.9, of either noise none; without the fields it is 93% of the digits, 2% of shuffled digits, and all uniform noise.
Training takes about 25 s of one core.

Confidence alone is fooled by one good digit repeated: the classifier Fréchet distance, recall and the entropy of the
classes show that. None of them shows copies of the training set, and a model trained on all 5,000 has seen the probe.
"""

import argparse
import json
import math
import platform
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fastddpm.data import open_dataset
from fastddpm.errors import DataError, FastddpmError, UsageError
from fastddpm.metrics.digits import CLASSES, EPOCHS, SEEDS, SMALLEST, held_out_halves, to_float, train_net
from fastddpm.metrics.frechet import Moments, frechet_distance
from fastddpm.metrics.precision_recall import NEIGHBOURS, precision_recall

CONFIDENT = 0.9
DRAWS = 20  # of as many real digits as there are samples, for the floor and its spread
LIKENESS = ("classifier_frechet_distance", "precision", "recall")


@dataclass(frozen=True, eq=False)
class Judgement:
    """Probabilities (N, 10), the mean over the nets, and each net's features (N, 32), all float64."""

    probabilities: np.ndarray
    features: list[np.ndarray]


class Scorer:
    """Nets trained at one image size, their temperature, and the held-out digits they are checked with.

    `reference` and `probe` are judgements of half the held-out digits each, `probe_images` uint8 (500, 1, S, S).
    Features are scaled so that the reference's total variance is 1 for every net.
    """

    def __init__(self, size: int, seeds: Sequence[int] = SEEDS, epochs: int = EPOCHS) -> None:
        digits = open_dataset(None, image_size=size, channels=1)
        images, labels = digits.images, digits.labels
        assert labels is not None
        train, reference, probe = held_out_halves(labels)
        self.nets = [train_net(images[train], labels[train], seed, epochs) for seed in seeds]
        self.size, self.temperature, self._scales = size, 1.0, [1.0] * len(seeds)
        features, logits = self._run(images[reference])
        self._scales = [1 / math.sqrt(f.var(axis=0, ddof=1).sum()) for f in features]
        self.temperature = fit_temperature(logits, labels[reference])
        self.reference, self.probe = self(images[reference]), self(images[probe])
        self.reference_labels, self.probe_labels = labels[reference], labels[probe]
        self.probe_images = images[probe]

    def __call__(self, images: np.ndarray) -> Judgement:
        """Scorer uint8 images (N, 1, size, size)."""
        features, logits = self._run(images)
        return Judgement(_mean_probabilities(logits, self.temperature), features)

    @torch.inference_mode()
    def _run(self, images: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Scaled features, and logits (nets, N, 10)."""
        features, logits = [], []
        for net, scale in zip(self.nets, self._scales, strict=True):
            parts = [net(to_float(images[i : i + 500])) for i in range(0, len(images), 500)]
            features.append(torch.cat([f for f, _ in parts]).double().numpy() * scale)
            logits.append(torch.cat([z for _, z in parts]).double().numpy())
        return features, np.stack(logits)


def _mean_probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    return F.softmax(torch.from_numpy(logits) / temperature, dim=-1).mean(0).numpy()


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T for which softmax(logits / T), averaged over the nets, gives `labels` the least negative log-likelihood.

    `logits` float64 (nets, N, 10); T is within 1% of the best in [1/4, 4] (Guo et al. 2017, section 4.2).
    """
    grid, rows = np.geomspace(0.25, 4, 279), np.arange(len(labels))
    return float(max(grid, key=lambda t: np.log(_mean_probabilities(logits, t)[rows, labels]).mean()))


def _confidence(probabilities: np.ndarray, asked: np.ndarray | None) -> dict[str, Any]:
    """Shares of confident and of rightly recognised images, and how the images spread over the classes."""
    found = probabilities.argmax(axis=1)
    counts = np.bincount(found, minlength=CLASSES)
    shares = counts[counts > 0] / len(found)
    return {
        "images": len(found),
        "confident_share": float((probabilities.max(axis=1) > CONFIDENT).mean()),
        "recognised_share": None if asked is None else float((found == asked).mean()),
        "class_counts": counts.tolist(),
        "class_entropy_bits": float(-(shares * np.log2(shares)).sum()) + 0.0,
    }


def _likeness(reference: list[np.ndarray], features: list[np.ndarray]) -> dict[str, float]:
    """Distance to the reference, precision and recall: the mean over the nets."""
    pairs = [(torch.from_numpy(r), torch.from_numpy(f)) for r, f in zip(reference, features, strict=True)]
    rows = [(frechet_distance(Moments.of(f), Moments.of(r)), *precision_recall(r, f)) for r, f in pairs]
    return dict(zip(LIKENESS, np.mean(rows, axis=0).tolist(), strict=True))


def real_at(scorer: Scorer, count: int) -> dict[str, Any]:
    """Mean and standard deviation over `DRAWS` draws of `count` probe digits, at most all 500: what real digits get."""
    rng = np.random.default_rng(0)
    count = min(count, len(scorer.probe_labels))
    rows = []
    for _ in range(DRAWS):
        chosen = rng.choice(len(scorer.probe_labels), count, replace=False)
        row = _confidence(scorer.probe.probabilities[chosen], scorer.probe_labels[chosen])
        rows.append(row | _likeness(scorer.reference.features, [f[chosen] for f in scorer.probe.features]))
    names = [name for name in rows[0] if name not in ("images", "class_counts")]
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    spreads = {f"{name}_sd": float(np.std([row[name] for row in rows])) for name in names}
    return {"images": count, "draws": DRAWS} | means | spreads


def _real_all(scorer: Scorer) -> dict[str, Any]:
    """All held-out digits; their likeness is the probe's, since the reference cannot be compared with itself."""
    probabilities = np.concatenate([scorer.probe.probabilities, scorer.reference.probabilities])
    labels = np.concatenate([scorer.probe_labels, scorer.reference_labels])
    return _confidence(probabilities, labels) | _likeness(scorer.reference.features, scorer.probe.features)


def noise_images(scorer: Scorer, count: int) -> dict[str, np.ndarray]:
    """Uniform uint8 noise, and probe digits with each one's pixels in an order of its own; fixed by a seed."""
    rng = np.random.default_rng(1)
    digits = scorer.probe_images[rng.choice(len(scorer.probe_images), count, replace=count > len(scorer.probe_images))]
    return {
        "uniform_noise": rng.integers(0, 256, digits.shape, dtype=np.uint8),
        "shuffled_digits": rng.permuted(digits.reshape(count, -1), axis=1).reshape(digits.shape),
    }


def check_samples(images: np.ndarray, labels: np.ndarray | None) -> None:
    """Raise `DataError` unless images are uint8 (N > 3, 1, S, S), S >= 8, and labels (N,) integers in 0..9."""
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[1] != 1 or shape[2] != shape[3] or shape[2] < SMALLEST:
        raise DataError(f"images must be uint8 (N, 1, S, S) with S >= {SMALLEST}; got {images.dtype} {shape}")
    if len(images) <= NEIGHBOURS:
        raise DataError(f"at least {NEIGHBOURS + 1} images are needed to compare their spread; got {len(images)}")
    if labels is None:
        return
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(f"labels must be integers ({len(images)},); got {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise DataError(f"labels must be digits 0..{CLASSES - 1}; got {labels.min()}..{labels.max()}")


def score(images: np.ndarray, labels: np.ndarray | None = None, scorer: Scorer | None = None) -> dict[str, Any]:
    """Figures for samples, as many real digits, all held-out digits, and two kinds of noise.

    `images` uint8 (N, 1, S, S); `labels` int64 (N,), the classes asked for; without `scorer` one is trained for S.
    The distance is biased upward at small N: compare `samples` with `real_at_this_size`, its floor.
    Raises `DataError` for images or labels of another kind, or a scorer of another size.
    """
    check_samples(images, labels)
    if scorer is None:
        scorer = Scorer(images.shape[-1])
    elif scorer.size != images.shape[-1]:
        raise DataError(f"the scorer was trained on {scorer.size}x{scorer.size} images; got {images.shape}")
    rows = {"samples": figures_of(scorer, images, labels)}
    rows |= {"real_at_this_size": real_at(scorer, len(images)), "real_held_out": _real_all(scorer)}
    rows |= {name: figures_of(scorer, noise, None) for name, noise in noise_images(scorer, len(images)).items()}
    return {"confident_above": CONFIDENT, "nets": len(scorer.nets), "temperature": scorer.temperature, "sets": rows}


def figures_of(scorer: Scorer, images: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Confidence and likeness of `images`, as in a row of `score`."""
    found = scorer(images)
    return _confidence(found.probabilities, labels) | _likeness(scorer.reference.features, found.features)


def _table(sets: dict[str, dict[str, Any]]) -> str:
    keys = ("confident_share", *LIKENESS, "class_entropy_bits", "recognised_share")
    titles = (f"p>{CONFIDENT}", "Fréchet", "precision", "recall", "entropy", "as asked")
    lines = [f"{'':18}{'images':>8}" + "".join(f"{title:>11}" for title in titles)]
    for name, row in sets.items():
        cells = ["-" if row[key] is None else f"{row[key]:.3f}" for key in keys]
        lines.append(f"{name:18}{row['images']:8}" + "".join(f"{cell:>11}" for cell in cells))
        if "draws" in row:
            lines.append(f"{'  sd of the draws':26}" + "".join(f"{row[f'{key}_sd']:11.3f}" for key in keys))
    return "\n".join(lines)


def load_samples(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """`images` and, if there, `labels` of an .npz; `DataError` when it cannot be read or has no images."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["images"], file.get("labels")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not an .npz with an array `images`: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Score generated digits with a small classifier.")
    parser.add_argument("samples", type=Path, metavar="SAMPLES.npz", help="images uint8 (N, 1, S, S), perhaps labels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors are small: two threads take longer than one
    try:
        images, labels = load_samples(options.samples)
        check_samples(images, labels)
        if options.json and not options.json.parent.is_dir():
            raise UsageError(f"--json {options.json}: there is no folder {options.json.parent}; make it first")
        print(f"training {len(SEEDS)} nets on digits of this size...", file=sys.stderr)
        figures = score(images, labels)
    except FastddpmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(_table(figures["sets"]))
    print("classes of the samples, 0..9:", *figures["sets"]["samples"]["class_counts"])
    if options.json:
        figures |= {
            "samples": str(options.samples),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": platform.platform(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
