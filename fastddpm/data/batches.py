"""Batches on the training device."""

import os
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from fastddpm.errors import UsageError

from .dataset import Dataset
from .order import batch_indices
from .pack.format import PackedImages
from .workers import Workers, default_workers

RESIDENT_LIMIT_BYTES = 2 * 2**30
TIMEOUT_S = 60.0
AHEAD = 3  # batches decoded before they are asked for


class Batches:
    """The batch of any training step: `Batches(dataset, 128, seed, device).at(step)`.

    Decoded images of up to `resident_limit_bytes` live on the device as uint8; more are gathered from memory or disk.
    Those of a pack are decoded by `workers` processes (0: by this one; None: as many as there are processors, at most
    8), three batches ahead in `step`. With `world` processes, `batch` is that of all of them, and each gets its part
    `start`..`end`, contiguous and in the order of ranks. Which images a step has depends on nothing but `seed`, `batch`
    and the step. Raises DataError when there are fewer images than a batch, and from `at` for a damaged image or a
    worker that is killed or does not answer for `timeout_s`; UsageError for a rank without images.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        seed: int,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
        timeout_s: float = TIMEOUT_S,
        resident_limit_bytes: int = RESIDENT_LIMIT_BYTES,
    ) -> None:
        if not 0 <= rank < world or batch < world:
            raise UsageError(f"a batch of {batch} has no part for process {rank} of {world}")
        if workers is not None and workers < 0:
            raise UsageError(f"workers must be 0 or more; got {workers}")
        batch_indices(0, len(dataset.images), batch, seed)  # refuses a set that is too small before training starts
        self._dataset, self._batch, self._seed, self._device = dataset, batch, seed, device
        self.start, self.end = rank * batch // world, (rank + 1) * batch // world
        self._labels = None if dataset.labels is None else torch.from_numpy(np.array(dataset.labels)).to(device)
        self._resident: Tensor | None = None
        self._workers: Workers | None = None
        images = dataset.images
        if isinstance(images, PackedImages):
            here = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # torchrun's word for how many share the machine
            count = default_workers(here) if workers is None else workers
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
        """End the worker processes; without it they end with this object, or this process."""
        if self._workers is not None:
            self._workers.close()

    def at(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Images uint8 (end - start, C, H, W) and labels int64 or None of step `step`, on the device."""
        indices = self._indices(step)
        where = torch.from_numpy(indices.copy())
        if self._device.type == "cuda":  # a copy from memory that is not pinned would wait for the device
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
        """The images of this process in a step."""
        return batch_indices(step, len(self._dataset.images), self._batch, self._seed)[self.start : self.end]

    def _decoded(self, step: int) -> np.ndarray:
        """What the workers have made of a step; they go on with the next ones."""
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
