"""When the Triton kernels are chosen, and what is said when they cannot be."""

import os
import subprocess
import sys

import pytest
import torch

from fastddpm import ops
from fastddpm.errors import UsageError
from fastddpm.ops import backend

PROGRAM = """
import sys, torch
if {hidden}:
    sys.modules["triton"] = None
from fastddpm import ops
from fastddpm.errors import UsageError
print(ops.status("cuda")["group_norm_silu"])
print(ops.status("cpu")["group_norm_silu"])
try:
    with ops.use_backend("triton"):
        ops.group_norm_silu(torch.randn(1, 4, 2, 2), torch.ones(4), torch.zeros(4), 2)
except UsageError as error:
    print(error)
"""


def said(hidden: bool = False, **environment: str) -> list[str]:
    """What a process without a GPU prints: the status for cuda, for the CPU, and the error of forcing Triton."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": ""} | environment
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(hidden=hidden)], env=env, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


@pytest.mark.slow
def test_without_a_gpu() -> None:
    pytest.importorskip("triton")
    cuda, cpu, error = said()
    assert "Triton kernels need a GPU, and torch sees none" in cuda
    assert "riton" not in cpu
    assert error.startswith("group_norm_silu: backend 'triton' was forced, but Triton kernels need a GPU")
    assert "possible here: " in error


def test_without_triton() -> None:
    cuda, cpu, error = said(hidden=True)
    assert "Triton is not installed: pip install triton" in cuda
    assert "riton" not in cpu
    assert "'triton' was forced, but Triton is not installed" in error


def test_an_operation_without_a_triton_kernel_is_named() -> None:
    with ops.use_backend("triton"), pytest.raises(UsageError, match="conv3x3 has no triton implementation"):
        ops.conv3x3(torch.randn(1, 4, 4, 4), torch.randn(4, 4, 3, 3), None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
def test_the_interpreter_runs_only_when_it_is_asked_for() -> None:
    pytest.importorskip("triton")
    x, weight, bias = torch.randn(2, 6, 3, 5), torch.randn(6), torch.randn(6)
    assert backend.implementation("group_norm_silu", "cpu").__name__.rpartition(".")[2] != "triton"
    with ops.use_backend("triton"):
        assert backend.implementation("group_norm_silu", "cpu").__name__.endswith("group_norm_silu.triton")
        ours = ops.group_norm_silu(x, weight, bias, 2)
        with pytest.raises(UsageError, match="the Triton kernels take float32, bfloat16 and float16, not f"):
            ops.group_norm_silu(x.double(), weight, bias, 2)
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2, weight, bias, 1e-6))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
