"""Data sets as uint8 arrays: the embedded digits, CIFAR-10, parquet, folders and zip files of images.

Importing this package does not import torch; `fastddpm.data.batches` does.
"""

from .dataset import Dataset
from .order import batch_indices, epoch_order
from .sources import open_dataset

__all__ = ["Dataset", "batch_indices", "epoch_order", "open_dataset"]
