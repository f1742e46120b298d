"""Training steps in two precisions: what is timed, and what is set beside each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import training_sides
import training_step


def test_the_ratio_is_to_the_fastest_peer() -> None:
    assert training_step.ratio({"fastddpm": 2.0, "torch eager": 5.0, "diffusers": 3.0}) == 1.5
    assert training_step.ratio({"fastddpm": 2.0, "fastddpm, compiled": 1.5, "diffusers, compiled": 3.0}) == 2


def test_differences_are_relative_and_of_the_last_quarter_s_means() -> None:
    fp32 = np.array([[1.0, 2.0], [2.0, 4.0], [4.0, 8.0], [8.0, 10.0]])
    bf16 = np.array([[1.0, 2.0], [1.0, 4.0], [4.0, 8.0], [8.0, 15.0]])
    assert training_step.difference(fp32, bf16) == {
        "loss": {"mean_difference": 0.125, "largest_difference": 0.5, "last_quarter_fp32": 8, "last_quarter_bf16": 8},
        "gradient norm": {
            "mean_difference": 0.125, "largest_difference": 0.5, "last_quarter_fp32": 10, "last_quarter_bf16": 15,
        },
    }  # fmt: skip


def test_the_first_step_of_a_run_differs_by_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "steps.json"
    assert training_step.main(["--compare-precisions", "2", "--batch", "8", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    fp32, bf16 = (np.array(row["losses_and_norms"][precision]) for precision in ("fp32", "bf16"))
    assert fp32.shape == bf16.shape == (2, 2) and row["steps"] == 2
    assert np.allclose(fp32[0], bf16[0], rtol=2e-2) and not np.array_equal(fp32, bf16)
    assert "mnist, 2 steps in bf16 beside fp32" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["0"], ["2", "--preset", "cifar10"]])
def test_a_comparison_needs_steps_and_images(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        training_step.main(["--compare-precisions", *arguments])
    assert stopped.value.code == 2 and "--compare-precisions needs" in capsys.readouterr().err


@pytest.mark.parametrize("precision", training_step.PRECISIONS)
@pytest.mark.parametrize("peer", [name for name in training_sides.PEERS if "compile" not in name])
def test_every_side_trains(peer: str, precision: str) -> None:
    if "diffusers" in peer:
        pytest.importorskip("diffusers")
    training_sides.training_step(peer, "mnist", 2, precision)()


def test_the_command_times_the_eager_sides(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    out = tmp_path / "training.json"
    arguments = ["--preset", "mnist", "--batch", "2", "--rounds", "1", "--no-compile", "--out", str(out)]
    assert training_step.main(arguments) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["preset"], row["batch"]) == ("mnist", 2) and row["ratio"].keys() == row["ms"].keys()
    assert row["ms"].keys() == {"fp32", "bf16"} and row["ms"]["bf16"].keys() == {"fastddpm", "torch eager", "diffusers"}
