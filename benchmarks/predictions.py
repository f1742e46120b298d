"""What to predict in a short run: the error of networks that learn eps, x_0 or v, measured alike, while they learn.

python benchmarks/predictions.py --data PHOTOS [--size 48] [--steps 180] [--out FILE.json]

Each trains the network that --data alone chooses on a CPU, on the cosine schedule, with batch 8 and learning rate 1e-3.
The error is that of v on the same 64 images, timesteps and noise, whatever is predicted; low, mid and high are the
thirds of the timesteps. An error in v at high t is one of the image's colours and large shapes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastddpm.config import DiffusionConfig, Preset, TrainConfig
from fastddpm.data import Dataset, open_dataset
from fastddpm.training.network_sizes import unet_of
from fastddpm.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
import machine

SIDES = {"v, min-SNR": ("v", "min_snr"), "eps": ("eps", "simple"), "x_0, min-SNR": ("x0", "min_snr")}
EVERY, IMAGES, LEAST = 60, 64, 0.02  # LEAST: of alpha and sigma, by which predictions are divided


def errors(trainer: Trainer, dataset: Dataset, prediction: str) -> dict[str, float]:
    """The mean squared error of v over all timesteps, and over each third of them."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randperm(len(dataset.images), generator=generator)[:IMAGES]
    x0 = torch.from_numpy(dataset.images[chosen.numpy()].copy()).float() / 127.5 - 1
    total = trainer.diffusion.timesteps
    t = torch.linspace(0, total - 1, len(x0)).round().long()[torch.randperm(len(x0), generator=generator)]
    eps = torch.randn(x0.shape, generator=generator)
    alpha_bar = torch.tensor(trainer.diffusion.alpha_bar, dtype=torch.float32)[t].view(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
    with torch.no_grad():
        out = trainer.network(x_t, t)
    if prediction == "eps":
        out = (out - sigma * x_t) / alpha.clamp(min=LEAST)
    elif prediction == "x0":
        out = (alpha * x_t - out) / sigma.clamp(min=LEAST)
    error = (out - v).square().mean((1, 2, 3))
    third = t * 3 // total
    parts = {name: error[third == i].mean().item() for i, name in enumerate(("low", "mid", "high"))}
    return {"all": error.mean().item(), **parts}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--steps", type=int, default=180)
    options = machine.parse(parser, arguments)
    dataset = open_dataset(
        options.data, image_size=options.size, channels=3, resize="area", background="white", skip_bad=True
    )
    rows: list[dict[str, Any]] = []
    for name, (prediction, loss) in SIDES.items():
        diffusion = DiffusionConfig(schedule="cosine", prediction=prediction, variance="fixedsmall", loss=loss)  # type: ignore[arg-type]
        train = TrainConfig(steps=options.steps, batch=8, lr=1e-3, warmup=20, ema=0.99)
        preset = Preset("trial", unet_of("tiny", options.size, 3, 0), diffusion, train)
        trainer = Trainer(preset, dataset, torch.device("cpu"))
        for step in range(1, options.steps + 1):
            trainer.train_step()
            if step % EVERY == 0:
                rows.append({"side": name, "step": step, **errors(trainer, dataset, prediction)})
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    machine.write(options, data=dataset.name, images=len(dataset.images), size=options.size, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
