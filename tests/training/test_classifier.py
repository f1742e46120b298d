"""Training a classifier of noisy images: its loss in float64, that it learns, interruptions, and the command."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.classifiers import config, logits64, shades
from helpers.runs import trained
from helpers.training import CPU

from fastddpm import classifier as command
from fastddpm import sample
from fastddpm.config import DiffusionConfig
from fastddpm.data import Dataset
from fastddpm.diffusion import draw_examples
from fastddpm.errors import DataError, DivergedError, UsageError
from fastddpm.kernels.philox import STREAM_FORWARD
from fastddpm.ops.noise import NoiseKey
from fastddpm.sampling.classifier import Classifier
from fastddpm.storage import checkpoint
from fastddpm.training.classifier import ClassifierTrainer, check_labels
from fastddpm.training.run_log import JsonLines, read_log
from fastddpm.training.signals import RunInterruptedError


def trainer(dataset: Dataset | None = None, **options: Any) -> ClassifierTrainer:
    return ClassifierTrainer(config(**options), dataset or shades(), CPU)


def run(ours: ClassifierTrainer, where: Path) -> Path:
    where.mkdir(exist_ok=True)
    lines = JsonLines(where / "log.jsonl", ours.step)
    try:
        return ours.run(where, lines)
    finally:
        lines.close()


def test_the_loss_is_the_cross_entropy_of_x_t() -> None:
    """x_t = sqrt(bar) x_0 + sqrt(1 - bar) eps of the key's noise, mirrored where the key says; all in float64."""
    ours, data = trainer(flip=True), shades()
    with torch.no_grad():
        for parameter in ours.classifier.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, labels, numbers = data.images[:16], data.labels[:16], np.arange(16)  # type: ignore[index]
    key = NoiseKey.of(5, 7, range(16))
    losses, right, t = ours.losses_at(torch.from_numpy(images), torch.from_numpy(labels), key)
    flip = draw_examples(key, 1000).flip.numpy()
    x0 = images / 127.5 - 1
    x0[flip] = x0[flip][..., ::-1]
    bar = np.cumprod(1 - oracle.betas("linear", 1000))[t.numpy()].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(bar) * x0 + np.sqrt(1 - bar) * oracle.normals((1, 6, 6), numbers, 5, 7, STREAM_FORWARD)
    logits = logits64(ours.classifier, torch.from_numpy(x_t), t).detach().numpy()
    expected = np.log(np.exp(logits).sum(1)) - logits[numbers, labels]
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(right.numpy(), logits.argmax(1) == labels)
    assert 0 < flip.mean() < 1 and len(set(t.tolist())) > 12


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    """Three shades: they are told apart where the noise is low, at the end of the process it is a guess."""
    run(trainer(steps=50, batch=24, lr=5e-3, log_every=10, save_every=50), tmp_path)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50]
    assert lines[-1]["accuracy_by_t"][0] > 0.75 > 0.6 > lines[-1]["accuracy_by_t"][3]
    assert lines[-1]["loss"] < 0.87 * np.log(3) < lines[0]["loss"] and lines[0]["lr"] == 5e-3


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = run(trainer(), tmp_path / "whole")
    step = ClassifierTrainer.train_step

    def stopped(self: ClassifierTrainer) -> Any:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(ClassifierTrainer, "train_step", stopped)
    with pytest.raises(RunInterruptedError, match=r"SIGTERM: saved step 3 in .*; --resume continues it") as stop:
        run(trainer(), tmp_path / "parts")
    assert stop.value.exit_code == 143
    monkeypatch.setattr(ClassifierTrainer, "train_step", step)
    again = trainer()
    again.resume(checkpoint.load(tmp_path / "parts"))
    assert again.step == 3
    assert run(again, tmp_path / "parts").name == last.name == "step-00000004"
    one, other = (Classifier.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    texts = [read_log(tmp_path / name / "log.jsonl")[-1] for name in ("whole", "parts")]
    assert texts[0]["accuracy_by_t"] == texts[1]["accuracy_by_t"] and texts[0]["loss"] == texts[1]["loss"]


@pytest.mark.slow
def test_a_seed_names_a_training(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        run(trainer(steps=2, seed=seed), tmp_path / name)
    one, again, other = (Classifier.from_pretrained(tmp_path / name).head.weight for name in ("one", "again", "other"))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_another_data_set_or_fewer_steps_are_refused(tmp_path: Path) -> None:
    run(trainer(), tmp_path)
    saved = checkpoint.load(tmp_path)
    with pytest.raises(DataError, match=r"was trained on shades .* name that data set, as it was, with --data"):
        trainer(shades(48)).resume(saved)
    with pytest.raises(UsageError, match="has taken 4 steps already; --steps 3 would end before that"):
        trainer(steps=3).resume(saved)


def test_a_training_that_diverges_stops(tmp_path: Path) -> None:
    ours = trainer(steps=10, log_every=1, save_every=10)
    with torch.no_grad():
        ours.classifier.head.bias.fill_(float("inf"))
    with pytest.raises(DivergedError, match="not finite in 3 steps in a row, up to step 3"):
        run(ours, tmp_path)
    with pytest.raises(DivergedError, match=r"is not saved: weight\.head\.bias is not finite"):
        ours.save(tmp_path, None)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "shades has no labels, and a classifier learns them; name labelled images with --data"),
        (np.zeros(96, np.int64), "shades has 1 class; a classifier tells two or more apart"),
        (np.arange(96) % 4, "shades has 4 classes, and the classifier is for 3"),
    ],
)
def test_labels_that_do_not_fit(labels: np.ndarray | None, message: str) -> None:
    data = shades()
    with pytest.raises(UsageError, match=message):
        trainer(Dataset.of(data.images, labels, "shades"))
    assert check_labels(data) == 3


