"""The order of examples, beside an independent Philox, and batches on the device."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import oracle

from fastddpm.data import Dataset, batch_indices, epoch_order
from fastddpm.data.batches import Batches
from fastddpm.errors import DataError
from fastddpm.kernels.philox import STREAM_ORDER

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("num", "seed", "epoch"), [(1, 0, 0), (2, 7, 3), (257, -5, 1), (5000, 2**40, 2**31), (3790, 192, 0)]
)
def test_order_is_a_sort_by_philox_keys(num: int, seed: int, epoch: int) -> None:
    """In the last case the high words of two keys are equal, and the low words decide."""
    words = oracle.philox((np.zeros(num), np.arange(num), np.full(num, epoch), np.full(num, STREAM_ORDER)), seed)
    keys = [(int(w[0]) << 32) + int(w[1]) for w in words]
    expected = sorted(range(num), key=keys.__getitem__)  # Python's sort is stable
    order = epoch_order(num, seed, epoch)
    assert order.dtype == np.int64 and order.tolist() == expected
    assert sorted(expected) == list(range(num))


def test_order_never_changes_between_versions() -> None:
    """A run that is resumed with a later version must see the same examples, so the order is known by heart."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [0, 1, 3, 5, 2, 9, 4, 8, 6, 7]
    assert epoch_order(10, seed=0, epoch=1).tolist() == [7, 1, 4, 6, 2, 5, 9, 3, 0, 8]
    assert epoch_order(10, seed=1, epoch=0).tolist() == [5, 6, 2, 7, 0, 8, 9, 4, 3, 1]


def test_order_cannot_be_changed_by_its_reader() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 0, 0)[0] = 3


def test_every_image_is_equally_often_in_every_place() -> None:
    places = np.array([epoch_order(8, 11, epoch) for epoch in range(4000)])
    counts = np.stack([(places == image).sum(0) for image in range(8)])  # (image, place), expected 500 each
    # 64 counts with 49 degrees of freedom.
    assert scipy.stats.chi2.sf(((counts - 500) ** 2 / 500).sum(), 49) > 1e-4


def test_an_epoch_has_each_image_once_and_drops_the_rest() -> None:
    num, batch = 103, 10
    for epoch in range(3):
        steps = [batch_indices(epoch * 10 + i, num, batch, seed=4) for i in range(10)]
        np.testing.assert_array_equal(np.concatenate(steps), epoch_order(num, 4, epoch)[:100])
        assert len(set(np.concatenate(steps).tolist())) == 100


def test_fewer_images_than_a_batch() -> None:
    message = "5 images are fewer than a batch of 128; use --batch 5 or fewer, or more images"
    with pytest.raises(DataError, match=message):
        batch_indices(0, 5, 128, 0)
    with pytest.raises(DataError, match=message):
        Batches(data_set(5), 128, 0, torch.device("cpu"))
    assert sorted(batch_indices(17, 5, 5, 0).tolist()) == [0, 1, 2, 3, 4]


def data_set(num: int, labels: bool = True) -> Dataset:
    rng = np.random.default_rng(num)
    images = rng.integers(0, 256, (num, 3, 4, 4), dtype=np.uint8)
    return Dataset.of(images, np.arange(num) % 7 if labels else None, "random")


def check_batches(dataset: Dataset, device: torch.device, limit: int) -> None:
    batches = Batches(dataset, 8, 5, device, resident_limit_bytes=limit)
    for step in (0, 1, 4, 5, 6, 1000):
        images, labels = batches.at(step)
        chosen = batch_indices(step, len(dataset.images), 8, 5)
        assert images.device.type == device.type and images.dtype == torch.uint8
        np.testing.assert_array_equal(images.cpu().numpy(), dataset.images[chosen])
        if dataset.labels is None:
            assert labels is None
        else:
            assert labels is not None and labels.dtype == torch.int64 and labels.device.type == device.type
            np.testing.assert_array_equal(labels.cpu().numpy(), dataset.labels[chosen])


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("limit", [0, 2**20])
def test_batches_are_the_examples_of_the_step(labels: bool, limit: int) -> None:
    check_batches(data_set(43, labels), torch.device("cpu"), limit)


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [0, 2**20])
def test_batches_on_a_gpu(limit: int) -> None:
    check_batches(data_set(43), torch.device("cuda"), limit)


def test_batches_from_a_read_only_memory_map(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    whole = data_set(43)
    np.save(tmp_path / "images.npy", whole.images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for limit in (0, 2**20):
        check_batches(Dataset.of(mapped, whole.labels, "mapped"), torch.device("cpu"), limit)
    assert not recwarn.list  # torch warns of tensors that share read-only memory


def test_importing_the_data_package_needs_neither_torch_nor_pyarrow() -> None:
    program = (
        "import sys; from fastddpm.data import open_dataset; open_dataset(None, image_size=16, channels=1);"
        "print(sorted({'torch', 'pyarrow'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
