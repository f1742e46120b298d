"""Batches on the training device."""

from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from fastddpm.errors import UsageError
from fastddpm.runtime.distributed import local_world_size

from .dataset import Dataset
from .order import batch_indices, check_batch
from .pack.format import PackedImages
from .workers import Workers, default_workers

RESIDENT_LIMIT_BYTES = 2 * 2**30
TIMEOUT_S = 60.0
AHEAD = 3  # batches that workers decode before they are needed


class Batches:
    """Training batches by step, in any order of steps: `Batches(dataset, 128, seed, device).at(step)`.

    The images of a step depend on `seed`, `batch` and the step only. Decoded images of up to `resident_limit_bytes`
    (default: 2 GiB) are kept on the device as uint8; larger sets are gathered from memory or disk. Images of a pack are
    decoded by `workers` processes, three batches ahead. `workers`: default one per processor, at most 8, divided by the
    training processes on this machine; 0: decode in this process.

    `batch` is the global batch of `world_size` ranks. Rank `rank` gets its images `start`..`end` - 1: parts are
    contiguous and in the order of ranks.

    Raises DataError if there are fewer images than a batch, UsageError for a rank without images, and from `at`
    DataError for a damaged image or for a worker that is killed or does not answer for `timeout_s` seconds.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        seed: int,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        timeout_s: float = TIMEOUT_S,
        resident_limit_bytes: int = RESIDENT_LIMIT_BYTES,
    ) -> None:
        if not 0 <= rank < world_size or batch < world_size:
            raise UsageError(f"a batch of {batch} has no images for rank {rank} of {world_size}; use a larger --batch")
        if workers is not None and workers < 0:
            raise UsageError(f"workers must be 0 or more; got {workers}")
        check_batch(len(dataset.images), batch)
        self._dataset, self._batch, self._seed, self._device = dataset, batch, seed, device
        self.start, self.end = rank * batch // world_size, (rank + 1) * batch // world_size
        self._labels = None if dataset.labels is None else torch.from_numpy(np.array(dataset.labels)).to(device)
        self._resident: Tensor | None = None
        self._workers: Workers | None = None
        images = dataset.images
        if isinstance(images, PackedImages):
            count = default_workers(local_world_size(world_size)) if workers is None else workers
            if count:
                rows = self.end - self.start
                self._workers = Workers(images, rows, num_workers=count, slots=AHEAD, timeout_s=timeout_s)
        elif images.nbytes <= resident_limit_bytes:
            self._resident = torch.from_numpy(np.array(images)).to(device)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. They also end when this object is deleted or this process ends."""
        if self._workers is not None:
            self._workers.close()

    def at(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Return the images uint8 (end - start, C, H, W) and the labels int64 (end - start,) or None of `step`.

        Both are on the device.
        """
        indices = self._indices(step)
        where = torch.from_numpy(indices.copy())
        if self._device.type == "cuda":  # a copy from pageable memory would wait for the device
            where = where.pin_memory()
        where = where.to(self._device, non_blocking=True)
        labels = None if self._labels is None else self._labels[where]
        if self._resident is not None:
            return self._resident[where], labels
        images = torch.from_numpy(self._decoded(step) if self._workers else self._dataset.images[indices])
        if self._device.type == "cuda":
            images = images.pin_memory()
        return images.to(self._device, non_blocking=True), labels

    def _indices(self, step: int) -> np.ndarray:
        """Return the numbers of this rank's images in a step, int64 (end - start,)."""
        return batch_indices(step, len(self._dataset.images), self._batch, self._seed)[self.start : self.end]

    def _decoded(self, step: int) -> np.ndarray:
        """Return the pixels of a step from the workers, and submit the steps after it."""
        assert self._workers is not None
        self._ahead(range(step, step + AHEAD))
        pixels = self._workers.take(step)
        self._ahead(range(step + 1, step + 1 + AHEAD))
        return pixels

    def _ahead(self, wanted: range) -> None:
        assert self._workers is not None
        for step in wanted:
            if not self._workers.has(step):
                self._workers.submit(step, self._indices(step), wanted)
