"""--compile in several processes: DDP around a compiled network trains as DDP around the network itself."""

import dataclasses
import shutil

import numpy as np
import pytest
from helpers import team
from helpers.training import CPU, noise_images, tiny_preset

from fastddpm.data import Dataset
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.training.trainer import Trainer

pytestmark = pytest.mark.slow

STEPS = 3


def curve(group: ProcessGroup, compiled: bool) -> tuple[list[tuple[float, float]], int]:
    """(loss, gradient norm) of each step, and how many graphs were compiled; one level of 4x4: little to compile."""
    from torch._dynamo.utils import counters

    preset = tiny_preset(compile=compiled)
    unet = dataclasses.replace(preset.unet, image_size=4, multipliers=(1,), attention_resolutions=(), groups=2, width=8)
    noise = noise_images()
    dataset = Dataset(noise.images[:, :, :4, :4].copy(), noise.labels, noise.name, noise.checksum)
    trainer = Trainer(dataclasses.replace(preset, unet=unet), dataset, CPU, group)
    steps = [trainer.train_step()[:2] for _ in range(STEPS)]
    return [(loss.item(), norm.item()) for loss, norm in steps], counters["stats"]["unique_graphs"]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_networks_in_two_processes_train_as_the_plain_ones() -> None:
    """To the order of summation in float32; both processes hold the same bits, and compile one graph for all steps."""
    (plain, none), _ = team.values(2, team.grouped, curve, False)
    compiled = team.values(2, team.grouped, curve, True)
    assert none == 0 and [graphs for _, graphs in compiled] == [1, 1]
    assert compiled[0][0] == compiled[1][0]
    np.testing.assert_allclose(compiled[0][0], plain, rtol=1e-5)
    assert np.ptp(plain, axis=0).min() > 0.01  # the steps differ
