"""Data sets of images: decoded once into uint8 arrays, or kept encoded in a pack and decoded during training.

Importing this package does not import torch; `fastddpm.data.batches` does. docs/data.md describes formats and
guarantees.
"""

from .dataset import Dataset
from .order import batch_indices, epoch_order
from .sources import open_dataset

__all__ = ["Dataset", "batch_indices", "epoch_order", "open_dataset"]
