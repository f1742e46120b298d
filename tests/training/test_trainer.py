"""Training: exact resume, accumulation, divergence, signals."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.marks import slow
from helpers.training import CPU, noise_images, tiny_preset

from fastddpm.config import Preset
from fastddpm.data import Dataset
from fastddpm.errors import DataError, DivergedError, UsageError
from fastddpm.storage import checkpoint
from fastddpm.training.run_log import JsonLines
from fastddpm.training.trainer import LossAccumulator, RunInterruptedError, Trainer


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return noise_images()


def trained(
    preset: Preset,
    dataset: Dataset,
    run: Path,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    number: int = signal.SIGTERM,
) -> Trainer:
    """A trainer run to the end of `preset`, or stopped by a signal that arrives during step `stop_at`."""
    run.mkdir(exist_ok=True)
    trainer = Trainer(preset, dataset, CPU)
    if resume:
        saved = checkpoint.load_newest(run, lambda line: pytest.fail(line))
        assert saved is not None
        trainer.resume(saved)
    train_step = trainer.train_step

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if trainer.step + 1 == stop_at:
            os.kill(os.getpid(), number)
        return train_step()

    trainer.train_step = step  # type: ignore[method-assign]
    log = JsonLines(run / "log.jsonl", trainer.step if resume else None)
    if stop_at is None:
        trainer.run(run, log)
    else:
        with pytest.raises(RunInterruptedError, match=f"saved step {stop_at}") as error:
            trainer.run(run, log)
        assert error.value.exit_code == 128 + number
    log.close()
    return trainer


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    ema = {f"ema.{name}": tensor for name, tensor in trainer.optimizer.averaged().items()}
    return trainer.optimizer.state_dict() | ema


def assert_same_state(a: Trainer, b: Trainer) -> None:
    state_a, state_b = state_of(a), state_of(b)
    assert state_a.keys() == state_b.keys() and len(state_a) > 100
    for name, tensor in state_a.items():
        assert torch.equal(tensor, state_b[name]), name


@pytest.mark.parametrize(
    "mode",
    [{}, slow({"mode": "paper"}), slow({"accumulate": 2, "decay": "cosine"}), slow({"precision": "bf16"})],
    ids=["standard", "paper", "accumulate", "bf16"],
)
def test_resume_is_bit_exact(tmp_path: Path, dataset: Dataset, mode: dict[str, object]) -> None:
    preset = tiny_preset(**mode)
    whole = trained(preset, dataset, tmp_path / "whole")
    trained(preset, dataset, tmp_path / "parts", stop_at=6)  # inside a window of the log, and inside an epoch
    parts = trained(preset, dataset, tmp_path / "parts", resume=True)
    assert parts.step == whole.step == 12
    assert_same_state(whole, parts)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    assert len(losses_of(tmp_path / "whole")) == 3


def test_another_seed_gives_other_weights(tmp_path: Path, dataset: Dataset) -> None:
    a, b = (trained(tiny_preset(steps=2, seed=seed), dataset, tmp_path / str(seed)) for seed in (0, 1))
    assert not torch.equal(a.optimizer.parameters[0], b.optimizer.parameters[0])


def test_accumulation_equals_the_whole_batch(tmp_path: Path, dataset: Dataset) -> None:
    """Same images, t, flips, noise and dropout masks; only the order of summation differs."""
    whole, split = Trainer(tiny_preset(), dataset, CPU), Trainer(tiny_preset(accumulate=4), dataset, CPU)
    losses = [[], []]
    for _ in range(3):
        for trainer, values in zip((whole, split), losses, strict=True):
            loss, norm, _ = trainer.train_step()
            values.append((loss.item(), norm.item()))
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)
    # One step's gradient, before Adam's division makes small differences large.
    whole, split = Trainer(tiny_preset(), dataset, CPU), Trainer(tiny_preset(accumulate=4), dataset, CPU)
    for trainer in (whole, split):
        for per_image in trainer.part_losses():
            (per_image.sum() / 8).backward()
    for p, q in zip(whole.optimizer.parameters, split.optimizer.parameters, strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path: Path, dataset: Dataset) -> None:
    trained(tiny_preset(steps=120, log_every=20), dataset, tmp_path / "run")
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < 0.9 * losses[0]


def test_divergence_stops_the_run_and_spares_the_weights(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_preset(patience=3), dataset, CPU)
    loss = trainer.diffusion.loss

    def poisoned(*args: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        per_image, t = loss(*args, **options)  # type: ignore[arg-type]
        # Steps 2, 5, 6 and 7 are bad: one alone is survived, three in a row are not.
        return (per_image * float("nan") if trainer.step in (2, 5, 6, 7) else per_image), t

    monkeypatch.setattr(trainer.diffusion, "loss", poisoned)
    finite = []
    apply = trainer.optimizer.apply

    def watched(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = apply(value)
        finite.append(all(torch.isfinite(tensor).all() for tensor in state_of(trainer).values()))
        return result

    monkeypatch.setattr(trainer.optimizer, "apply", watched)
    log = JsonLines(tmp_path / "log.jsonl")
    with pytest.raises(DivergedError, match=r"3 steps in a row, 5 to 7") as error:
        trainer.run(tmp_path, log)
    assert error.value.exit_code == 4
    assert finite == [True] * 8
    report = json.loads((tmp_path / "diverged.json").read_text())["examples_of_step"]
    assert list(report) == ["5", "6", "7"]
    assert all(len(set(examples)) == 8 and max(examples) < 29 for examples in report.values())
    first_line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert np.isfinite(first_line["loss"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_with_its_own_exit_code(tmp_path: Path, dataset: Dataset, number: int) -> None:
    handler = signal.getsignal(number)
    trained(tiny_preset(), dataset, tmp_path / "run", stop_at=5, number=number)
    assert checkpoint.load(tmp_path / "run").step == 5
    assert signal.getsignal(number) == handler


def test_resume_refuses_another_data_set(tmp_path: Path, dataset: Dataset) -> None:
    trained(tiny_preset(steps=1), dataset, tmp_path / "run")
    other = Trainer(tiny_preset(), dataclasses.replace(dataset, checksum="1" * 64), CPU)
    with pytest.raises(DataError, match="trained on noise"):
        other.resume(checkpoint.load(tmp_path / "run"))


def test_labels_that_the_network_cannot_take_are_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="no labels"):
        Trainer(tiny_preset(), dataclasses.replace(dataset, labels=None), CPU)
    with pytest.raises(DataError, match="has label 9"):
        Trainer(tiny_preset(), dataclasses.replace(dataset, labels=np.full(29, 9)), CPU)


def test_tally_counts_good_steps_and_bad_ones_in_a_row() -> None:
    tally = LossAccumulator(CPU)
    for loss, applied in ((1.0, True), (float("nan"), False), (float("inf"), False)):
        tally.add(torch.tensor(loss), torch.tensor(applied))
    assert tally.read() == (1.0, 1, 2)
    tally.add(torch.tensor(2.5), torch.tensor(True))
    assert tally.read() == (3.5, 2, 0)


def test_a_resumed_log_forgets_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 4, "loss": 1}\n{"step": 8, "loss": 2}\n{"step": 12, "lo')
    log = JsonLines(path, resume_step=6)
    log.write({"step": 8, "loss": 3})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 4, "loss": 1},
        {"step": 8, "loss": 3},
    ]


def test_averaged_weights_come_and_go(tmp_path: Path, dataset: Dataset) -> None:
    trainer = trained(tiny_preset(steps=3), dataset, tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    with trainer.averaged_weights() as unet:
        assert not unet.training
        for name, tensor in trainer.optimizer.averaged().items():
            assert torch.equal(unet.state_dict()[name], tensor)
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert trainer.network.training


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_seeds_that_no_64_bits_hold(seed: int) -> None:
    with pytest.raises(UsageError, match=rf"seed must be in -2\^63\.\.2\^63-1; got {seed}"):
        tiny_preset(seed=seed)


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 2**32 + 5])
def test_seeds_of_64_bits(seed: int, dataset: Dataset) -> None:
    """All of them count: 2^32 + 5 is another run than 5."""
    losses = [float(Trainer(tiny_preset(seed=s), dataset, CPU).train_step()[0]) for s in (seed, 5, seed)]
    assert losses[0] == losses[2] != losses[1]
