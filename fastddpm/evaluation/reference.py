"""The features of the data set that samples are compared with, kept in the cache by the checksums of both."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastddpm.data.cache import default_directory
from fastddpm.errors import StorageError
from fastddpm.files import save_arrays
from fastddpm.metrics.features import FeatureNetwork
from fastddpm.metrics.frechet import Moments

from .feature_shards import SIZE, FeatureShards, fill
from .subject import Subject

_MOMENTS = "moments.npz"


def reference_shards(subject: Subject, network: FeatureNetwork, cache: Path | None = None) -> FeatureShards:
    """The shards, perhaps unfinished, of the subject's data set: every image once, unmirrored, in its order.

    In `cache`, ~/.cache/fastddpm unless given; in the subject's directory where that cannot be written.
    """
    dataset = subject.dataset
    count, *shape = dataset.images.shape
    settings = {"data": dataset.checksum, "features": {"name": network.name, "sha256": network.checksum}}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    folders = [cache or default_directory(), subject.out]
    for folder in folders:
        shards = FeatureShards(
            folder / "reference" / key, range(count), None, SIZE, (shape[0], shape[1], shape[2]),
            network.dimension, network.classes,
        )  # fmt: skip
        try:
            shards.claim(settings)
            return shards
        except StorageError:
            if folder is folders[-1]:
                raise
    raise AssertionError("unreachable")


def fill_reference(subject: Subject, network: FeatureNetwork, shards: FeatureShards) -> None:
    """This process's part of the data set's features; what is there already stays."""
    place = subject.place

    def images(indices: Sequence[int], _: Sequence[int] | None) -> Tensor:
        chosen = np.array(subject.dataset.images[indices[0] : indices[-1] + 1])  # a copy: a memory map is read-only
        return torch.from_numpy(chosen).to(subject.device)

    with shards.locked(place.rank, lambda: _say(f"another process is filling {shards.directory}: waiting for it")):
        missing, damaged = shards.missing(place.rank, place.count)
        for line in damaged:
            _say(line)
        if missing:
            fill(shards, missing, images, network, subject.batch, f"features of {subject.dataset.name}")


def reference_moments(shards: FeatureShards) -> Moments:
    """Mean and covariance of finished shards, kept beside them."""
    path = shards.directory / _MOMENTS
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, product = (torch.from_numpy(arrays[name]) for name in ("mean", "product"))
            return Moments(int(arrays["count"]), mean, product)
    except Exception as error:  # a damaged header can raise nearly anything
        if path.exists():
            _say(f"{path} is damaged ({type(error).__name__}); gathering it again")
    moments = Moments.gathered(shards.activations(index).features for index in range(len(shards)))
    save_arrays(
        {"count": np.array(moments.count), "mean": moments.mean.numpy(), "product": moments.product.numpy()}, path
    )
    return moments


def _say(line: str) -> None:
    print(line, file=sys.stderr)
