"""What the doctor says: errors that are measured, faults that it finds, a report that a program can read."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.networks import SMALL

from fastddpm import doctor
from fastddpm.config import Preset
from fastddpm.kernels import native
from fastddpm.ops import backend, selftest, use_backend
from fastddpm.sampling import precision_trial

FLOAT32 = (torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def quick(bf16_instructions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_SECONDS", 1e-3)
    monkeypatch.setattr(selftest, "_ROUNDS", 1)
    monkeypatch.setattr(precision_trial, "_ROUNDS", 1)
    monkeypatch.setattr(precision_trial, "preset", lambda name: Preset("small", SMALL))


def trial(name: str) -> selftest.Trial:
    return next(found for found in selftest.trials(*FLOAT32, batch=1) if found.operation == name)


def test_every_operation_of_a_cpu_is_tried_and_passes() -> None:
    findings = selftest.run(*FLOAT32, batch=1)
    assert [found.operation for found in findings] == [
        "group_norm_silu", "group_norm_silu, gradients", "attention", "attention, gradients", "conv3x3",
        "q_sample", "reverse_step", "random_normal",
    ]  # fmt: skip
    for found in findings:
        assert found.passed and 0 < found.error < found.tolerance and found.speed > 0, found


def test_what_counts_as_exact_is_the_tests_own_float64(rng: np.random.Generator) -> None:
    normals = oracle.normals((3, 32, 32), np.arange(1), selftest.SEED, step=selftest.STEP, stream=2)
    np.testing.assert_allclose(trial("random_normal").exact().numpy(), normals, rtol=1e-12, atol=1e-12)
    q, k, v = (rng.standard_normal((2, 5, 8)) for _ in range(3))
    ours = selftest.plain_attention(*map(torch.from_numpy, (q, k, v)))
    np.testing.assert_allclose(ours.numpy(), oracle.attention(q, k, v), rtol=1e-12)


def test_the_noised_image_is_equation_4(rng: np.random.Generator) -> None:
    x0 = rng.integers(0, 256, (2, 3, 4, 4), dtype=np.uint8)
    eps, table, t = rng.standard_normal((2, 3, 4, 4)), rng.random((10, 2)), np.array([3, 7])
    x_t, _ = selftest.plain_q_sample(*map(torch.from_numpy, (x0, t, table, eps)))
    expected = oracle.column(table[t, 0]) * (x0 / 127.5 - 1) + oracle.column(table[t, 1]) * eps
    np.testing.assert_allclose(x_t.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_an_operation_that_is_off_is_named_and_the_exit_code_is_1(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = selftest.ops.attention
    monkeypatch.setattr(selftest.ops, "attention", lambda q, k, v: right(q, k, v) * wrong)
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--batch", "1"])
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert [line.split("  ")[1] for line in out.splitlines() if "FAILED" in line] == [
        "attention",
        "attention, gradients",
    ]
    assert "error against float64 above the tolerance: attention, attention, gradients" in err


def test_the_report_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    with use_backend("reference"):
        doctor.main(["--batch", "1"])
    out = capsys.readouterr().out
    assert f"torch             {torch.__version__}" in out
    assert re.search(r"attention +\d\.\de-\d\d +2e-05 +\d+\.\d\d times as fast\n", out)
    assert re.search(r"\n  attention        reference", out)
    assert re.search(r"\nthe CIFAR-10 network by precision, 1 image\n  fp32 +\d+\.\d ms\n", out)
    assert re.search(r"\n  bf16 +\d+\.\d ms   \d+\.\d\d times as fast as fp32, from which it differs by ", out)
    assert re.search(r"\n  (fp32|bf16) is the faster one here; the default on a CPU is fp32\n", out)


def test_a_reason_is_told_once_with_its_operations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "obstacles", lambda operation, _: ["other"] if operation == "conv3x3_fp8" else ["one"])
    doctor.main(["--batch", "1"])
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("    one")
    assert lines[place - 1] == (
        "  group_norm_silu, inference_norm, attention, add_attention, add_product, add_bias, channel_sums, "
        "convert_image, conv3x3, conv3x3_in, linear_bf16, q_sample, reverse_step, random_normal:"
    )
    assert lines[place + 1 :] == ["  conv3x3_fp8:", "    other"]


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (1e4, True)])
def test_a_busy_machine_is_mentioned(
    load: float, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, 0.0, 0.0))
    doctor.main(["--batch", "1"])
    assert ("other programs keep this machine busy" in capsys.readouterr().out) == said


def test_the_report_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--batch", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__ and report["precision"] == "float32" and report["batch"] == 1
    assert [timed["precision"] for timed in report["precisions"]] == ["fp32", "bf16"]
    assert report["bf16 instructions"] == doctor.bf16_instructions()
    assert set(report["backends"]) >= {"attention", "conv3x3_fp8"}
    assert all(entry["error"] <= entry["tolerance"] for entry in report["trials"])
    assert report["optional"]["torch-fidelity"] == doctor.version("torch-fidelity")


def test_bfloat16_has_a_tolerance_of_its_own() -> None:
    findings = {found.operation: found for found in selftest.run(torch.device("cpu"), torch.bfloat16, batch=1)}
    assert 1e-4 < findings["attention"].error < findings["attention"].tolerance == 1e-2
    assert findings["random_normal"].tolerance == 2e-5


def test_precisions_differ_by_rounding() -> None:
    fp32, bf16 = precision_trial.run(2)
    assert (fp32.precision, fp32.difference, bf16.precision) == ("fp32", 0, "bf16")
    assert 1e-4 < bf16.difference < 5e-2 and min(fp32.milliseconds, bf16.milliseconds) > 0


def test_the_precision_in_less_time_is_named() -> None:
    found = [precision_trial.Timed("fp32", 40.0, 0.0), precision_trial.Timed("bf16", 25.0, 0.013)]
    assert doctor._precision_lines(found, 8) == [
        "",
        "the CIFAR-10 network by precision, 8 images",
        "  fp32                 40.0 ms",
        "  bf16                 25.0 ms   1.60 times as fast as fp32, from which it differs by 1.3e-02",
        "  bf16 is the faster one here; the default on a CPU is fp32",
    ]


def test_a_processor_without_bf16_instructions_is_timed_in_fp32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_bf16", lambda: False)
    found = precision_trial.run(1)
    assert [timed.precision for timed in found] == ["fp32"]
    said = "  bf16 is computed in fp32 here, as the processor has no instructions for it"
    assert doctor._precision_lines(found, 1)[-1] == said


def test_a_slow_machine_takes_its_turns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr(precision_trial, "_ROUNDS", 5)
    monkeypatch.setattr(precision_trial, "_SECONDS", 0.0)
    monkeypatch.setattr(precision_trial, "_seconds", lambda *arguments: calls.append(1.0) or 1.0)
    assert [timed.milliseconds for timed in precision_trial.run(1)] == [1e3, 1e3]
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n", "avx512_bf16, amx_bf16"),
        ("Features\t: fp asimd bf16 i8mm\n", "bf16"),
        ("flags\t\t: fpu avx2\n", "none"),
        (None, "unknown"),
    ],
)
def test_the_processors_instructions(
    text: str | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        doctor.CPUINFO.write_text(text)
    assert doctor.bf16_instructions() == said
