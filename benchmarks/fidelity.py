"""Our scores beside torch-fidelity's and SciPy's on the same features, and our Inception beside torch-fidelity's.

    pip install --no-deps torch-fidelity==0.4.0 && python benchmarks/fidelity.py --json FILE

Scores: the Fréchet distance on well- and ill-conditioned covariances and on fewer samples than dimensions, the
Inception Score, the kernel distance on the same subsets, precision and recall. Networks: the same random weights, since
the published ones are not needed to compare two implementations. Not a test: torch-fidelity is not one of the project's
requirements, and it imports torchvision, for which an empty module stands in here. Times are of the processor, by one
thread: other work on the machine does not count.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy
import scipy.linalg
import torch
from torch import Tensor, nn

from fastddpm.metrics import (
    Moments,
    frechet_distance,
    inception,
    inception_score,
    kernel_distance,
    open_network,
    precision_recall,
)

CASES = {  # dimensions, samples of either set, decades over which the covariance's eigenvalues are spread
    "64 dimensions": (64, 2000, 1500, 0.0),
    "64 dimensions, 6 decades": (64, 2000, 1500, 6.0),
    "64 dimensions, 12 decades": (64, 2000, 1500, 12.0),
    "256 dimensions, 100 and 150 samples": (256, 100, 150, 0.0),
    "256 dimensions, 100 and 2000 samples, 4 decades": (256, 100, 2000, 4.0),
    "2048 dimensions, 1000 and 3000 samples": (2048, 1000, 3000, 2.0),
}
SIZES = (28, 32, 64, 299)


def import_torch_fidelity() -> ModuleType:
    """torch_fidelity, with an empty torchvision where there is none: nothing of it is used here."""
    if importlib.util.find_spec("torchvision") is None:
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            sys.modules[name] = ModuleType(name)
        for name in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(sys.modules["torchvision.datasets"], name, object)
    return importlib.import_module("torch_fidelity")


def drawn(rng: np.random.Generator, count: int, dimension: int, decades: float, rotation: np.ndarray) -> Tensor:
    scales = np.logspace(0, -decades / 2, dimension)
    return torch.from_numpy(
        (rng.normal(size=(count, dimension)) * scales) @ rotation + 0.1 * rng.normal(size=dimension)
    )


def frechet_rows() -> dict[str, dict[str, float]]:
    """Each case by all; `by_factors` is exact to rounding: from the features' QR factors, without a covariance."""
    from torch_fidelity import metric_fid

    rows = {}
    for name, (dimension, count_a, count_b, decades) in CASES.items():
        rng = np.random.default_rng(0)
        rotation, _ = np.linalg.qr(rng.normal(size=(dimension, dimension)))
        a, b = (drawn(rng, count, dimension, decades, rotation) for count in (count_a, count_b))
        start = time.process_time()
        ours = frechet_distance(Moments.of_batches(a.split(512)), Moments.of_batches(b.split(512)))
        seconds = time.process_time() - start
        statistics = [metric_fid.fid_features_to_statistics(z) for z in (a, b)]
        start = time.process_time()
        theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]
        their_seconds = time.process_time() - start
        covariances = [z["sigma"] for z in statistics]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        shift = statistics[0]["mu"] - statistics[1]["mu"]
        by_root = float(shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root))
        exact = by_factors(a.numpy(), b.numpy())
        rows[name] = {
            "ours": ours, "torch_fidelity": theirs, "sqrtm": by_root, "by_factors": exact,
            "relative_to_torch_fidelity": abs(ours / theirs - 1), "relative_to_sqrtm": abs(ours / by_root - 1),
            "relative_to_factors": abs(ours / exact - 1), "torch_fidelity_relative_to_factors": abs(theirs / exact - 1),
            "cpu_seconds": seconds, "torch_fidelity_cpu_seconds": their_seconds,
        }  # fmt: skip
        print(f"{name}: {rows[name]}", file=sys.stderr)
    return rows


def by_factors(a: np.ndarray, b: np.ndarray) -> float:
    r, s = (np.linalg.qr(z - z.mean(0), mode="r") / np.sqrt(len(z) - 1) for z in (a, b))
    cross = np.linalg.svd(r @ s.T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (r**2).sum() + (s**2).sum() - 2 * cross)


def score_rows() -> dict[str, dict[str, Any]]:
    """The other scores on features of 64 dimensions and logits of 1008 classes."""
    from torch_fidelity import metric_isc, metric_kid, metric_prc

    rng = np.random.default_rng(1)
    logits = torch.from_numpy(3 * rng.normal(size=(5000, 1008)))
    a, b = (torch.from_numpy(rng.normal(size=(n, 64)) + shift) for n, shift in ((2000, 0.0), (1500, 0.1)))
    isc = metric_isc.isc_features_to_metric(logits, splits=10, shuffle=False)
    # Its subsets are its own; one of all 1500 of as many points is the only one there is, and has no bias either.
    kid_options = {"kid_subsets": 1, "kid_subset_size": 1500, "verbose": False, "rng_seed": 0}
    kid = metric_kid.kid_features_to_metric(a[:1500], b, **kid_options)[metric_kid.KEY_METRIC_KID_MEAN]
    prc = metric_prc.prc_features_to_metric(a, b, verbose=False)
    precision, recall = precision_recall(b, a)
    pairs = {
        "inception_score": (inception_score(logits)[0], isc[metric_isc.KEY_METRIC_ISC_MEAN]),
        "inception_score_std": (inception_score(logits)[1], isc[metric_isc.KEY_METRIC_ISC_STD]),
        "kernel_distance": (kernel_distance(a[:1500], b), kid),
        "precision": (precision, prc["precision"]),
        "recall": (recall, prc["recall"]),
    }
    return {
        name: {"ours": ours, "torch_fidelity": theirs, "relative": abs(ours / theirs - 1)}
        for name, (ours, theirs) in pairs.items()
    }


def randomized(module: nn.Module) -> nn.Module:
    """Weights that keep the signal's size, statistics of normalization away from the identity."""
    torch.manual_seed(0)
    for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
        elif name.endswith(("running_var", "bn.weight")):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.1)
    return module.eval()


def network_rows() -> dict[str, Any]:
    """Largest difference of features and logits, relative to the largest value, on images of several sizes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(randomized(inception.InceptionV3()).state_dict(), path)
        ours = open_network(str(path), image_size=32)
        theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    rows: dict[str, Any] = {}
    for size in SIZES:
        images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
        pairs = zip(("features", "logits"), ours(images), theirs(images), strict=True)
        rows[f"{size}x{size}"] = {name: float((x - y).abs().max() / y.abs().max()) for name, x, y in pairs}
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    for name, network in (("images_per_cpu_second", ours), ("torch_fidelity_images_per_cpu_second", theirs)):
        rows[name] = len(images) / _cpu_seconds(lambda network=network: network(images))
    return rows


def _cpu_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our scores beside torch-fidelity's and SciPy's.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_torch_fidelity()
    with redirect_stdout(sys.stderr):
        figures: dict[str, Any] = {"frechet": frechet_rows(), "scores": score_rows(), "inception": network_rows()}
    figures |= {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.platform()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "scipy": scipy.__version__, "torch-fidelity": importlib.metadata.version("torch-fidelity"),
        },
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
