"""A tiny run with everything that draws a random number, and what the tests of training compare."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig
from fastddpm.data import Dataset
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.storage import checkpoint
from fastddpm.training.monitor import MEASURED
from fastddpm.training.run_log import JsonLines
from fastddpm.training.trainer import Trainer

CPU = torch.device("cpu")


def tiny_preset(**train: Any) -> Preset:
    """Two levels, dropout, labels and flips."""
    unet = UNetConfig(
        image_size=8, image_channels=1, width=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,),
        dropout=0.2, groups=4, num_classes=3, label_dropout=0.3,
    )  # fmt: skip
    options = {"steps": 12, "batch": 8, "lr": 1e-2, "warmup": 3, "ema": 0.9, "log_every": 4, "save_every": 1000}
    return Preset("tiny", unet, DiffusionConfig(timesteps=50), TrainConfig(**(options | train)), SampleConfig(steps=3))


def noise_images() -> Dataset:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (29, 1, 8, 8), dtype=np.uint8)
    return Dataset(images, np.arange(29, dtype=np.int64) % 3, "noise", "0" * 64)


def train(
    group: ProcessGroup,
    preset: Preset,
    run: Path,
    *,
    resume: bool = False,
    until: int | None = None,
    network: nn.Module | None = None,
) -> Trainer:
    """A trainer run to the end of `preset`, or saved at step `until` without having known that it would stop."""
    run.mkdir(exist_ok=True)
    trainer = Trainer(preset, noise_images(), CPU, group, network=network)
    if resume:
        trainer.resume(checkpoint.load(run))
    log = JsonLines(run / "log.jsonl", trainer.step if resume else None) if group.is_main else None
    if until is None:
        trainer.run(run, log)
    else:
        reduce_request = trainer.strategy.reduce_request

        def stop(request: Any) -> Any:
            asked = reduce_request(request)
            return type(asked)(15 if trainer.step == until else 0, asked.save)

        trainer.strategy.reduce_request = stop  # type: ignore[method-assign]
        try:
            trainer.run(run, log)
        except Exception as error:
            assert f"saved step {until}" in str(error), error
    if log is not None:
        log.close()
    return trainer


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, moments, step counts and averages, whole in every process."""
    strategy = trainer.strategy
    state = {
        name: value if name.startswith("step.") else strategy.full_tensor(name.partition(".")[2], value)
        for name, value in trainer.optimizer.state_dict().items()
    }
    for decay in trainer.preset.train.decays:
        state |= {f"ema{decay}.{n}": strategy.full_tensor(n, t) for n, t in trainer.optimizer.averaged(decay).items()}
    return {name: t.detach().contiguous().clone() for name, t in state.items()}


def digest(state: dict[str, Tensor]) -> str:
    """sha256 of every bit."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode() + state[name].numpy().tobytes())
    return total.hexdigest()


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def log_digest(run: Path) -> str:
    """sha256 of the log, but for speed and memory."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()
