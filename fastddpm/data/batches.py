"""Batches on the training device."""

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset
from .order import batch_indices

RESIDENT_LIMIT_BYTES = 2 * 2**30


class Batches:
    """The batch of any training step: `Batches(dataset, 128, seed, device).at(step)`.

    A data set of up to `resident_limit_bytes` lives on the device as uint8; a larger one is gathered from
    memory or disk. Raises DataError when there are fewer images than a batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        seed: int,
        device: torch.device,
        *,
        resident_limit_bytes: int = RESIDENT_LIMIT_BYTES,
    ) -> None:
        self._dataset, self._batch, self._seed, self._device = dataset, batch, seed, device
        batch_indices(0, len(dataset.images), batch, seed)  # refuses a set that is too small before training starts
        self._labels = None if dataset.labels is None else torch.from_numpy(np.array(dataset.labels)).to(device)
        self._resident: Tensor | None = None
        if dataset.images.nbytes <= resident_limit_bytes:
            self._resident = torch.from_numpy(np.array(dataset.images)).to(device)

    def at(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Images uint8 (B, C, H, W) and labels int64 (B,) or None of step `step`, on the device."""
        indices = batch_indices(step, len(self._dataset.images), self._batch, self._seed)
        where = torch.from_numpy(indices.copy()).to(self._device)
        labels = None if self._labels is None else self._labels[where]
        if self._resident is not None:
            return self._resident[where], labels
        images = torch.from_numpy(self._dataset.images[indices])
        if self._device.type == "cuda":
            images = images.pin_memory()
        return images.to(self._device, non_blocking=True), labels
