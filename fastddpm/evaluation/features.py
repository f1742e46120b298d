"""Features of samples and of data sets, in a directory of shards that several processes fill and that can be resumed.

    sampling.json       the settings that determine the features; other settings are refused
    shard-00000.npz     features float32 (n, d), seeds int64 (n,), labels int64 (n,) and logits float32 (n, K) if any

The images themselves are not written to disk.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastddpm.data.cache import default_directory
from fastddpm.errors import DataError, StorageError
from fastddpm.metrics.features import Activations, FeatureNetwork
from fastddpm.metrics.frechet import Moments
from fastddpm.metrics.networks import open_network
from fastddpm.runtime.distributed import all_gather_object
from fastddpm.runtime.image_size import image_size
from fastddpm.runtime.progress import Meter, announced, discard, log
from fastddpm.sampling.trajectories import parts
from fastddpm.storage.files import save_arrays
from fastddpm.storage.reading import read_arrays
from fastddpm.storage.shards import Shards

from .context import EvaluationContext

SIZE = 512  # images in a shard
_MOMENTS = "moments.npz"

ImagesOf = Callable[[Sequence[int], Sequence[int] | None], Iterable[np.ndarray]]
"""Returns the images, uint8 (n, C, H, W), of seeds and labels (None without classes), batch by batch."""

# Shards of features


@dataclass(frozen=True)
class FeatureShards(Shards):
    """Shards that hold features, and logits if `classes` > 0, instead of images.

    `dimension`: features of an image. `classes`: logits of an image, 0 for none. `shape`: (C, H, W) of the images.
    """

    dimension: int
    classes: int

    def _names(self) -> list[str]:
        return ["features", "logits", "seeds"] if self.classes else ["features", "seeds"]

    def _num_bytes(self, num: int) -> int:
        return num * (4 * (self.dimension + self.classes) + 8)

    def _mismatch(self, index: int, found: Mapping[str, np.ndarray]) -> str | None:
        seeds, _ = self.part(index)
        arrays = [found[name] for name in self._names() if name != "seeds"]
        shapes = [array.shape for array in arrays]
        wanted = [(len(seeds), self.dimension), *([(len(seeds), self.classes)] if self.classes else [])]
        if shapes != wanted or any(array.dtype != np.float32 for array in arrays):
            return f"has arrays {shapes}, not {wanted}"
        return None if np.array_equal(found["seeds"], seeds) else "has other seeds"

    def put(self, index: int, found: Activations) -> None:
        """Write a shard and sync it to disk, completely or not at all. Raises `StorageError` on failure."""
        arrays = {"features": found.features.cpu().numpy()}
        if found.logits is not None:
            arrays["logits"] = found.logits.cpu().numpy()
        self.put_arrays(index, arrays)

    def activations(self, index: int) -> Activations:
        """Return the features and logits of a shard. Raises as `arrays` does."""
        arrays = self.arrays(index)
        logits = torch.from_numpy(arrays["logits"]) if self.classes else None
        return Activations(torch.from_numpy(arrays["features"]), logits)

    def together(self) -> Activations:
        """Return the features and logits of all shards, in the order of the seeds."""
        parts = [self.activations(index) for index in range(len(self))]
        logits = torch.cat([part.logits for part in parts if part.logits is not None]) if self.classes else None
        return Activations(torch.cat([part.features for part in parts]), logits)

    def unfinished(self) -> int:
        """Return the number of images whose shards do not exist yet, of all processes."""
        return sum(len(self.part(i)[0]) for i in range(len(self)) if not self.path(i).exists())


def fill(
    shards: FeatureShards,
    indices: Sequence[int],
    images_of: ImagesOf,
    network: FeatureNetwork,
    device: torch.device,
    title: str,
) -> None:
    """Write the features of the shards `indices`, one shard after another; no more than a batch of images is in memory.

    `title`: of the progress meter.
    """
    total = sum(len(shards.part(index)[0]) for index in indices)
    with Meter(title, total, "images") as meter:
        for index in indices:
            found = []
            for images in images_of(*shards.part(index)):
                found.append(network(torch.from_numpy(images).to(device)))
                meter.update(meter.done + len(images), lambda rate: f"{rate:.2f} images/s")
            logits = [part.logits for part in found if part.logits is not None]
            features = torch.cat([part.features for part in found])
            shards.put(index, Activations(features, torch.cat(logits) if logits else None))


def missing_shards(context: EvaluationContext, shards: Shards) -> tuple[list[int], list[str]]:
    """Return what `Shards.missing` returns for this process, saying so if it takes long: it reads all shards."""
    group = context.group
    with announced(f"checking the shards in {shards.directory}", log if group.is_main else discard):
        return shards.missing(group.rank, group.world_size)


# Features of the data set that samples are compared with


def reference_shards(context: EvaluationContext, network: FeatureNetwork, cache: Path | None = None) -> FeatureShards:
    """Return the shards of the data set's features, complete or not: every image once, unmirrored, in its order.

    `cache`: their parent directory. Default: ~/.cache/fastddpm, or `context.out` if that cannot be written.
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
    """Compute this process's missing shards of the data set's features."""
    group = context.group

    def images_of(indices: Sequence[int], _: Sequence[int] | None) -> Iterator[np.ndarray]:
        for part in parts(len(indices), context.batch):
            # A copy, because a memory map is read-only.
            yield np.array(context.dataset.images[indices[part][0] : indices[part][-1] + 1])

    with shards.locked(group.rank, lambda: log(f"another process is filling {shards.directory}; waiting for it")):
        missing, damaged = missing_shards(context, shards)
        for line in damaged:
            log(line)
        if missing:
            fill(shards, missing, images_of, network, context.device, f"features of {context.dataset.name}")


def reference_moments(shards: FeatureShards) -> Moments:
    """Return the moments of complete shards, which are kept in a file beside them."""
    path = shards.directory / _MOMENTS
    try:
        return _moments(path, shards)
    except FileNotFoundError:
        pass
    except DataError as error:
        log(f"{error}; computing it again")
    moments = Moments.of_batches(shards.activations(index).features for index in range(len(shards)))
    save_arrays(
        {"count": np.array(moments.count), "mean": moments.mean.numpy(), "product": moments.product.numpy()}, path
    )
    return moments


def _moments(path: Path, shards: FeatureShards) -> Moments:
    """Read the moments of shards. Raises `FileNotFoundError`, and `DataError` if they are of others or damaged."""
    size = shards.dimension
    arrays = read_arrays(path, ["count", "mean", "product"], 8 * size * (size + 2) + 2**16)
    count, mean, product = (arrays[name] for name in ("count", "mean", "product"))
    found = [(array.dtype, array.shape) for array in (mean, product)]
    if found != [(np.float64, (size,)), (np.float64, (size, size))] or count.shape or count != len(shards.seeds):
        raise DataError(f"{path} holds the moments of other features")
    return Moments(int(count), torch.from_numpy(mean), torch.from_numpy(product))


def open_on_main_first(name: str, context: EvaluationContext, report: Callable[[str], None]) -> FeatureNetwork:
    """Open the feature network `name`. Rank 0 may have to train it; the others then find it in the cache."""
    size, network = image_size(context.sampler.interface.shape[1:]), None
    for main_rank in (True, False):
        if context.group.is_main == main_rank:
            with announced(f"opening the feature network {name}", report):
                network = open_network(name, image_size=size, device=context.device, report=log)
        all_gather_object(None, context.group)
    assert network is not None
    return network
