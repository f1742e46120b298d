"""Snapshots of power-function averages in a run, and the averages that `fastddpm.average` makes of them."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import team
from helpers.marks import slow
from helpers.saved_checkpoint import reseal, write_manifest
from helpers.training import tiny_preset, train, whole_state
from torch import Tensor

import fastddpm
from fastddpm import average as command
from fastddpm import sample
from fastddpm.config import Preset, TrainConfig
from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from fastddpm.storage import checkpoint
from fastddpm.training.length import report_notes
from fastddpm.training.optimizer import Optimizer
from fastddpm.training.power_average import exponent_of
from fastddpm.training.saved import refuse_changes
from fastddpm.training.snapshots import _halved, average
from fastddpm.training.trainer import Trainer

STEPS = 24


def preset(**options: Any) -> Preset:
    return tiny_preset(
        **{"steps": STEPS, "ema_snapshots": 4, "ema_snapshot_dtype": "float32", "log_every": 100} | options
    )


class Own(torch.nn.Module):
    """Quick to train, with a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.register_buffer("scale", torch.tensor([3]))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x_t) * self.scale
        return out


def trained(config: Preset, run: Path, **options: Any) -> Trainer:
    return train(SINGLE_PROCESS, config, run, network=Own(), **options)


def snapshots(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in (run / "snapshots").glob("*/*")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A run with snapshots of three averages: two to combine, and one of another length to compare with."""
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, trained(preset(ema_snapshot_lengths=(0.05, 0.1, 0.17)), run)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.2])
def test_the_optimizer_averages_known_weights(sigma_rel: float) -> None:
    """Weights that are polynomials of the step, against their shares in float64, also over steps that are skipped."""
    config = TrainConfig(ema_snapshots=10, ema_snapshot_lengths=(sigma_rel,))
    steps, powers = 60, np.arange(5)
    network = torch.nn.Linear(5, 1, bias=False)
    optimizer = Optimizer(network, config)
    gamma = exponent_of(sigma_rel)
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    expected = np.zeros(5)
    for step in range(steps):
        weights = ((step + 1) / steps) ** powers
        with torch.no_grad():
            network.weight.copy_(torch.tensor(weights))
        # A gradient of 0 leaves the weights as they are.
        network.weight.grad = torch.full((1, 5), torch.nan if step % 7 == 3 else 0.0)
        optimizer.step(step, torch.tensor(0.0))
        expected += (edges[step + 1] - edges[step]) * weights
    np.testing.assert_allclose(optimizer.power_averaged(sigma_rel)["weight"][0].numpy(), expected, rtol=3e-6)


def test_snapshots_change_nothing_else(run: tuple[Path, Trainer], tmp_path: Path) -> None:
    _, trainer = run
    without = trained(preset(ema_snapshots=0), tmp_path / "without")
    ours, theirs = whole_state(trainer), whole_state(without)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not (tmp_path / "without" / "snapshots").exists()
    assert {path.stem for path in (tmp_path / "without").glob("checkpoints/*/*.safetensors")} == {"model", "training"}


def test_a_snapshot_holds_the_averages(run: tuple[Path, Trainer]) -> None:
    path, trainer = run
    assert [each.name for each in sorted((path / "snapshots").iterdir())] == [
        f"step-{step:08d}" for step in range(4, STEPS + 1, 4)
    ]
    saved = checkpoint.load(path / "snapshots" / f"step-{STEPS:08d}")
    assert {*saved.tensors} == {"power-0.05", "power-0.1", "power-0.17", "constants"}
    for length in (0.05, 0.1, 0.17):
        for name, tensor in trainer.optimizer.power_averaged(length).items():
            assert torch.equal(saved.tensors[f"power-{length}"][name], tensor)


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The difference of two sets of weights, as a fraction of how far the weights went from the first ones."""
    start = {name: p.detach() for name, p in Own().named_parameters()}
    moved = torch.cat([(expected[name] - start[name]).flatten() for name in start]).norm()
    return float(torch.cat([(found[name] - expected[name]).flatten() for name in start]).norm() / moved)


@pytest.mark.slow
def test_another_length_is_the_one_that_was_tracked(tmp_path: Path, run: tuple[Path, Trainer]) -> None:
    """Of the snapshots of two lengths; the third was updated in training."""
    path, _ = run
    two = tmp_path / "two"
    trained(preset(ema_snapshots=2), two)
    for step, most in ((STEPS, 0.02), (12, 0.04)):
        tracked = checkpoint.load(path / "snapshots" / f"step-{step:08d}").tensors["power-0.17"]
        made = average(two, 0.17, step)
        assert made.step == step and made.average.sigma_rel == 0.17
        assert made.average.error < 2 * most and relative(made.weights, tracked) < most
        assert relative(average(two, 0.1, step).weights, tracked) > 2 * most


def test_a_stored_length_and_a_step_between_two_snapshots(run: tuple[Path, Trainer]) -> None:
    path, trainer = run
    made = average(path, 0.1)
    for name, tensor in trainer.optimizer.power_averaged(0.1).items():
        torch.testing.assert_close(made.weights[name], tensor, rtol=1e-6, atol=1e-7)
    between = [relative(average(path, 0.2, step).weights, average(path, 0.2, 12).weights) for step in (11, 12, 13)]
    assert between[1] == 0 and all(0 < each < 0.3 for each in (between[0], between[2]))


@pytest.mark.slow
def test_float16(tmp_path: Path, run: tuple[Path, Trainer]) -> None:
    trained(preset(ema_snapshot_dtype="float16", ema_snapshot_lengths=(0.05, 0.1, 0.17)), tmp_path / "half")
    stored = checkpoint.load(tmp_path / "half" / "snapshots" / "step-00000008").tensors
    assert {tensor.dtype for tensor in stored["power-0.1"].values()} == {torch.float16}
    half, whole = (average(path, 0.14).weights for path in (tmp_path / "half", run[0]))
    for name, tensor in half.items():  # half a unit of the last place, 2^-11, times coefficients with a sum below 2
        assert 0 <= (tensor - whole[name]).abs().max() <= 2**-10 * whole[name].abs().max()
        assert tensor.dtype == whole[name].dtype
    assert _halved(torch.tensor([1e5, 1.0])).dtype == torch.float32


@pytest.mark.parametrize("until", [6, slow(8)])
def test_resume_is_exact(tmp_path: Path, until: int) -> None:
    config = preset(steps=12)
    whole = trained(config, tmp_path / "whole")
    trained(config, tmp_path / "parts", until=until)
    trained(config, tmp_path / "parts", resume=True, until=10)
    parts = trained(config, tmp_path / "parts", resume=True)
    ours, theirs = snapshots(tmp_path / "whole"), snapshots(tmp_path / "parts")
    assert ours == theirs and len(ours) == 3 * 10
    for length in (0.05, 0.1):
        expected, found = (trainer.optimizer.power_averaged(length) for trainer in (whole, parts))
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_snapshots_of_steps_that_are_taken_again_are_removed(tmp_path: Path) -> None:
    config = preset(steps=8)
    run = tmp_path / "run"
    trained(config, run, until=3)
    trained(config, tmp_path / "other")
    (tmp_path / "other" / "snapshots").rename(run / "snapshots")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, ema_snapshots=5))
    trained(config, run, resume=True)
    assert sorted(checkpoint.steps_in(run / "snapshots")) == [5, 8]
    with pytest.raises(UsageError, match="snapshots of another run"):
        trained(config, run)
    for path in (run / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    trained(config, run, until=1)  # killed before its first checkpoint: begins again
    assert not checkpoint.steps_in(run / "snapshots")


def test_averages_begin_with_the_run(tmp_path: Path) -> None:
    off, on = preset(steps=8, ema_snapshots=0), preset(steps=8)
    trained(off, tmp_path / "run", until=3)
    refuse_changes(off, on, tmp_path / "run", override=False)
    with pytest.raises(UsageError, match=r"no power-function average of length 0\.05.*or set --ema-snapshots 0"):
        trained(on, tmp_path / "run", resume=True)
    trained(on, tmp_path / "other", until=5)
    trained(off, tmp_path / "other", resume=True)
    assert [*checkpoint.steps_in(tmp_path / "other" / "snapshots")] == [4]
    with pytest.raises(UsageError, match="other options: ema_snapshot_lengths"):
        refuse_changes(on, preset(steps=8, ema_snapshot_lengths=(0.05,)), tmp_path, override=False)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "run", tmp_path / "out"
    train(SINGLE_PROCESS, preset(steps=6, ema_snapshots=2), path)
    command.main([str(path), str(out), "--sigma-rel", "0.15", "--step", "4"])
    assert "average of sigma_rel 0.15 at step 4, of 4 stored averages" in capsys.readouterr().out
    model, expected = fastddpm.load(out), average(path, 0.15, 4)
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor, expected.weights[name])
    assert model.average == expected.average and model.steps == 4 and model.preset == fastddpm.load(path).preset
    assert model.data is not None and model.data.name == "noise"
    notes: list[str] = []
    report_notes(model, notes.append)
    assert not [note for note in notes if "--ema" in note]  # it has no share of the initial weights
    model.save_pretrained(tmp_path / "pipeline")
    assert "power-function EMA of σ\\_rel 0.15" in (tmp_path / "pipeline" / "README.md").read_text()
    sample.main([str(out), "--seeds", "0-1", "--steps", "2", "--device", "cpu"])
    assert (out / "samples-0-1" / "samples.npz").is_file()
    command.main([str(path), str(tmp_path / "short"), "--sigma-rel", "0.01"])
    assert "note: the weighting of the steps is" in capsys.readouterr().err


