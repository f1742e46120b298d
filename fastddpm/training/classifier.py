"""The training of a classifier of noisy images: cross-entropy of p(label | x_t), x_t ~ q(x_t | x_0), t uniform."""

import functools
import math
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.data import Dataset
from fastddpm.data.batches import Batches
from fastddpm.diffusion import Diffusion, draw_examples
from fastddpm.errors import DataError, DivergedError, UsageError
from fastddpm.kernels.q_sample.reference import scale_images
from fastddpm.ops.noise import NoiseKey
from fastddpm.runtime.progress import Meter
from fastddpm.sampling.classifier import DOCUMENT, Classifier
from fastddpm.sampling.classifier_config import ClassifierConfig
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import to_dict

from . import state
from .optimizer import Optimizer, learning_rate
from .parallel import SingleProcess
from .run_log import JsonLines
from .saved import Counters, TrainingData, document
from .signals import RunInterruptedError, SignalWatch
from .statistics import Clock, LossAccumulator, LossByTimestep, first_not_finite

QUARTERS = 4


class ClassifierTrainer:
    """Trains a `Classifier` on a labelled data set: `ClassifierTrainer(config, dataset, device).run(run, log)`.

    Every step is a function of (seed, step): the images, and for each of them t, flip, noise and dropout. A resumed
    training therefore gives the same weights. Raises `UsageError` for a data set without labels, or with labels that
    the configuration has no class for, and `DataError` if it is smaller than a batch.
    """

    def __init__(self, config: ClassifierConfig, dataset: Dataset, device: torch.device) -> None:
        self.config, self.dataset, self.device = config, dataset, device
        check_labels(dataset, config.unet.num_classes)
        train = config.train
        torch.manual_seed(train.seed)
        self.classifier = Classifier(config).to(device).train()
        self.diffusion = Diffusion(config.diffusion)
        self._optimizer_config = train.optimizer()
        self.optimizer = Optimizer(self.classifier, self._optimizer_config)
        self.batches = Batches(dataset, train.batch, train.seed, device)
        self.step = 0
        self.losses = LossAccumulator(device)
        # The mean over a range of t of 1 for an image that is classified rightly and 0 for another.
        self.accuracy = LossByTimestep(self.diffusion.timesteps, device, bins=QUARTERS)
        self._seed = torch.tensor(train.seed, dtype=torch.int64, device=device)
        self._places = torch.arange(train.batch, device=device)

    def losses_at(self, images: Tensor, labels: Tensor, key: NoiseKey) -> tuple[Tensor, Tensor, Tensor]:
        """Return cross-entropies in nats, float32 (N,), whether each is right, float32 (N,), and t, int64 (N,).

        `images`: uint8 (N, C, H, W). `labels`: int64 (N,). t, flip, noise and dropout are drawn from `key`.
        """
        draws = draw_examples(key, self.diffusion.timesteps)
        flips = draws.flip if self.config.train.flip else None
        x_t, _ = self.diffusion.q_sample(scale_images(images, flips), draws.t, key)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            logits = self.classifier(x_t, draws.t, key)
        right = (logits.argmax(1) == labels).float()
        return F.cross_entropy(logits.float(), labels, reduction="none"), right, draws.t

    def train_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Take one optimizer step. Returns (loss, gradient norm, applied) as 0-d tensors."""
        images, labels = self.batches.at(self.step)
        assert labels is not None
        key = NoiseKey(self._seed, torch.full((), self.step, dtype=torch.int64, device=self.device), self._places)
        self.accuracy.begin()
        per_image, right, t = self.losses_at(images, labels, key)
        self.accuracy.note(right, t)
        loss = per_image.mean()
        loss.backward()
        norm, applied = self.optimizer.step(self.step, loss.detach())
        self.accuracy.commit(applied)
        self.losses.add(loss.detach(), applied)
        self.step += 1
        return loss.detach(), norm, applied

    def run(self, run: Path, log: JsonLines, *, dataset_source: str | None = None) -> Path:
        """Train to the configured number of steps, log and save into `run`, and return the last checkpoint.

        Raises `RunInterruptedError`, after saving, on SIGINT or SIGTERM, and `DivergedError` after `patience` steps in
        a row with a loss or gradient that is not finite.
        """
        train, saved_step, clock = self.config.train, -1, Clock(self.step)
        stop = 0
        with (
            SignalWatch() as watch,
            Meter("training", train.steps, "steps", done=self.step, seconds_between_lines=None) as meter,
        ):
            while self.step < train.steps and not stop:
                _, norm, _ = self.train_step()
                shown = None
                if self.step % train.log_every == 0 or self.step == train.steps:
                    self._refuse_divergence(run)
                    shown = self._log(log, norm, clock)
                meter.update(self.step, shown)
                request = watch.requested()
                stop = request.stop
                if request.save or self.step % train.save_every == 0:
                    with clock.exclude():
                        saved, saved_step = self.save(run, dataset_source), self.step
            if saved_step != self.step:
                saved = self.save(run, dataset_source)
            stop = stop or watch.requested().stop
        if stop:
            name = signal.Signals(stop).name
            raise RunInterruptedError(stop, f"{name}: saved step {self.step} in {run}; --resume continues it")
        return saved

    def _log(self, log: JsonLines, norm: Tensor, clock: Clock) -> str:
        """Write a line to the log, of the steps since the last one, and return it as text. Waits for the device."""
        loss_sum, good_steps, bad_in_a_row = self.losses.read()
        self.losses = LossAccumulator(self.device, bad_in_a_row=bad_in_a_row)
        loss = loss_sum / good_steps if good_steps else None
        accuracy, lap, norm_now = self.accuracy.read(), clock.lap(self.step), norm.item()
        log.write(
            {
                "step": self.step,
                "loss": loss,
                "gradient_norm": norm_now if math.isfinite(norm_now) else None,
                "lr": learning_rate(self._optimizer_config, self.step - 1),
                "images_per_s": lap.steps_per_s * self.config.train.batch,
                "accuracy_by_t": accuracy,
            }
        )
        shares = ", ".join("-" if share is None else f"{share:.0%}" for share in accuracy)
        return f"loss {'not finite' if loss is None else f'{loss:.3f}'}  right by quarter of t: {shares}"

    def _refuse_divergence(self, run: Path) -> None:
        bad = self.losses.read()[2]
        if bad >= self.config.train.patience:
            raise DivergedError(
                f"loss or gradient was not finite in {bad} steps in a row, up to step {self.step}; the weights are "
                f"those before them. Train a new classifier with a lower --lr; {run} keeps its last checkpoint"
            )

    def save(self, run: Path, dataset_source: str | None) -> Path:
        """Write a checkpoint with all that a bit-exact continuation needs, and return its path.

        Raises `DivergedError`, and writes nothing, if a tensor is not finite.
        """
        damaged = first_not_finite(self.optimizer.state_dict())
        if damaged is not None:
            raise DivergedError(f"step {self.step} is not saved: {damaged} is not finite; memory is at fault")
        tally = dict(zip(("loss_sum", "steps", "bad_in_a_row"), self.losses.read(), strict=True))
        documents = {
            DOCUMENT: to_dict(self.config),
            "state": {"step": self.step, "tally": tally, "loss_by_t": self.accuracy.state_dict()},
            "data": to_dict(TrainingData.of(self.dataset, dataset_source)),
        }
        return state.save(run, self.step, self.optimizer, documents, self.config.train.keep, self._alone, {})

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint. Raises `DataError` if it was trained on other data, or is damaged."""
        data = document(TrainingData, saved.documents, "data", saved.path)
        counters = document(Counters, saved.documents, "state", saved.path)
        if data.checksum != self.dataset.checksum:
            raise DataError(
                f"{saved.path} was trained on {data.name} (sha256 {data.checksum[:12]}), not on {self.dataset.name} "
                f"(sha256 {self.dataset.checksum[:12]}); name that data set, as it was, with --data"
            )
        if counters.step > self.config.train.steps:
            raise UsageError(
                f"{saved.path} has taken {counters.step} steps already; --steps {self.config.train.steps} would end "
                "before that, choose more"
            )
        state.restore(self.optimizer, saved, self._alone, {})
        self.step = counters.step
        self.losses = LossAccumulator(self.device, **vars(counters.tally))
        self.accuracy.load_state_dict(counters.loss_by_t)

    @functools.cached_property
    def _alone(self) -> SingleProcess:
        return SingleProcess(self.classifier, self._optimizer_config)


def check_labels(dataset: Dataset, num_classes: int | None = None) -> int:
    """Return the number of classes of a data set: of its labels, or of its named classes if they are more.

    `num_classes`: that of the classifier. Raises `UsageError` for a data set without labels or with a single class, and
    for a label beyond `num_classes`.
    """
    if dataset.labels is None:
        raise UsageError(
            f"{dataset.name} has no labels, and a classifier learns them; name labelled images with --data"
        )
    count = max(int(dataset.labels.max()) + 1, len(dataset.classes or ()))
    if int(dataset.labels.min()) < 0 or count < 2:
        raise UsageError(f"{dataset.name} has {count} class; a classifier tells two or more apart, 0, 1 and so on")
    if num_classes is not None and count > num_classes:
        raise UsageError(f"{dataset.name} has {count} classes, and the classifier is for {num_classes}")
    return count
