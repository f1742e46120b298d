"""A forward pass beside peers in two precisions: every side computes the network, and ratios are to the right peer."""

import json
from pathlib import Path

import inference
import inference_sides
import pytest

import fastddpm

EAGER = [name for names in inference_sides.SIDES.values() for name in names if "compiled" not in name]


def test_ratios_are_to_the_fastest_peer_of_the_precision_and_of_any() -> None:
    times = {"prepared": 4.0, "module": 1.0, "eager": 8.0, "onnxruntime": 6.0, "prepared bf16": 2.0, "eager bf16": 7.0}
    assert inference.ratios(times, ["fp32"]) == {"fp32": 1.5}
    assert inference.ratios(times, ["fp32", "bf16"]) == {"fp32": 1.5, "bf16": 3.5, "bf16 to any": 3.0}


@pytest.mark.usefixtures("bf16_instructions")
def test_every_side_evaluates_the_trained_network(tmp_path: Path) -> None:
    """The digits in the package, within float32's rounding of float64, or that of 16 bits."""
    pytest.importorskip("diffusers")
    out = tmp_path / "inference.json"
    arguments = ["--preset", "mnist", "--weights", "trained", "--batch", "2", "--rounds", "1", "--no-compile"]
    assert inference.main([*arguments, "--no-memory", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["weights"] == "trained, mnist" and document["steps"] == fastddpm.load("digits").steps
    (row,) = document["rows"]
    expected = [name for name in EAGER if "onnx" not in name or not inference_sides.without_onnx()]
    assert list(row["ms"]) == list(row["error"]) == expected
    for name, error in row["error"].items():
        least, most = (1e-5, 3e-2) if "16" in name else (0, 1e-5)
        assert least < error < most, name


def test_random_weights_have_a_seed() -> None:
    first, again, other = (inference_sides.random_weights("mnist", seed).state_dict() for seed in (1, 1, 2))
    name = next(iter(first))
    assert first[name].equal(again[name]) and not first[name].equal(other[name])


def test_weights_that_do_not_come_with_the_package_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(SystemExit) as stopped:
        inference.main(["--weights", "trained"])
    assert stopped.value.code == 2
    assert "no trained weights of cifar10 come with the package" in capsys.readouterr().err