def test_what_cannot_be_averaged(run: tuple[Path, Trainer], tmp_path: Path) -> None:
    path, _ = run
    with pytest.raises(UsageError) as error:
        command.main([str(path), str(path), "--sigma-rel", "0.5", "--step", "0"])
    for part in ("3 options", "--sigma-rel must be in 0.001..0.28", "--step must be positive", "is not empty"):
        assert part in str(error.value)
    with pytest.raises(UsageError, match=rf"step must be in 1\.\.{STEPS}, which the snapshots of .* reach; got 25"):
        average(path, 0.1, 25)
    with pytest.raises(UsageError, match="no run at"):
        average(tmp_path / "none", 0.1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no snapshots; train with --ema-snapshots N"):
        average(tmp_path / "empty", 0.1)
    with pytest.raises(UsageError) as error:
        TrainConfig(ema_snapshots=-1, ema_snapshot_lengths=(0.1, 0.1, 0.3), ema_snapshot_dtype="fp8")  # type: ignore[arg-type]
    for part in (
        "ema_snapshots must be 0",
        "several that differ",
        "must be in 0.001..0.28",
        "ema_snapshot_dtype must be",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("damage", ["byte", "missing", "lengths", "shape", "documents"])
def test_damaged_snapshots(run: tuple[Path, Trainer], tmp_path: Path, damage: str) -> None:
    shutil.copytree(run[0] / "snapshots", tmp_path / "run" / "snapshots")
    path = tmp_path / "run" / "snapshots" / "step-00000008"
    file = path / "power-0.1.safetensors"
    if damage == "byte":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    elif damage == "shape":
        file.write_bytes(safetensors.torch.save({"x": torch.zeros(3)}))
    elif damage == "lengths":
        (path / "lengths.json").write_text("[0.9]")
    else:
        (path / "lengths.json").write_text('{"a": 1}')
    if damage not in ("byte", "missing"):
        reseal(path)
        manifest = (path / "manifest.json").read_bytes().replace(b'"step": 1', b'"step": 8')
        write_manifest(path, manifest)
    with pytest.raises(DataError, match="step-00000008"):
        average(tmp_path / "run", 0.15)


def test_a_network_of_ones_own_with_constants(tmp_path: Path) -> None:
    trainer = trained(preset(steps=6), tmp_path / "run")
    average(tmp_path / "run", 0.1).save(tmp_path / "out")
    other = Own()
    assert fastddpm.pretrained.load_weights(other, tmp_path / "out") == 6
    torch.testing.assert_close(other.layer.weight, trainer.optimizer.power_averaged(0.1)["layer.weight"])
    assert other.scale.tolist() == [3]


def shards(group: ProcessGroup, config: Preset, run: Path) -> None:
    train(group, config, run, until=5)
    train(group, config, run, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_several_processes(tmp_path: Path, kind: str) -> None:
    """The snapshots of two processes are those of one, but for the order of summation."""
    config = preset(steps=8, parallel=kind, lr=1e-3)
    train(SINGLE_PROCESS, config, tmp_path / "alone")
    team.values(2, team.grouped, shards, config, tmp_path / "two")
    expected, found = (average(tmp_path / name, 0.15).weights for name in ("alone", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-4)
