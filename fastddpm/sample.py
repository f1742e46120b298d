"""python -m fastddpm.sample CHECKPOINT: draw images from a trained model."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastddpm import cli
from fastddpm.errors import UsageError

if TYPE_CHECKING:
    from fastddpm.model import Model

PROGRAM = "fastddpm.sample"
MAX_SEEDS = 10_000_000


@dataclass(frozen=True)
class Command:
    """Draw images from a checkpoint. An image depends on its seed and the options, not on its batch."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run, one of its checkpoints, or a diffusers pipeline directory."""
    seeds: str = "0-63"
    """One image for each seed: numbers and ranges, as in 0-63 or 1,5,10-19; each in 0..4294967295."""
    labels: str | None = None
    """Classes to draw, as in seeds: one for each seed, or one for all. Without it: seed modulo classes."""
    method: Literal["ancestral", "ddim"] | None = None
    """ancestral (Algorithm 2) or ddim; the run's own choice unless given."""
    steps: int | None = None
    """Steps of the chain; the run's own choice unless given."""
    eta: float | None = None
    """DDIM's noise, 0 to 1."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none."""
    noise_seed: int = 0
    """64-bit key of all noise: another value gives every seed another image."""
    batch: int = 64
    """Images drawn at once."""
    out: Path | None = None
    """Directory for the images. Without it, samples-FIRST-LAST in the run's directory."""
    png: bool = False
    """Also one PNG for each image, named by its seed."""
    gif: bool = False
    """Also an animation of the x_0 predictions of the first batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA or ROCm device when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the network under autocast; the chain itself stays float32."""


def parse_numbers(text: str, option: str) -> list[int]:
    """The numbers of "1,5,10-19", in order; `UsageError` names the part that is none."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--{option} takes numbers and ranges, as in 0-63 or 1,5,10-19; got {part.strip()!r}")
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise UsageError(f"--{option}: {part.strip()} runs backwards")
        if len(numbers) + high - low >= MAX_SEEDS:
            raise UsageError(f"--{option}: more than {MAX_SEEDS:,} numbers; draw them in several calls")
        numbers += range(low, high + 1)
    return numbers


def main(arguments: Sequence[str]) -> None:
    command = cli.parse(Command, arguments, program=PROGRAM)
    seeds = parse_numbers(command.seeds, "seeds")
    labels = _labels(command, len(seeds))
    if command.batch < 1:
        raise UsageError(f"--batch must be positive; got {command.batch}")
    if not command.checkpoint.exists():
        raise UsageError(f"no checkpoint at {command.checkpoint}")

    import numpy as np
    import torch

    from fastddpm.device import choose_device
    from fastddpm.figures import grid, save_png
    from fastddpm.generate import FrameRecorder, sample_batches, save_pictures
    from fastddpm.sampler import Sampler

    device = choose_device(command.device)
    model = _load(command.checkpoint, str(device))
    config = dataclasses.replace(
        model.preset.sample,
        **{
            name: value
            for name in ("method", "steps", "eta", "guidance")
            if (value := getattr(command, name)) is not None
        },
    )
    sampler = Sampler(
        model.unet, model.diffusion, config.steps, config.method, config.eta,
        guidance=config.guidance, seed=command.noise_seed,
    )  # fmt: skip
    out = command.out or _default_out(command.checkpoint, seeds)
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(seeds)} images, {config.method}, {sampler.steps} steps, guidance {config.guidance}, on {device}",
        file=sys.stderr,
    )
    recorder = FrameRecorder(sampler.steps, min(command.batch, 64)) if command.gif else None
    parts = []
    with torch.autocast(device.type, torch.bfloat16, enabled=command.precision == "bf16"):
        for batch in sample_batches(sampler, seeds, labels, batch=command.batch, recorder=recorder):
            parts.append(batch.images)
            if command.png:
                for seed, image in zip(batch.seeds, batch.images, strict=True):
                    save_png(grid(image[None], padding=0, scale=1), out / f"{seed:010d}.png")
    frames = recorder.frames if recorder is not None else []
    for path in save_pictures(np.concatenate(parts), seeds, sampler.labels_for(seeds, labels), frames, out):
        print(path)


def _labels(command: Command, num_seeds: int) -> list[int] | None:
    if command.labels is None:
        return None
    labels = parse_numbers(command.labels, "labels")
    if len(labels) == 1:
        return labels * num_seeds
    if len(labels) != num_seeds:
        raise UsageError(
            f"--labels gives {len(labels)} classes for {num_seeds} seeds; give one for each, or one for all"
        )
    return labels


def _load(path: Path, device: str) -> "Model":
    from fastddpm import model

    if (path / "model_index.json").exists() or (path / "unet" / "config.json").exists():
        from fastddpm.interchange import diffusers

        loaded = diffusers.load(path)
        return dataclasses.replace(loaded, unet=loaded.unet.to(device))
    return model.load(path, device)


def _default_out(checkpoint: Path, seeds: Sequence[int]) -> Path:
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    return run / f"samples-{seeds[0]}-{seeds[-1]}"


if __name__ == "__main__":
    cli.run(main)
