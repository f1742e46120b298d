"""A run directory without a training: the files that a run leaves, with numbers that tests choose."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig
from fastddpm.presets import write_preset
from fastddpm.sampling.images import grid, save_animation, save_png

from .networks import TINY

BINS = 4
PRESET = Preset(
    "cifar10",
    TINY,
    DiffusionConfig(timesteps=200),
    TrainConfig(steps=1000, batch=8, log_every=10, preview_every=100, ema=0.9, warmup=10),
    SampleConfig(count=4, steps=50),
)


def record(step: int, **more: Any) -> dict[str, Any]:
    """A line of the log: the loss falls as 10 / step, evenly over t."""
    loss = 10 / step
    numbers = {"step": step, "loss": loss, "gradient_norm": 2 * loss, "lr": 2e-4, "images_per_s": 40.0}
    return {**numbers, "data_wait": 0.25, "memory_mib": 512.0, "loss_by_t": [loss * k for k in (4, 2, 1, 0.5)], **more}


def session(step: int = 0, **more: Any) -> dict[str, Any]:
    data = {"name": "photos", "checksum": "ab" * 32, "source": "/data/photos", "classes": None, "images": 1234}
    return {
        "started": "2026-01-02T03:04:05+00:00", "step": step, "command": ["python", "-m", "fastddpm.train"],
        "changed": [], "processes": 1, "data": data, "fastddpm": "0.2", "libraries": {"torch": "2.13"},
        "device": "a machine", **more,
    }  # fmt: skip


SCORES: dict[str, Any] = {
    "version": 1,
    "checkpoint": {"path": "run", "preset": "cifar10", "network": "cd" * 32, "step": 1000},
    "train": {
        "fid": {
            "value": 12.3456, "samples": 50000, "reference_images": 1234, "data": {"name": "photos"},
            "sampling": {"method": "ancestral", "steps": 50}, "date": "2026-02-03T00:00:00+00:00",
        },
    },
    "test": {
        "bpd": {
            "bits_per_dim": 3.5, "standard_error": 0.01, "num_images": 20, "data": {"name": "photos"},
            "date": "2026-02-04T00:00:00+00:00",
        },
    },
}  # fmt: skip


def flat_picture(colour: tuple[int, int, int], side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def write_run(
    run: Path,
    *,
    records: Sequence[dict[str, Any]] | None = None,
    sessions: Sequence[dict[str, Any]] | None = None,
    previews: Sequence[int] = (100, 200),
    finished: bool = True,
    preset: Preset = PRESET,
) -> Path:
    """A run of 1000 steps; without `finished` one that has neither samples nor scores."""
    run.mkdir(parents=True, exist_ok=True)
    write_preset(preset, run / "config.json")
    records = [record(step) for step in range(10, 1001, 10)] if records is None else records
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    sessions = [session()] if sessions is None else sessions
    (run / "environment.json").write_text(json.dumps({"sessions": list(sessions)}))
    (run / "previews").mkdir(exist_ok=True)
    for step in previews:
        save_png(flat_picture((step % 256, 0, 0)), run / "previews" / f"step-{step:08d}.png")
    if finished:
        images = np.random.default_rng(0).integers(0, 256, (4, 3, 12, 12), dtype=np.uint8)
        save_png(grid(images), run / "samples.png")
        save_animation([flat_picture((k, 0, 0)) for k in (0, 100, 200)], run / "denoising.gif")
        (run / "evaluation").mkdir(exist_ok=True)
        (run / "evaluation" / "metrics.json").write_text(json.dumps(SCORES))
    return run
