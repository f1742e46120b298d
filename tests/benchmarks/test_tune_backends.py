"""The tuner of backends, with a clock of the tests' own and backends that run on a CPU."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import tune_backends
from shapes import Call

SHAPE = ("attention", "q 2x8x16 float32, k 2x8x16 float32, v 2x8x16 float32")


def test_backends_with_the_same_numbers_take_turns() -> None:
    call = Call("attention", (*(torch.empty(2, 8, 16, device="meta") for _ in range(3)), 0.25, False))
    taken = []

    def clock(run: object) -> float:
        taken.append(run)
        return 1.0 if len(taken) % 2 else 0.5

    found = tune_backends.compare(call, torch.device("cpu"), clock, 3, ("reference", "sdpa"))
    assert found == {"reference": 1.0, "sdpa": 0.5} and len(taken) == 6


@pytest.mark.parametrize(("seconds", "kept"), [(0.5, {"attention": {SHAPE[1]: "cuda"}}), (0.98, None)])
def test_a_faster_backend_is_installed_and_a_slower_one_removed(
    seconds: float, kept: dict[str, object] | None, tmp_path: Path
) -> None:
    path = tmp_path / "backends.json"
    path.write_text(json.dumps({"sm_90": {"attention": {SHAPE[1]: "cuda"}}}))
    assert tune_backends.install("sm_90", {SHAPE: {"triton": 1.0, "cuda": seconds}}, path) == (kept is not None)
    assert json.loads(path.read_text()) == ({} if kept is None else {"sm_90": kept})


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it would start")
    with pytest.raises(SystemExit, match="2"):
        tune_backends.main(["--out", str(tmp_path / "out.json")])
    assert "timed on a GPU" in capsys.readouterr().err
