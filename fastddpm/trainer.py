"""The training loop (Algorithm 1 of the paper), top to bottom."""

import contextlib
import functools
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastddpm import checkpoint
from fastddpm.config import Preset, to_dict
from fastddpm.data import Dataset, batch_indices
from fastddpm.data.batches import Batches
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, DivergedError, FastddpmError
from fastddpm.noise import NoiseKey
from fastddpm.optim import PAPER_SHARDS, Optimizer, learning_rate
from fastddpm.runlog import JsonLines, Meter
from fastddpm.unet import UNet


class RunInterruptedError(FastddpmError):
    """SIGINT or SIGTERM arrived; the run is saved. The exit code is the shell's own, 128 + signal number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class SignalWatch:
    """Turns the first SIGINT or SIGTERM into a flag that the loop reads; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "SignalWatch":
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = number


class Tally:
    """Losses since the last line of the log, and bad steps in a row: kept on the device, part of a checkpoint."""

    def __init__(self, device: torch.device, loss_sum: float = 0.0, steps: int = 0, bad_in_a_row: int = 0) -> None:
        self._values = torch.tensor([loss_sum, steps, bad_in_a_row], dtype=torch.float64, device=device)

    def add(self, loss: Tensor, applied: Tensor) -> None:
        """Count one step; 0-d tensors, not waited for."""
        good = applied.to(torch.float64)
        self._values[0] += torch.where(applied, loss, 0.0)
        self._values[1] += good
        self._values[2] = (self._values[2] + 1) * (1 - good)

    def read(self) -> tuple[float, int, int]:
        """(sum of the losses of good steps, their number, bad steps in a row); waits for the device."""
        loss_sum, steps, bad = self._values.tolist()
        return loss_sum, int(steps), int(bad)