# The command


def arguments(*more: str) -> list[str]:
    small = "--steps 2 --batch 4 --log-every 1 --save-every 1 --device cpu"
    return [*more, *small.split()]


@pytest.mark.slow
def test_the_command_trains_resumes_and_guides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = trained(tmp_path / "model")
    command.main(arguments(str(model)))
    where = model / "classifier"
    said = capsys.readouterr()
    assert f"checkpoint {where}/checkpoints/step-00000002" in said.out
    assert "classifier of 10 classes" in said.err and "right by quarter of t: " in said.err
    kept = json.loads((where / "classifier.json").read_text())
    assert (kept["unet"]["width"], kept["unet"]["num_classes"], kept["diffusion"]["schedule"]) == (8, 10, "cosine")
    with pytest.raises(UsageError, match="holds a classifier already; continue it with --resume"):
        command.main(arguments(str(model)))
    command.main(["--resume", "--out", str(where), "--steps", "3", "--device", "cpu"])
    assert [line["step"] for line in read_log(where / "log.jsonl")] == [1, 2, 3]
    with pytest.raises(UsageError, match=r"was trained with other options: train\.lr: 0\.002 -> 0\.5"):
        command.main(["--resume", "--out", str(where), "--lr", "0.5", "--steps", "4"])

    options = f"--seeds 0-1 --steps 2 --guidance 0 --classifier {where} --classifier-scale 2 --out drawn --device cpu"
    sample.main([str(model), *options.split()])
    assert "classifier scale 2.0" in capsys.readouterr().err
    assert np.load("drawn/samples.npz")["images"].shape == (2, 1, 16, 16)


def test_a_preset_in_place_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--width", "8", "--multipliers", "1", "--attention-resolutions", "8", "--dropout", "0.5"]
    with pytest.raises(UsageError, match="groups must divide"):  # 32 groups of 8 channels
        command.main(arguments("--preset", "cifar10", *small))
    command.main(arguments("--preset", "mnist", *small))
    found = Classifier.from_pretrained("runs/mnist-classifier")
    assert found.config.diffusion == DiffusionConfig(schedule="cosine", prediction="v", variance="fixedsmall")
    assert found.config.unet.dropout == 0.5 and found.config.unet.multipliers == (1,)


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        ("", ["name the model to guide, or the configuration of one with --preset; neither is given"]),
        ("digits --preset mnist", ["both are given"]),
        ("no-model --lr -1 --batch 0", ["no checkpoint at no-model", "lr must be positive", "batch must be positive"]),
        ("--preset minst", ["unknown preset 'minst'"]),
        ("--resume --data x", ["--resume needs --out", "leave out --data"]),
        ("--resume --out nothing", ["nothing to resume: nothing holds no classifier"]),
    ],
)
def test_mistakes(line: str, messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refusal:
        command.main(line.split())
    assert [message for message in messages if message not in str(refusal.value)] == []
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="trained by one process; start the command without torchrun"):
        command.main(["digits"])
