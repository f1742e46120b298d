"""A network of one's own: a small transformer (DiT), trained on the embedded digits and sampled from.

python examples/own_network.py [STEPS] draws runs/own-network/samples.png, after 300 steps by default.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fastddpm
from fastddpm.sampling.images import grid, save_png, to_uint8
from fastddpm.unet import timestep_embedding


class DiT(nn.Module):
    """A transformer over patches of 4x4 pixels, to each of which timestep and class are added."""

    image_shape, num_classes, null_label = (1, 16, 16), 10, 10

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.width = width
        self.patches = nn.Conv2d(1, width, kernel_size=4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(11, width)  # the last row is the null label's
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.pixels = nn.ConvTranspose2d(width, 1, kernel_size=4, stride=4)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        condition = self.time(timestep_embedding(t, self.width)) + self.label(label)
        tokens = self.patches(x_t).flatten(2).transpose(1, 2) + self.position + condition.unsqueeze(1)
        return self.pixels(self.blocks(tokens).transpose(1, 2).unflatten(2, (4, 4)))


def main(steps: int = 300, run: Path = Path("runs/own-network")) -> Tensor:
    base = fastddpm.preset("mnist")
    preset = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=steps))
    digits = fastddpm.data.open_dataset(None, image_size=16, channels=1)
    torch.manual_seed(0)
    trainer = fastddpm.Trainer(preset, digits, torch.device("cpu"), network=DiT())
    trainer.run(run, log=None)  # with checkpoints; another time, trainer.resume continues from one
    with trainer.averaged_weights() as network:
        images = fastddpm.Sampler(network, trainer.diffusion, steps=50, guidance=2.0).sample(range(16))
    save_png(grid(to_uint8(images)), run / "samples.png")
    return images


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
