"""Networks with the options of other implementations are trained, estimated, saved, continued and coded as all are."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.architectures import EVERYTHING, TOGETHER
from helpers.training import CPU, whole_state

from fastddpm import codec
from fastddpm.config import CodecOptions, DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig
from fastddpm.data import Dataset
from fastddpm.errors import UsageError
from fastddpm.presets import write_preset
from fastddpm.pretrained import load
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import checkpoint
from fastddpm.training.dry_run import SavedActivations, block_shapes
from fastddpm.training.initial import fitted
from fastddpm.training.network_sizes import bytes_per_image
from fastddpm.training.trainer import Trainer
from fastddpm.unet import UNet

UNET = dataclasses.replace(EVERYTHING, image_channels=1, dropout=0.2)
DIFFUSION = DiffusionConfig(timesteps=20, variance="learned_range", loss="hybrid")


def trainer(**options: object) -> Trainer:
    train = TrainConfig(steps=2, batch=4, lr=1e-2, warmup=0, ema=0.5, save_every=1000, preview_every=0, **options)  # type: ignore[arg-type]
    pixels = np.random.default_rng(0).integers(0, 256, (8, *UNET.image_shape), dtype=np.uint8)
    dataset = Dataset.of(pixels, np.arange(8) % 3, "noise")
    return Trainer(Preset("wide", UNET, DIFFUSION, train, SampleConfig(steps=3)), dataset, CPU)


def test_training_saving_resuming_sampling_and_coding(tmp_path: Path) -> None:
    """Every weight is trained; recomputed blocks, and a run that was stopped, have the same bits."""
    whole = trainer()
    before = whole_state(whole)
    whole.run(tmp_path / "run", None)
    after = whole_state(whole)
    weights = [name for name in after if name.startswith("weight.")]
    assert [name for name in weights if torch.equal(before[name], after[name])] == []

    recomputed, stopped = trainer(checkpoint_blocks=True), trainer()
    for _ in range(2):
        recomputed.train_step()
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole_state(recomputed).items())
    stopped.train_step()
    stopped.save(tmp_path / "stopped", None)
    resumed = trainer()
    resumed.resume(checkpoint.load(tmp_path / "stopped"))
    resumed.train_step()
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole_state(resumed).items())

    write_preset(whole.preset, tmp_path / "run" / "config.json")
    model = load(tmp_path / "run")
    assert model.unet.config == UNET
    sampler = Sampler(model.unet, model.diffusion, steps=3)
    images = sampler.sample([5, 6], [0, 3])
    assert images.shape == (2, *UNET.image_shape) and bool(images.isfinite().all())
    pixels = whole.dataset.images[:2]
    coded = codec.encode(sampler, pixels, np.array([1, 2]), CodecOptions(steps=3))
    np.testing.assert_array_equal(codec.decode(sampler, coded.data).images, pixels)


def test_the_dry_run_lists_blocks_that_resample() -> None:
    unet = UNet(UNET)
    with block_shapes(unet) as shapes:
        unet(torch.zeros(1, *UNET.image_shape), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert shapes["down.0.resample"] == (1, 16, 4, 6) and shapes["up.1.resample"] == (1, 24, 8, 12)


@pytest.mark.parametrize("name", TOGETHER)
def test_the_estimate_of_memory_is_that_of_autograd(name: str) -> None:
    config = TOGETHER[name]
    unet = UNet(config)
    label = torch.zeros(1, dtype=torch.int64) if config.num_classes else None
    with SavedActivations(unet) as saved:
        unet(torch.zeros(1, *config.image_shape), torch.zeros(1, dtype=torch.int64), label)
    assert 0.4 < saved.num_bytes / bytes_per_image(config) <= 1.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("channels", (128, 256)), ("middle_attention", False), ("heads", 4), ("head_channels", 64),
        ("scale_shift", True), ("resample", "resblock"), ("downsample_padding", 1), ("norm_eps", 1e-5),
        ("freq_shift", 0), ("time_scale", 0.25),
    ],
)  # fmt: skip
def test_weights_of_another_architecture_do_not_fit(option: str, value: object) -> None:
    model = UNetConfig()
    with pytest.raises(UsageError, match=rf"do not fit: .*{option} is .* in the model and .* here"):
        fitted(dataclasses.replace(model, **{option: value}), model)  # type: ignore[arg-type]
