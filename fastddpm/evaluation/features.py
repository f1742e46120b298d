"""Features of many images, in a directory of shards that several processes fill and that a killed run leaves whole.

    sampling.json       what determines the features; another setting is refused
    shard-00000.npz     features float32 (n, d), seeds int64 (n,), labels int64 (n,) and logits float32 (n, K) if any

The images themselves are never on the disk.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastddpm.data.cache import default_directory
from fastddpm.errors import StorageError
from fastddpm.metrics.features import Activations, FeatureNetwork
from fastddpm.metrics.frechet import Moments
from fastddpm.runtime.progress import Meter
from fastddpm.storage.files import save_arrays
from fastddpm.storage.shards import Shards

from .context import EvaluationContext

SIZE = 512

Draw = Callable[[Sequence[int], Sequence[int] | None], Tensor]
"""Images uint8 (N, C, H, W) of seeds and, if any, labels."""


@dataclass(frozen=True)
class FeatureShards(Shards):
    """Shards with `dimension` features, and `classes` logits if any, of each image instead of the images.

    `shape`: of the images.
    """

    dimension: int
    classes: int

    def _names(self) -> list[str]:
        return ["features", "logits", "seeds"] if self.classes else ["features", "seeds"]

    def _mismatch(self, index: int, found: Mapping[str, np.ndarray]) -> str | None:
        seeds, _ = self.part(index)
        arrays = [found[name] for name in self._names() if name != "seeds"]
        shapes = [array.shape for array in arrays]
        wanted = [(len(seeds), self.dimension), *([(len(seeds), self.classes)] if self.classes else [])]
        if shapes != wanted or any(array.dtype != np.float32 for array in arrays):
            return f"has arrays {shapes}, not {wanted}"
        return None if np.array_equal(found["seeds"], seeds) else "has other seeds"

    def put(self, index: int, found: Activations) -> None:
        """Write a shard, onto the disk itself, whole or not at all; `StorageError` where that fails."""
        arrays = {"features": found.features.cpu().numpy()}
        if found.logits is not None:
            arrays["logits"] = found.logits.cpu().numpy()
        self.put_arrays(index, arrays)

    def activations(self, index: int) -> Activations:
        """The features and, if any, logits of a shard; errors of NumPy and zip for a damaged one."""
        with np.load(self.path(index), allow_pickle=False) as arrays:
            logits = torch.from_numpy(arrays["logits"]) if self.classes else None
            return Activations(torch.from_numpy(arrays["features"]), logits)

    def together(self) -> Activations:
        """All features and, if any, logits, in the order of the seeds."""
        parts = [self.activations(index) for index in range(len(self))]
        logits = torch.cat([part.logits for part in parts if part.logits is not None]) if self.classes else None
        return Activations(torch.cat([part.features for part in parts]), logits)

    def unfinished(self) -> int:
        """Images whose shards are not there yet, of all processes."""
        return sum(len(self.part(i)[0]) for i in range(len(self)) if not self.path(i).exists())


def fill(
    shards: FeatureShards, indices: Sequence[int], draw: Draw, network: FeatureNetwork, batch: int, title: str
) -> None:
    """Draw the images of `indices`, one shard after another and `batch` images at a time, and keep their features."""
    total = sum(len(shards.part(index)[0]) for index in indices)
    done = 0
    with Meter(title, total, "images") as meter:
        for index in indices:
            seeds, labels = shards.part(index)
            parts = []
            for start in range(0, len(seeds), batch):
                chosen = slice(start, start + batch)
                parts.append(network(draw(seeds[chosen], None if labels is None else labels[chosen])))
                done += len(parts[-1].features)
                meter.update(done, lambda rate: f"{rate:.2f} images/s")
            logits = [part.logits for part in parts if part.logits is not None]
            shards.put(
                index, Activations(torch.cat([p.features for p in parts]), torch.cat(logits) if logits else None)
            )


# The features of the data set that samples are compared with

_MOMENTS = "moments.npz"


def reference_shards(context: EvaluationContext, network: FeatureNetwork, cache: Path | None = None) -> FeatureShards:
    """The shards, perhaps unfinished, of the context's data set: every image once, unmirrored, in its order.

    In `cache`, ~/.cache/fastddpm unless given; in the context's directory where that cannot be written.
    """
    dataset = context.dataset
    count, *shape = dataset.images.shape
    settings = {"data": dataset.checksum, "features": {"name": network.name, "sha256": network.checksum}}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    folders = [cache or default_directory(), context.out]
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


def fill_reference(context: EvaluationContext, network: FeatureNetwork, shards: FeatureShards) -> None:
    """This process's part of the data set's features; what is there already stays."""
    group = context.group

    def images(indices: Sequence[int], _: Sequence[int] | None) -> Tensor:
        chosen = np.array(context.dataset.images[indices[0] : indices[-1] + 1])  # a copy: a memory map is read-only
        return torch.from_numpy(chosen).to(context.device)

    with shards.locked(group.rank, lambda: _say(f"another process is filling {shards.directory}: waiting for it")):
        missing, damaged = shards.missing(group.rank, group.world_size)
        for line in damaged:
            _say(line)
        if missing:
            fill(shards, missing, images, network, context.batch, f"features of {context.dataset.name}")


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
    moments = Moments.of_batches(shards.activations(index).features for index in range(len(shards)))
    save_arrays(
        {"count": np.array(moments.count), "mean": moments.mean.numpy(), "product": moments.product.numpy()}, path
    )
    return moments


def _say(line: str) -> None:
    print(line, file=sys.stderr)
