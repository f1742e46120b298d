"""The training loop (Algorithm 1 of the paper), top to bottom."""

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.config import Preset
from fastddpm.data import Dataset, batch_indices
from fastddpm.data.batches import Batches
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, DivergedError, UsageError
from fastddpm.ops.noise import NoiseKey
from fastddpm.pretrained.run import check_weights
from fastddpm.runtime.device import fastest_convolutions
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup, all_gather_object
from fastddpm.runtime.network import checksum, constants, stored
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import to_dict
from fastddpm.storage.files import write_json
from fastddpm.unet import UNet, network_with

from . import parallel, snapshots, state
from .captured import CapturedStep, Step
from .casts import with_cast_weights
from .initial import Origin
from .monitor import Monitor
from .network import averaged_copy, check_network, dropout_of, is_plain
from .optimizer import PAPER_SHARDS, Optimizer, learning_rate
from .run_log import JsonLines
from .saved import Counters, TrainingData, document
from .signals import Request, RunInterruptedError, SignalWatch
from .statistics import LossAccumulator, SkippedSteps, first_not_finite, log_skipped_steps


class Trainer:
    """Train a network: one `train_step` at a time, or `run` to the end with log and checkpoints.

    Every random number is a function of the configuration's seed and the step, so a run resumed from a checkpoint
    continues bit for bit as if it had never stopped (float32, CPU). `group`: rank and world size, inside
    `distributed.process_group`. Every process calls every method; images, t and noise of a step do not depend on the
    world size. `data_workers`: worker processes that decode images of a set too large to be kept decoded. Default: one
    per core, at most 8.

    `network`: the network to train, in place, with its present weights: a `UNet` of the preset's configuration, or any
    module that follows the protocol in runtime/network.py. Of the preset's `unet`, only `label_dropout` then counts.
    Default: a new `UNet`. Raises `UsageError` for a network that cannot be trained on these images or with these
    options, and `DataError` for a data set without the labels that it needs.
    """

    def __init__(
        self,
        preset: Preset,
        dataset: Dataset,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
        *,
        data_workers: int | None = None,
        network: nn.Module | None = None,
    ) -> None:
        self.preset, self.dataset, self.device, self.group = preset, dataset, device, group
        config = preset.train
        # The model that the run began with, which checkpoints record: its weights are not random ones.
        self.origin: Origin | None = None
        given = network
        if network is None:
            torch.manual_seed(config.seed)
            network = UNet(preset.unet)
        self.interface = check_network(network, preset, dataset)
        if given is not None:
            self.origin = Origin(f"a {type(given).__name__} that was given", checksum(given))
        self._plain = is_plain(network)
        self.network = network.to(device).train()
        self.strategy = parallel.make_strategy(self.network, config, group)
        self.diffusion = Diffusion(preset.diffusion)
        self.optimizer = Optimizer(self.network, config, self.strategy.local_shards(), self.strategy.total_norm)
        self.batches = Batches(
            dataset,
            config.batch,
            config.seed,
            device,
            rank=group.rank,
            world_size=group.world_size,
            workers=data_workers,
        )
        self.step = 0
        self.losses, self.skipped_steps = LossAccumulator(device), SkippedSteps(device)
        self.monitor = Monitor(preset, device, group)
        self._settled = group.world_size == 1
        self._seed = torch.tensor(config.seed, dtype=torch.int64, device=device)
        self._places = torch.arange(self.batches.start, self.batches.end, device=device)
        self._network = self.strategy.network
        alone = group.world_size == 1 and device.type == "cuda"
        if config.precision == "bf16":
            if alone and self._plain and not config.compile and not config.checkpoint_blocks:
                self._network = with_cast_weights(self.network)
            self._network = _autocast(self._network, device)
        self._losses = self._micro_losses
        if config.compile and group.world_size == 1:
            self._losses = in_one_graph(self._micro_losses)
        self._update: Step = self._launch_update
        if config.graph and alone and self._plain and config.mode == "standard" and not config.compile:
            self._update = CapturedStep(self._launch_update, device)

    def train_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Take one optimizer step. Returns (loss, gradient norm, applied) as 0-d tensors, without a synchronization."""
        if not self._settled:
            self._warm_up_ddp_buckets()
        images, labels, number = self._batch()
        self.optimizer.begin(self.step)
        drawn = dropout_of(self.network, self.preset.train.seed, self.step, self.group.rank, self.device)
        with drawn, fastest_convolutions(self.device):
            loss, norm, applied = self._update(images, labels, number)
        self.monitor.losses_by_t.commit(applied)
        self.optimizer.end(self.step)
        self.step += 1
        return loss, norm, applied

    def _launch_update(self, images: Tensor, labels: Tensor | None, number: Tensor) -> tuple[Tensor, ...]:
        """Launch the kernels of a step, which read what differs between steps from these tensors and the optimizer's.

        Returns (loss, gradient norm, applied). `number`: of the step, int64 (), the counter of its noise.
        """
        loss = torch.zeros((), device=self.device)
        for per_image in self._losses_of(images, labels, number):
            if not per_image.requires_grad:
                raise UsageError(
                    f"the output of {type(self.network).__name__} has no gradient: its forward detaches it, or "
                    "computes under torch.no_grad() or with numpy"
                )
            if self.preset.train.mode == "paper":
                per_image.mean().backward()
                self.optimizer.end_shard()
            else:
                self._differentiate(per_image)
            loss += per_image.detach().sum() / self.preset.train.batch
        self.strategy.sum([loss, self.monitor.losses_by_t.pending, *(self.optimizer.shard_sum or [])])
        return (loss, *self.optimizer.apply(loss))

    def _differentiate(self, per_image: Tensor) -> None:
        # DDP and FSDP average gradients over processes, so each takes the mean over its part of the global batch.
        (per_image.sum() / (self.preset.train.batch / self.group.world_size)).backward()

    def _warm_up_ddp_buckets(self) -> None:
        """Run one discarded backward pass, because DDP rebuilds its gradient buckets after the first one.

        From then on it sums in another order. Without this pass a resumed run would differ in the last bits.
        """
        if self.preset.train.mode == "standard":
            for per_image in self.part_losses():
                self._differentiate(per_image)
            self.optimizer.zero_grad()
        self._settled = True

    def part_losses(self) -> Iterator[Tensor]:
        """Yield the losses, one per image, of each micro-batch (paper mode: shard) of this process's batch.

        Call `backward` on each before taking the next.
        """
        yield from self._losses_of(*self._batch())

    def _batch(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return images and labels of the step at hand, and its number, int64 ()."""
        with self.monitor.clock.waiting():
            images, labels = self.batches.at(self.step)
        number = torch.full((), self.step, dtype=torch.int64, device=self.device)
        return images, labels if self.interface.num_classes else None, number

    def _losses_of(self, images: Tensor, labels: Tensor | None, number: Tensor) -> Iterator[Tensor]:
        config = self.preset.train
        self.monitor.losses_by_t.begin()
        key = NoiseKey(self._seed, number, self._places)
        size = config.batch // PAPER_SHARDS if config.mode == "paper" else len(images) // config.accumulate
        for start in range(0, len(images), size):
            end = start + size
            with self.strategy.micro_batch(last=end == len(images)):
                part_labels = None if labels is None else labels[start:end]
                per_image, t = self._losses(images[start:end], key.part(start, end), part_labels)
                self.monitor.losses_by_t.note(per_image, t)
                yield per_image

    def _micro_losses(self, images: Tensor, key: NoiseKey, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.diffusion.loss(
            self._network,
            images,
            key,
            label=labels,
            flip=self.preset.train.flip,
            null_label=self.interface.null_label,
            label_dropout=self.preset.unet.label_dropout,
        )

    def run(self, run: Path, log: JsonLines | None, *, dataset_source: str | None = None) -> Path:
        """Train to the configured number of steps, log and save into `run`, and return the last checkpoint.

        `log`: in rank 0 only, None in the others. SIGUSR1 to any process saves after the current step. Raises
        `RunInterruptedError`, after saving, if SIGINT or SIGTERM arrives in any process, and `DivergedError` after
        `patience` steps in a row with a loss or gradient that is not finite.
        """
        config, monitor = self.preset.train, self.monitor
        snapshots.begin(run, self.step, self.group)
        saved_step, request = -1, Request()
        with SignalWatch() as watch, monitor.running(self.step, log):
            while self.step < config.steps:
                loss, norm, applied = self.train_step()
                self.losses.add(loss, applied)
                self.skipped_steps.add(self.step - 1, applied)
                logs = self.step % config.log_every == 0 or self.step == config.steps
                # Reading the loss is free on a CPU; on a GPU it would wait for the step.
                if self.device.type == "cpu" or logs:
                    self._look_for_skipped_steps(run)
                monitor.log(self.step, functools.partial(self._measured, norm) if logs else None)
                # Before the checkpoint of this step, from which a killed run goes on: no snapshot is left out.
                if snapshots.due(config, self.step):
                    with monitor.clock.exclude():
                        self.save_snapshot(run, dataset_source)
                request = self.strategy.reduce_request(watch.requested())
                if request.save or self.step % config.save_every == 0:
                    with monitor.clock.exclude():
                        saved, saved_step = self.save(run, dataset_source), self.step
                if request.stop:
                    break
                if monitor.preview_due(self.step):
                    with monitor.clock.exclude(), self.averaged_weights() as network:
                        monitor.preview(self.step, network, self.diffusion)
            if saved_step != self.step:
                saved = self.save(run, dataset_source)
            # A signal may have come while the last checkpoint was written; there is no later check.
            request = self.strategy.reduce_request(watch.requested())
            if request.stop:
                name = signal.Signals(request.stop).name
                raise RunInterruptedError(
                    request.stop, f"{name}: saved step {self.step} in {run}; --resume continues it"
                )
        return saved

    def _measured(self, norm: Tensor) -> dict[str, float | None]:
        """Return the numbers of a log line, over the steps since the last one. Waits for the device."""
        loss_sum, good_steps, bad_in_a_row = self.losses.read()
        self.losses = LossAccumulator(self.device, bad_in_a_row=bad_in_a_row)
        return {
            "loss": loss_sum / good_steps if good_steps else None,
            "gradient_norm": norm.item(),
            "lr": learning_rate(self.preset.train, self.step - 1),
        }

    def _look_for_skipped_steps(self, run: Path) -> None:
        """Report skipped steps. Raises `DivergedError` if the last `patience` steps were all skipped."""
        new = self.skipped_steps.new()
        if new and self.group.is_main:
            log_skipped_steps(run, {step: self._examples(step) for step in new})
        bad_in_a_row = self.losses.read()[2]
        if bad_in_a_row < self.preset.train.patience:
            return
        steps = range(self.step - bad_in_a_row, self.step)
        path = run / "diverged.json"
        if self.group.is_main:
            write_json(path, {"examples_of_step": {s: self._examples(s) for s in steps}})
        damaged = first_not_finite(self.optimizer.state_dict())
        advice = (
            "Weights, EMA and checkpoints hold the last finite step: lower --lr with --override or look at those images"
        )
        if damaged is not None:
            advice = f"{damaged} is not finite itself, which no step can cause: memory is at fault"
        raise DivergedError(
            f"loss or gradient was not finite in {len(steps)} steps in a row, {steps[0]} to {steps[-1]}; the examples "
            f"of those batches are listed in {path}. {advice}, then --resume"
        )

    def _examples(self, step: int) -> list[int]:
        config = self.preset.train
        return batch_indices(step, len(self.dataset.images), config.batch, config.seed).tolist()

    def save(self, run: Path, dataset_source: str | None) -> Path:
        """Write a checkpoint, with EMA weights and everything that a bit-exact continuation needs; return its path.

        Raises `DivergedError`, and writes nothing, if a tensor is not finite.
        """
        self._refuse_damage()
        documents = self._documents(dataset_source) | {
            "state": {
                "step": self.step,
                "tally": dict(zip(("loss_sum", "steps", "bad_in_a_row"), self.losses.read(), strict=True)),
                "loss_by_t": self.monitor.losses_by_t.state_dict(),
            },
        }
        keep = self.preset.train.keep
        return state.save(run, self.step, self.optimizer, documents, keep, self.strategy, constants(self.network))

    def save_snapshot(self, run: Path, dataset_source: str | None = None) -> Path:
        """Write a snapshot of the power-function averages, and return its path. Raises as `save` does."""
        self._refuse_damage()
        documents = self._documents(dataset_source)
        return snapshots.save(run, self.step, self.optimizer, documents, self.strategy, constants(self.network))

    def _documents(self, dataset_source: str | None) -> dict[str, Any]:
        """Return what is known of the model: configuration, data, the weights it began with, a network of one's own."""
        documents = {
            "config": to_dict(self.preset),
            "data": to_dict(TrainingData.of(self.dataset, dataset_source)),
        }
        if self.origin is not None:
            documents["origin"] = to_dict(self.origin)
        if not self._plain:
            documents["network"] = f"{type(self.network).__module__}.{type(self.network).__qualname__}"
        return documents

    def _refuse_damage(self) -> None:
        tensors = self.optimizer.state_dict() | constants(self.network)
        for length in self.optimizer.power_averages:
            averaged = self.optimizer.power_averaged(length)
            tensors |= {f"power-function average {length} of {name}": t for name, t in averaged.items()}
        for decay in self.preset.train.decays:
            tensors |= {f"average {decay} of {name}": t for name, t in self.optimizer.averaged(decay).items()}
        for name in all_gather_object(first_not_finite(tensors), self.group):
            if name is not None:
                raise DivergedError(
                    f"step {self.step} is not saved: {name} is not finite, which no step can cause: memory is at "
                    "fault. --resume goes back to the last checkpoint"
                )

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises `DataError` if it is of another network, was trained on another data set, or is damaged.
        """
        data = document(TrainingData, saved.documents, "data", saved.path)
        counters = document(Counters, saved.documents, "state", saved.path)
        if "origin" in saved.documents:
            self.origin = document(Origin, saved.documents, "origin", saved.path)
        if data.checksum != self.dataset.checksum:
            mend = "name that data set with --data"
            if data.name == self.dataset.name:
                mend = "read it as before (--resize, --background, --skip-bad), and with the files of that time"
            raise DataError(
                f"{saved.path} was trained on {data.name} (sha256 {data.checksum[:12]}), "
                f"not on {self.dataset.name} (sha256 {self.dataset.checksum[:12]}); {mend}"
            )
        found, name = saved.tensors.get("model", {}), type(self.network).__name__
        check_weights(stored(self.network), found, saved.path, f"this {name}")
        state.restore(self.optimizer, saved, self.strategy, constants(self.network))
        self.step = counters.step
        self.losses = LossAccumulator(self.device, **vars(counters.tally))
        self.monitor.losses_by_t.load_state_dict(counters.loss_by_t)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """Yield a network with the EMA weights, in evaluation mode. A `UNet` shares their memory, except with FSDP."""
        whole = {name: self.strategy.full_tensor(name, part) for name, part in self.optimizer.averaged().items()}
        whole |= constants(self.network)
        if self._plain:
            yield network_with(self.preset.unet, whole).channels_last()
        else:
            yield averaged_copy(self.network, whole, self.interface)


def check_options(preset: Preset, group: ProcessGroup) -> None:
    """Raise `UsageError` for a configuration that no data set can train, before any is read."""
    parallel.check_processes(preset.train, group)
    Diffusion(preset.diffusion)


def in_one_graph(
    losses: Callable[..., tuple[Tensor, Tensor]], backend: Any = "inductor"
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Compile `losses(images, key, labels)` into one graph that serves every step."""
    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    tables_made = False

    def run(images: Tensor, key: NoiseKey, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        nonlocal tables_made
        if not tables_made:  # the diffusion caches its tables; inside the graph that would cause a second compilation
            with torch.no_grad():
                losses(images[:1], key.part(0, 1), None if labels is None else labels[:1])
            tables_made = True
        return compiled(images, key, labels)

    return run


def _autocast(network: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    def under_autocast(*args: Any, **options: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return network(*args, **options)

    under_autocast.takes_noise_key = getattr(network, "takes_noise_key", False)  # type: ignore[attr-defined]
    return under_autocast