class Trainer:
    """A network in training: `train_step` by `train_step`, or `run` to the end with log and checkpoints.

    Every random number is a function of the configuration's seed and the step, so a run that is resumed
    from a checkpoint goes on bit for bit as if it had never stopped (float32, CPU).
    """

    def __init__(self, preset: Preset, dataset: Dataset, device: torch.device) -> None:
        self.preset, self.dataset, self.device = preset, dataset, device
        config = preset.train
        if preset.unet.num_classes and dataset.labels is None:
            raise DataError(f"{dataset.name} has no labels, which num_classes {preset.unet.num_classes} needs")
        if preset.unet.num_classes and dataset.labels is not None and dataset.labels.max() >= preset.unet.num_classes:
            raise DataError(
                f"{dataset.name} has label {dataset.labels.max()}, but num_classes is {preset.unet.num_classes}"
            )
        torch.manual_seed(config.seed)
        self.unet = UNet(preset.unet).to(device).channels_last().train()
        self.diffusion = Diffusion(preset.diffusion)
        self.optimizer = Optimizer(self.unet, config)
        self.batches = Batches(dataset, config.batch, config.seed, device)
        self.step = 0
        self.tally = Tally(device)
        self._seed = torch.tensor(config.seed, dtype=torch.int64, device=device)
        self._places = torch.arange(config.batch, device=device)
        compiled: Callable[..., Tensor] = torch.compile(self.unet) if config.compile else self.unet
        self._network = _autocast(compiled, device) if config.precision == "bf16" else compiled

    def train_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step on the next batch: (loss, gradient norm, applied), 0-d tensors, not waited for."""
        loss = torch.zeros((), device=self.device)
        for per_image in self.part_losses():
            if self.preset.train.mode == "paper":
                per_image.mean().backward()
                self.optimizer.end_shard()
            else:
                (per_image.sum() / self.preset.train.batch).backward()
            loss += per_image.detach().sum() / self.preset.train.batch
        norm, applied = self.optimizer.step(self.step, loss)
        self.step += 1
        return loss, norm, applied

    def part_losses(self) -> Iterator[Tensor]:
        """The loss of each image of this step's batch, one micro-batch (paper mode: one shard) at a time."""
        config, unet = self.preset.train, self.preset.unet
        images, labels = self.batches.at(self.step)
        key = NoiseKey(self._seed, torch.tensor(self.step, device=self.device), self._places)
        size = config.batch // (PAPER_SHARDS if config.mode == "paper" else config.accumulate)
        for start in range(0, config.batch, size):
            end = start + size
            per_image, _ = self.diffusion.loss(
                self._network,
                images[start:end],
                key.part(start, end),
                label=labels[start:end] if labels is not None and unet.num_classes else None,
                flip=config.flip,
                null_label=self.unet.null_label,
                label_dropout=unet.label_dropout,
            )
            yield per_image

    def run(self, run: Path, log: JsonLines, *, dataset_source: str | None = None) -> Path:
        """Train to the configured number of steps, logging and saving into `run`; returns the last checkpoint.

        Raises `RunInterruptedError` after saving when SIGINT or SIGTERM arrives, `DivergedError` after
        `patience` steps in a row with a loss or gradient that is not finite.
        """
        config = self.preset.train
        started, first = time.monotonic(), self.step
        saved_step = -1
        with SignalWatch() as watch, Meter("training", config.steps, "steps", done=self.step) as meter:
            while self.step < config.steps:
                loss, norm, applied = self.train_step()
                self.tally.add(loss, applied)
                logs = self.step % config.log_every == 0 or self.step == config.steps
                # On a CPU reading the loss costs nothing; on a GPU it would wait for the step.
                if self.device.type == "cpu" or logs:
                    self._stop_if_diverged(run)
                if logs:
                    rate = (self.step - first) / (time.monotonic() - started)
                    loss_sum, good_steps, _ = self.tally.read()
                    record = {
                        "step": self.step,
                        "loss": loss_sum / good_steps if good_steps else None,
                        "gradient_norm": norm.item(),
                        "lr": learning_rate(config, self.step - 1),
                    }
                    log.write(record | {"images_per_s": rate * config.batch})
                    shown = f"loss {record['loss']:.4f}" if good_steps else "no finite loss"
                    meter.update(self.step, f"{shown}  {rate:.2f} steps/s  {rate * config.batch:.0f} images/s")
                    self.tally = Tally(self.device, bad_in_a_row=self.tally.read()[2])
                else:
                    meter.update(self.step)
                if self.step % config.save_every == 0:
                    saved, saved_step = self.save(run, dataset_source), self.step
                if watch.number is not None:
                    break
            if saved_step != self.step:
                saved = self.save(run, dataset_source)
            if watch.number is not None:
                name = signal.Signals(watch.number).name
                raise RunInterruptedError(
                    watch.number, f"{name}: saved step {self.step} in {run}; --resume continues it"
                )
        return saved

    def _stop_if_diverged(self, run: Path) -> None:
        bad_in_a_row = self.tally.read()[2]
        if bad_in_a_row < self.preset.train.patience:
            return
        config = self.preset.train
        steps = range(self.step - bad_in_a_row, self.step)
        batches = {s: batch_indices(s, len(self.dataset.images), config.batch, config.seed).tolist() for s in steps}
        report = run / "diverged.json"
        report.write_text(json.dumps({"examples_of_step": batches}, indent=1))
        raise DivergedError(
            f"loss or gradient was not finite in {len(steps)} steps in a row, {steps[0]} to {steps[-1]}; the examples "
            f"of those batches are listed in {report}. Weights, EMA and checkpoints hold the last finite step: "
            f"lower --lr or look at those images, then --resume"
        )

    def save(self, run: Path, dataset_source: str | None) -> Path:
        """Write a checkpoint: EMA weights, and all that a bit-exact continuation needs."""
        documents = {
            "config": to_dict(self.preset),
            "state": {
                "step": self.step,
                "tally": dict(zip(("loss_sum", "steps", "bad_in_a_row"), self.tally.read(), strict=True)),
            },
            "data": {"source": dataset_source, "name": self.dataset.name, "checksum": self.dataset.checksum},
        }
        tensors = {"model": self.optimizer.averaged(), "training": self.optimizer.state()}
        return checkpoint.save(run, self.step, tensors, documents, self.preset.train.keep)

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint; `DataError` if the data set is another one."""
        data: dict[str, Any] = saved.documents["data"]
        if data["checksum"] != self.dataset.checksum:
            raise DataError(
                f"{saved.path} was trained on {data['name']} (sha256 {data['checksum'][:12]}), "
                f"not on {self.dataset.name} (sha256 {self.dataset.checksum[:12]})"
            )
        self.optimizer.load(saved.tensors["training"], saved.tensors["model"])
        state = saved.documents["state"]
        self.step = state["step"]
        self.tally = Tally(self.device, **state["tally"])

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[UNet]:
        """The network with its EMA weights, in evaluation mode, inside the `with` block."""
        weights = [p.detach().clone() for p in self.optimizer.parameters]
        try:
            self._set_weights(self.optimizer.average)
            yield self.unet.eval()
        finally:
            self._set_weights(weights)
            self.unet.train()

    @torch.no_grad()
    def _set_weights(self, values: list[Tensor]) -> None:
        for p, value in zip(self.optimizer.parameters, values, strict=True):
            p.copy_(value)


def _autocast(network: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    @functools.wraps(network)
    def under_autocast(*args: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return network(*args)

    return under_autocast
