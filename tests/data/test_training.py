"""Training from a pack."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.packs import numbered, packed

from fastddpm.config import DiffusionConfig, Preset, TrainConfig, UNetConfig
from fastddpm.data import Dataset
from fastddpm.storage import checkpoint
from fastddpm.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.slow
def test_training_from_a_pack_is_training_from_an_array(tmp_path: Path) -> None:
    """Bit for bit; with a resume in the middle of an epoch, from a pack, of what was trained from an array."""
    pixels, labels = numbered(103), [i % 7 for i in range(103)]
    unet = UNetConfig(
        image_size=8, width=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), groups=4, num_classes=7
    )
    preset = Preset("tiny", unet, DiffusionConfig(timesteps=20), TrainConfig(batch=12, seed=5, lr=1e-2, warmup=1))
    array = Dataset.of(pixels, np.array(labels), "array")
    pack = packed(tmp_path / "x.fdpack", pixels, labels)
    whole, first, second = (
        Trainer(preset, array, CPU),
        Trainer(preset, array, CPU),
        Trainer(preset, pack.dataset(), CPU),
    )
    losses = [float(whole.train_step()[0]) for _ in range(11)]
    halves = [float(first.train_step()[0]) for _ in range(5)]
    second.resume(checkpoint.load(first.save(tmp_path / "run", None)))
    halves += [float(second.train_step()[0]) for _ in range(6)]
    second.batches.close()
    assert halves == losses
    for name, tensor in whole.optimizer.averaged().items():
        assert tensor.equal(second.optimizer.averaged()[name]), name
