"""Which tests a machine with a GPU runs, asked of pytest where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.marks import slow
from helpers.pretended_gpu import PROGRAM

from fastddpm.kernels import native

ROOT = Path(__file__).parents[2]


def collected(*arguments: str) -> set[tuple[str, str]]:
    """(test file, implementation) of the operators' tests."""
    command = [sys.executable, "-c", PROGRAM, "--collect-only", *arguments, "tests/ops"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = set()
    for line in done.stdout.splitlines():
        path, _, test = line.partition("::")
        if test:
            found.add((Path(path).stem.removeprefix("test_"), test.partition("[")[2].rstrip("]")))
    return {(file, name) for file, parameters in found for name in _implementations(parameters)}


def _implementations(parameters: str) -> set[str]:
    return {"reference", "auto", "triton", "cuda", *native.ISAS} & set(parameters.split("-"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-m", "gpu"], slow(["--device", "cuda"])], ids=" ".join)
def test_kernels_of_every_operator_run_on_the_gpu(options: list[str]) -> None:
    found = collected(*options)
    both = {(op, name) for op in ("group_norm_silu", "q_sample", "reverse_step", "random_normal")
            for name in ("triton", "cuda")}  # fmt: skip
    assert found >= {*both, ("attention", "triton"), ("cuda_graph", "triton"), ("cuda_graph", "cuda")}
    assert not {("attention", "cuda"), ("conv3x3", "triton"), ("conv3x3", "cuda")} & found
    if "-m" in options:
        assert {name for op, name in found if op != "attention_sdpa"} == {"triton", "cuda"}
    else:
        assert {name for op, name in found if op == "attention"} == {"reference", "auto", "triton"}
