"""The driver of everything that needs a GPU, with commands of the tests' own where there is none."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
from helpers.pretended_gpu import PROGRAM

FOREVER = float("inf")


def python(program: str, **environment: str) -> gpu.Stage:
    return gpu.Stage((sys.executable, "-c", program), environment)


def drive(out: Path, seconds: float = FOREVER, again: bool = False, **stages: gpu.Stage) -> dict[str, dict]:
    ended = gpu.drive(stages, out, seconds, again, "a device")
    document = json.loads((out / "gpu.json").read_text())
    assert document["stages"] == ended and document["machine"]["device"] == "a device"
    return ended


def test_a_failing_stage_is_named_and_does_not_stop_the_next(tmp_path: Path) -> None:
    ended = drive(tmp_path, first=python("print('so far'); raise SystemExit(3)"),
                  second=python("import os; print(os.environ['GIVEN'])", GIVEN="this"))  # fmt: skip
    assert (ended["first"]["passed"], ended["first"]["code"]) == (False, 3)
    assert ended["first"]["reason"] == "exit code 3: first.log"
    assert (ended["second"]["passed"], ended["second"]["code"], ended["second"]["reason"]) == (True, 0, None)
    assert (tmp_path / "first.log").read_text() == "so far\n"
    assert (tmp_path / "second.log").read_text() == "this\n"


def test_only_what_has_not_passed_is_run_again(tmp_path: Path) -> None:
    count = "with open({!r}, 'a') as file: file.write('x')\nraise SystemExit({})"
    passing, failing = str(tmp_path / "passing"), str(tmp_path / "failing")
    stages = {"a": python(count.format(passing, 0)), "b": python(count.format(failing, 1))}
    for again in (False, False, True):
        drive(tmp_path, again=again, **stages)
    assert Path(passing).read_text() == "xx"
    assert Path(failing).read_text() == "xxx"


@pytest.mark.slow
def test_what_is_beyond_the_time_is_interrupted_and_keeps_what_it_has(tmp_path: Path) -> None:
    slow = """
import time
try:
    time.sleep(300)
except KeyboardInterrupt:
    print("kept")
"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a command that a shell started in the background
    try:
        ended = drive(tmp_path, seconds=20, slow=python(slow), later=python("pass"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended["slow"]["passed"] is False and ended["slow"]["code"] is None
    assert ended["slow"]["reason"].startswith("stopped after")
    assert (tmp_path / "slow.log").read_text() == "kept\n"
    assert "later" not in ended


def test_tests_are_pieces_of_one_file() -> None:
    """Which exist, with those of the operators on the device; a file without tests for it passes."""
    operators, others = gpu.pieces("operators"), gpu.pieces("tests")
    assert "operators-ops-test_attention" in operators and "tests-training-test_captured" in others
    checked = gpu.pieces("memcheck")
    assert len(checked) == len(operators) and "memcheck-ops-test_attention" in checked
    for name in (*operators, *others, *checked):
        assert (gpu.ROOT / gpu.stage(name, Path()).command[-1]).is_file()
    assert gpu.stage(checked[0], Path()).command[:3] == ("compute-sanitizer", "--tool", "memcheck")
    assert gpu.pieces("sampling-step") == ["sampling-step"]
    for name, training in (("sampling-step", False), ("training-step", True)):
        command = gpu.stage(name, Path("out")).command
        assert command[-2:] == ("--out", f"out/{name}.json") and ("--training" in command) == training
    assert "cuda" in gpu.stage(operators[0], Path()).command


def test_a_file_without_tests_for_the_device_passes(tmp_path: Path) -> None:
    path = tmp_path / "test_nothing.py"
    path.write_text("")
    ended = drive(tmp_path, nothing=gpu.Stage((*gpu.PYTEST, "-n", "0", "-p", "no:cacheprovider", str(path))))
    assert ended["nothing"]["passed"] is True and ended["nothing"]["reason"] is None


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    ended = drive(tmp_path, check=gpu.Stage(("no-such-program",), needs="no-such-program"))
    assert ended["check"]["reason"] == "no-such-program is not on PATH"


@pytest.mark.slow
def test_a_stopped_suite_goes_on_with_what_it_has_not_measured(tmp_path: Path) -> None:
    everything = set(collected(gpu.suite("kernels", tmp_path)))
    measured = sorted(everything)[:3]
    assert len(everything) > len(measured) == 3
    (tmp_path / "kernels-1.json").write_text(json.dumps({"benchmarks": [{"fullname": name} for name in measured]}))
    rest = gpu.suite("kernels", tmp_path)
    assert str(tmp_path / "kernels-2.json") in rest.command
    assert set(collected(rest)) == everything - set(measured)


def collected(stage: gpu.Stage) -> list[str]:
    command = [*stage.command, "--collect-only"]
    # A process of pytest-xdist, which this may be, disables benchmarks in its children.
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=True, env=alone)
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_the_sanitizers_see_every_kernel() -> None:
    """As the tests are collected where torch sees a GPU."""
    command = gpu.sanitizer("memcheck").command
    options = command[command.index("pytest") + 1 :]
    done = subprocess.run([sys.executable, "-c", PROGRAM, "--collect-only", *options], cwd=gpu.ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    tests = {line for line in done.stdout.splitlines() if "::" in line}
    seen = {(Path(test.partition("::")[0]).stem, kind) for test in tests for kind in ("triton", "cuda") if kind in test}
    assert seen >= {
        *((f"test_{name}", kind) for name in ("group_norm_silu", "q_sample", "reverse_step", "random_normal")
          for kind in ("triton", "cuda")),
        ("test_attention", "triton"), ("test_conv3x3_fp8", "triton"),
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would start")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "torch sees none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([str(tmp_path), "speed"])
    assert ended.value.code == 2
    assert "no stage is called 'speed'; there are doctor, operators, tests, memcheck" in capsys.readouterr().err
