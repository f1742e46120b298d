"""Previews from the moving average: the sampler's images, without copies, by one process or several."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.networks import TINY, Formula, shaken, tiny
from helpers.team import grouped, values
from PIL import Image

from fastddpm.config import DiffusionConfig, Preset, SampleConfig
from fastddpm.diffusion import Diffusion
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling.guidance import Guidance
from fastddpm.sampling.images import grid, to_uint8
from fastddpm.sampling.sampler import Sampler
from fastddpm.training.samples import Previews, guidance_of
from fastddpm.unet import UNet, network_with

PRESET = Preset("x", TINY, DiffusionConfig(timesteps=50), sample=SampleConfig(steps=30))
DIFFUSION = Diffusion(PRESET.diffusion)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(3)
    return shaken(UNet(TINY))  # type: ignore[return-value]


def weights_of(unet: UNet) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in unet.named_parameters()}


def drawn(unet: UNet, seeds: range, steps: int = 5) -> np.ndarray:
    return to_uint8(Sampler(unet, DIFFUSION, steps, "ddim").sample(seeds))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_network_with_given_weights_shares_them(unet: UNet) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    weights = {name: p.clone() for name, p in weights_of(unet).items()}
    view = network_with(TINY, weights)
    assert torch.equal(torch.get_rng_state(), before) and not view.training
    assert {p.data_ptr() for p in view.parameters()} == {w.data_ptr() for w in weights.values()}
    sampler = Sampler(view, DIFFUSION, 3, "ddim")
    first = sampler.sample([0])
    assert torch.equal(first, Sampler(unet, DIFFUSION, 3, "ddim").sample([0]))
    with torch.no_grad():
        torch._foreach_mul_(list(weights.values()), 1.1)
        torch._foreach_mul_(list(unet.parameters()), 1.1)
    second = sampler.sample([0])  # notices that they have changed
    assert not torch.equal(first, second)
    assert torch.equal(second, Sampler(unet, DIFFUSION, 3, "ddim").sample([0]))


def test_a_preview_is_the_grid_of_the_first_seeds_by_ddim(unet: UNet, tmp_path: Path) -> None:
    previews = Previews(tmp_path, PRESET, every=10, steps=5, count=6)
    path = previews.draw(30, network_with(TINY, weights_of(unet)), DIFFUSION)
    assert path == tmp_path / "previews" / "step-00000030.png"
    expected = np.asarray(grid(drawn(unet, range(6))))
    np.testing.assert_array_equal(pixels(path), expected)
    np.testing.assert_array_equal(pixels(tmp_path / "preview.png"), expected)
    with torch.no_grad():
        torch._foreach_mul_(list(unet.parameters()), 1.1)
    assert previews.draw(40, unet, DIFFUSION)
    np.testing.assert_array_equal(pixels(path), expected)
    assert (pixels(tmp_path / "preview.png") != expected).any()


def test_a_preview_takes_no_more_steps_than_there_are(unet: UNet, tmp_path: Path) -> None:
    assert Previews(tmp_path, PRESET, every=1, steps=1000, count=1).draw(1, unet, DIFFUSION)
    np.testing.assert_array_equal(pixels(tmp_path / "preview.png"), np.asarray(grid(drawn(unet, range(1), 50))))


@pytest.mark.parametrize(("every", "due"), [(0, []), (3, [3, 6, 9]), (1, list(range(1, 11)))])
def test_when_a_preview_is_due(every: int, due: list[int], tmp_path: Path) -> None:
    previews = Previews(tmp_path, PRESET, every)
    assert [step for step in range(11) if previews.due(step)] == due


def test_what_cannot_be_drawn_or_written_is_told(unet: UNet, tmp_path: Path) -> None:
    said: list[str] = []
    previews = Previews(tmp_path, PRESET, every=1, steps=2, count=1, report=said.append)
    (tmp_path / "previews").write_text("a file where the directory belongs")
    assert previews.draw(1, unet, DIFFUSION) is None
    assert len(said) == 1 and said[0].startswith("no preview at step 1:") and "previews" in said[0]
    with torch.no_grad():
        next(unet.parameters()).fill_(float("nan"))
    assert previews.draw(2, unet, DIFFUSION) is None
    assert said[1].startswith("no preview at step 2: images contain NaN")
    assert os.listdir(tmp_path) == ["previews"]


def draw_together(group: ProcessGroup, run: Path, count: int, broken: int | None) -> tuple[Path | None, list[str]]:
    torch.manual_seed(3)
    unet = shaken(UNet(TINY))
    if group.rank == broken:
        torch.nn.init.constant_(next(unet.parameters()), float("nan"))
    said: list[str] = []
    return Previews(run, PRESET, 1, 5, count, group, said.append).draw(7, unet, DIFFUSION), said  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [5, 1])
def test_processes_share_the_seeds_and_the_first_writes(unet: UNet, tmp_path: Path, count: int) -> None:
    first, second = values(2, grouped, draw_together, tmp_path, count, None)
    assert first == (tmp_path / "previews" / "step-00000007.png", []) and second == (None, [])
    np.testing.assert_array_equal(pixels(tmp_path / "preview.png"), np.asarray(grid(drawn(unet, range(count)))))


def test_a_process_that_cannot_draw_keeps_no_other_waiting(tmp_path: Path) -> None:
    (first, said), second = values(2, grouped, draw_together, tmp_path, 4, 1)
    assert first is None and second == (None, []) and list(tmp_path.iterdir()) == []
    assert len(said) == 1 and "images contain NaN" in said[0]


def test_pictures_are_guided_as_the_preset_says() -> None:
    """A network without a null label cannot be guided; its x_0 is limited all the same."""
    sample = SampleConfig(guidance=2.0, guidance_interval=(5, 40), guidance_rescale=0.5, dynamic_threshold=0.9)
    preset = dataclasses.replace(PRESET, unet=tiny(num_classes=3, label_dropout=0.1), sample=sample)
    plain, guidable = (Formula(lambda x, t, label: x, num_classes=3, label_dropout=rate) for rate in (0.0, 0.1))
    for network, scale in ((plain, 1.0), (guidable, 2.0)):
        guide = Sampler(network, DIFFUSION, **guidance_of(network, preset)).guide
        assert guide == Guidance(scale, (5, 40), 0.5, 0.9)
