"""Features of many images, in a directory of shards that several processes fill and that a killed run leaves whole.

    sampling.json       what determines the features; another setting is refused
    shard-00000.npz     features float32 (n, d), seeds int64 (n,), labels int64 (n,) and logits float32 (n, K) if any

The images themselves are never on the disk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastddpm.metrics.features import Activations, FeatureNetwork
from fastddpm.runlog import Meter
from fastddpm.shards import Shards

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
