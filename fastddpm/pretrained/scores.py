"""The scores of a model: metrics.json as text, with definitions and the paper's figures. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastddpm.errors import DataError
from fastddpm.storage.documents import read_object

FILE = "metrics.json"
_BITS = ("bpd", "ode-bpd")

# The paper's numbers, tables 1 to 3 and section 4.1, by preset, metric and split. A split of None: any split.
_PAPER: dict[tuple[str, str, str | None], str] = {
    ("cifar10", "fid", "train"): "3.17",
    ("cifar10", "fid", "test"): "5.24",
    ("cifar10", "inception_score", None): "9.46 ± 0.11",
    ("cifar10", "bpd", "train"): "≤ 3.72",
    ("cifar10", "bpd", "test"): "≤ 3.75",
    ("cifar10", "rate-distortion", "test"): "1.78 bits/dim at RMSE 0.95",
    ("lsun256", "fid", "train"): "Church 7.89, Bedroom 6.36, Cat 19.75",
    ("lsun256-large", "fid", "train"): "Bedroom 4.90",
}

# Of each metric, without the feature network that a name may end in, as in "recall[digits]".
DEFINITIONS = {
    "fid": "Fréchet distance between Gaussians fitted to the Inception features of samples and of images. Lower is "
    "better, 0 is best.",
    "frechet_distance": "Fréchet distance as in FID, but of the features of the network in brackets. It is not FID and "
    "compares only with scores of the same network. Lower is better, 0 is best.",
    "inception_score": "exp of the mean KL divergence from the class probabilities that Inception gives to all samples "
    "to those of one sample, ± the standard deviation over splits. Higher is better, 1 is worst.",
    "classifier_score": "The Inception Score, but of the classifier in brackets. It compares only with scores of the "
    "same network. Higher is better, 1 is worst.",
    "kid": "Squared maximum mean discrepancy of the Inception features with the kernel (x·y/d + 1)³, ± the standard "
    "deviation over subsets. Lower is better, 0 is best.",
    "kernel_distance": "The kernel distance as in KID, but of the features of the network in brackets. Lower is "
    "better, 0 is best.",
    "precision": "Fraction of samples among the images: nearer to an image than its k-th nearest image, in the "
    "features of the network in brackets. Higher is better, 1 is best.",
    "recall": "Fraction of images among the samples: nearer to a sample than its k-th nearest sample, in the features "
    "of the network in brackets. Higher is better, 1 is best.",
    "bpd": "Variational bound on the negative log-likelihood of the images, in bits per dimension, ± its standard "
    "error. Lower is better.",
    "ode-bpd": "Negative log-likelihood of the images by the probability-flow ODE, in bits per dimension, ± its "
    "standard error. Lower is better.",
    "rate-distortion": "Bits per dimension of a progressive code, which are the bound without L_0, and the root mean "
    "square error, in levels of 255, of the images that it gives. Lower is better, both.",
}


@dataclass(frozen=True)
class Score:
    """A result in metrics.json. `value`: its number, None if it is not finite. The other fields are text.

    `measured`: value, error and unit. `paper`: the paper's figure, empty if there is none. `data`: the samples and
    images that were measured. `data_name`: the data set alone. `date`: of the measurement, ISO 8601. `definition`:
    empty for a name that is not known.
    """

    name: str
    split: str
    value: float | None
    measured: str
    paper: str
    data: str
    data_name: str
    date: str
    definition: str


@dataclass(frozen=True)
class Scores:
    """A metrics.json: scores of the weights with the sha256 `network`, after `step` training steps (None: unknown)."""

    network: str
    step: int | None
    scores: tuple[Score, ...]


def read_scores(path: Path) -> Scores:
    """Return the content of a metrics.json.

    Raises `FileNotFoundError`, and `DataError` if the file is damaged.
    """
    document = read_object(path)
    check(document, path)
    checkpoint = document["checkpoint"]
    step = checkpoint.get("step")
    scores = tuple(
        Score(
            name=name,
            split=split,
            value=record["bits_per_dim"] if name in _BITS else record["rate" if name == "rate-distortion" else "value"],
            measured=measured(name, record),
            paper=in_paper(str(checkpoint.get("preset")), name, split),
            data=measured_data(record),
            data_name=str(record["data"]["name"]),
            date=str(record.get("date", "")),
            definition=DEFINITIONS.get(name.partition("[")[0], ""),
        )
        for split in ("train", "test")
        for name, record in document.get(split, {}).items()
    )
    return Scores(checkpoint["network"], step if type(step) is int else None, scores)


def in_paper(preset: str, name: str, split: str) -> str:
    """Return the paper's figure of a metric for a preset; empty if there is none."""
    return _PAPER.get((preset, name, split)) or _PAPER.get((preset, name, None)) or ""


def measured(name: str, record: Mapping[str, Any]) -> str:
    """Return the value of a metric as text, with its error if it has one."""
    if name in _BITS:
        error = record["standard_error"]  # None for a single image
        return _number(record["bits_per_dim"]) + (f" ± {error:.4f}" if error is not None else "") + " bits/dim"
    if name == "rate-distortion":
        return f"{_number(record['rate'])} bits/dim at RMSE {_number(record['rmse'])}"
    return f"{record['value']:.5g}" + (f" ± {record['std']:.3g}" if "std" in record else "")


def _number(value: float | None) -> str:
    """Format with four decimals. None stands for NaN and infinity, which JSON cannot hold."""
    return "not finite" if value is None else f"{value:.4f}"


def measured_data(record: Mapping[str, Any]) -> str:
    """Return a description of the images and samples that were measured."""
    data = record["data"]["name"]
    if "samples" not in record:
        return f"{record['num_images']:,} images of {data}"
    sampling = record["sampling"]
    chain = f"{record['samples']:,} samples, {sampling['method']}, {sampling['steps']} steps"
    count = record["reference_images"]  # None if only statistics are known, and not of how many images
    return f"{chain}; {data}" if count is None else f"{chain}; {count:,} images of {data}"


def check(document: Mapping[str, Any], path: Path) -> None:
    """Raise `DataError` unless a metrics.json has the fields, of the types, that texts are made of."""
    checkpoint = document.get("checkpoint")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("network"), str):
        raise DataError(f"{path} is damaged: it does not name its network")
    for part in ("train", "test", "pictures"):
        records = document.get(part, {})
        if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
            raise DataError(f"{path} is damaged: {part} holds no results by name")
        for name, record in records.items() if part != "pictures" else ():
            try:
                measured(name, record)
                measured_data(record)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path} is damaged: {part} has no valid {name} ({error!r:.100})") from error
