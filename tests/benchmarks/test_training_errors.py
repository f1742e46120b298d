"""benchmarks/training_errors.py: what it measures, and that our bfloat16 is the more exact one."""

import json
from pathlib import Path

import pytest
import torch
import training_errors

from fastddpm.kernels import native


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_ours_is_closer_to_float64_than_autocast(tmp_path: Path, bf16_instructions: None) -> None:
    out = tmp_path / "errors.json"
    assert training_errors.main(["--preset", "mnist", "--batch", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["preset"], row["weights"]) for row in rows] == [("mnist", "initial"), ("mnist", "random")]
    for row in rows:
        ours, plain = row["error"]["fastddpm"], row["error"]["plain PyTorch"]
        assert all(1e-3 < ours[of] < plain[of] < 2e-2 for of in ("output", "gradient")), row


def test_the_gradient_is_of_the_mean_square() -> None:
    model = torch.nn.Linear(1, 1).double()
    x, eps = torch.tensor([[3.0], [1.0]], dtype=torch.float64), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    out, gradient = training_errors.output_and_gradient(model, [x], eps)
    difference = (out - eps).flatten()
    expected = torch.stack([(difference * x.flatten()).sum(), difference.sum()])  # 2 / 2 of each
    torch.testing.assert_close(gradient, expected)
