"""A bound that was interrupted, and goes on: to the same bits, wherever that was and whoever goes on."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import team
from helpers.networks import SMALLEST, shaken

from fastddpm.config import DiffusionConfig
from fastddpm.data import Dataset
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.evaluation import bits_per_dim, likelihood
from fastddpm.evaluation.context import EvaluationContext
from fastddpm.evaluation.likelihood import BitsPerDim, bits_cost, bits_of
from fastddpm.evaluation.options import BitsOptions
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling.sampler import Sampler
from fastddpm.unet import UNet

IMAGES = 150  # five blocks, the last one of 22 images
TIMESTEPS = 14
OPTIONS = BitsOptions(every=3)


def subject_in(out: Path, group: ProcessGroup | None = None) -> EvaluationContext:
    """A network with convolutions and its compiled kernels; two blocks fill the 16 batches of a group."""
    torch.manual_seed(0)
    sampler = Sampler(
        shaken(UNet(SMALLEST)), Diffusion(DiffusionConfig(timesteps=TIMESTEPS, beta_start=1e-3, beta_end=0.3))
    )
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 1, 4, 4)).astype(np.uint8)
    dataset = Dataset.of(images, None, "noise")
    out.mkdir(exist_ok=True)
    return EvaluationContext("mnist", sampler, dataset, 20, torch.device("cpu"), out, group or ProcessGroup())


class Evaluated:
    """Counts what the network is evaluated for, and is interrupted before one of its calls or after one block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, call: int | None = None, block: int | None = None) -> None:
        self.images, self.calls, self.kept = 0, 0, 0
        terms, put = bits_per_dim._Evaluator._terms, likelihood._SumShards.put

        def counted(evaluator: Any, pixels: Any, *arguments: Any, **options: Any) -> Any:
            if self.calls == call:
                raise KeyboardInterrupt
            self.calls += 1
            self.images += len(pixels)
            return terms(evaluator, pixels, *arguments, **options)

        def kept(parts: Any, index: int, sums: Any) -> None:
            put(parts, index, sums)
            self.kept += 1
            if self.kept == block:
                raise KeyboardInterrupt

        monkeypatch.setattr(bits_per_dim._Evaluator, "_terms", counted)
        monkeypatch.setattr(likelihood._SumShards, "put", kept)


def cost(blocks_left: int) -> int:
    """Evaluations of the images of the last blocks: t = 0, and every third of the others."""
    offsets = likelihood.Plan.of(IMAGES, TIMESTEPS, OPTIONS).offsets[32 * (5 - blocks_left) :]
    return sum(1 + len(range(1 + offset, TIMESTEPS, 3)) for offset in offsets)


def assert_same(one: BitsPerDim, other: BitsPerDim) -> None:
    assert one.to_dict() == other.to_dict()
    for name in ("terms", "mse", "per_image", "indices"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> BitsPerDim:
    return bits_of(subject_in(tmp_path_factory.mktemp("whole")), OPTIONS)


@pytest.mark.parametrize(
    ("where", "blocks_left"),
    # Groups of two, two and one block. A group of which one block is missing is evaluated again.
    [({"call": 0}, 5), ({"call": 9}, 5), ({"block": 1}, 5), ({"block": 2}, 3), ({"call": 30}, 3), ({"block": 3}, 3),
     ({"block": 4}, 1), ({"block": 5}, 0)],
)  # fmt: skip
def test_it_goes_on_from_any_moment(where: dict[str, int], blocks_left: int, whole: BitsPerDim, tmp_path: Path) -> None:
    context = subject_in(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Evaluated(patch, **where)
        bits_of(context, OPTIONS)
    assert not (tmp_path / "bits.npz").exists()
    with pytest.MonkeyPatch.context() as patch:
        evaluated = Evaluated(patch)
        assert_same(bits_of(context, OPTIONS), whole)
    assert evaluated.images == cost(blocks_left)
    assert cost(5) == bits_cost(context, OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["bits.npz"]


def interrupted(out: Path) -> EvaluationContext:
    context = subject_in(out)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Evaluated(patch, block=4)
        bits_of(context, OPTIONS)
    return context


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BitsOptions(every=3, seed=1), "holds sums with seed 0, not 1; choose another --out, or remove it"),
        (BitsOptions(), "holds sums with every 3, not 1"),
        (BitsOptions(every=3, images=40), "holds sums with images None, not 40"),
    ],
)
def test_another_bound_is_refused(tmp_path: Path, options: BitsOptions, message: str) -> None:
    context = interrupted(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "bits-parts").glob("shard*")}
    assert len(before) == 4
    with pytest.raises(UsageError, match=f"{tmp_path / 'bits-parts'} {message}"):
        bits_of(context, options)
    assert {path: path.read_bytes() for path in (tmp_path / "bits-parts").glob("shard*")} == before


def test_another_network_is_refused(tmp_path: Path) -> None:
    context = interrupted(tmp_path)
    with torch.no_grad():
        next(context.sampler.network.parameters()).add_(1)
    with pytest.raises(UsageError, match="holds sums with network"):
        bits_of(context, OPTIONS)


@pytest.mark.parametrize("damage", ["byte", "length", "other images", "other shape"])
def test_damaged_sums_are_evaluated_again(
    damage: str, whole: BitsPerDim, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = interrupted(tmp_path)
    path = tmp_path / "bits-parts" / "shard-00001.npz"
    data = bytearray(path.read_bytes())
    if damage == "byte":
        data[data.find(b"over_images") + 200] ^= 1
        path.write_bytes(data)
    elif damage == "length":
        path.write_bytes(data[:100])
    elif damage == "other images":
        path.write_bytes((tmp_path / "bits-parts" / "shard-00000.npz").read_bytes())
    else:
        with np.load(path) as arrays:
            values = dict(arrays)
        np.savez(path, **(values | {"rest": values["rest"][:-1]}))  # type: ignore[arg-type]
    assert_same(bits_of(context, OPTIONS), whole)
    assert f"{path} " in capsys.readouterr().err


def of_two(group: ProcessGroup, out: Path, killed: bool) -> BitsPerDim:
    context = subject_in(out, group)
    put = likelihood._SumShards.put

    def then_killed(parts: Any, index: int, sums: Any) -> None:
        put(parts, index, sums)
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if killed:
        likelihood._SumShards.put = then_killed  # type: ignore[method-assign]
    return bits_of(context, OPTIONS)


@pytest.mark.slow
def test_what_two_processes_left_one_or_two_finish(whole: BitsPerDim, tmp_path: Path) -> None:
    for count in (1, 2):
        out = tmp_path / f"{count}"
        codes = [one.code for one in team.run(2, team.grouped, of_two, out, True)]
        assert codes == [75, -signal.SIGKILL]
        assert (out / "bits-parts" / "shard-00001.npz").exists()
        found = [bits_of(subject_in(out), OPTIONS)] if count == 1 else team.values(2, team.grouped, of_two, out, False)
        for one in found:
            assert_same(one, whole)
        assert [path.name for path in out.iterdir()] == ["bits.npz"]


def test_the_meter_counts_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = interrupted(tmp_path)
    capsys.readouterr()
    bits_of(context, OPTIONS)
    assert f"bits/dim {cost(1)}/{cost(1)} evaluations" in capsys.readouterr().err
