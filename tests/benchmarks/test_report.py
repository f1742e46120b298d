"""Tables, plots and the regression check of stored benchmarks."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report

ROOT = Path(__file__).parents[2]
MACHINE = {
    "processor": "a processor", "threads": 2, "torch": "2.13.0", "date": "2026-01-02", "limit_tflop_per_s": 0.2,
    "limit_gb_per_s": 20.0,
}  # fmt: skip


def benchmark(name: str, group: str, median: float, **info: Any) -> dict[str, Any]:
    return {"fullname": name, "group": group, "stats": {"median": median}, "extra_info": MACHINE | info}


def forward(peer: str, batch: int, median: float, share: float = 0.5) -> dict[str, Any]:
    return benchmark(
        f"benchmarks/bench_unet.py::test_forward[{peer}-{batch}]", f"forward cifar10 batch {batch}", median, peer=peer,
        batch=batch, preset="cifar10", images_per_s=batch / median, gflop=12.0 * batch, share_of_limit=share,
    )  # fmt: skip


def scaling(kind: str, value: int, median: float) -> dict[str, Any]:
    return benchmark(
        f"b::{kind}[{value}]", f"scaling of mnist with the {kind}", median, peer="fastddpm", scaling=kind, value=value,
        gflop=float(value), preset="mnist",
    )  # fmt: skip


def split(batch: int) -> dict[str, Any]:
    times = {"convolution": 30.0 * batch, "attention": 9.0 * batch, "norm": batch}
    return benchmark(f"b::split[{batch}]", f"split {batch}", 0.04, peer="fastddpm", batch=batch, preset="cifar10",
                     split_ms=times)  # fmt: skip


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "stored.json"
    found = [forward("diffusers", 1, 0.09), forward("fastddpm", 1, 0.05), forward("fastddpm", 8, 0.3),
             forward("diffusers", 8, 0.9)]  # fmt: skip
    found += [scaling(kind, value, 0.01 * value) for kind in ("batch", "steps") for value in (1, 2, 4)]
    found += [split(1), split(8)]
    path.write_text(json.dumps({"benchmarks": found}))
    return path


def test_a_table_names_rates_ratios_and_the_machine(stored: Path) -> None:
    text = report.markdown(report.read(stored))
    assert "### forward cifar10 batch 1\n" in text
    ours, theirs = (line for line in text.splitlines()[4:6])
    assert ours == "| fastddpm | 50 ms | 20 | 50% | 1.00 |"
    assert theirs == "| diffusers | 90 ms | 11.11 | 50% | 1.80 |"
    assert text.splitlines()[-1] == (
        "a processor, 2 threads, torch 2.13.0, 2026-01-02; limits 0.2 TFLOP/s, 20 GB/s (stored.json)"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (45.6e-6, "45.6 µs"), (5e-9, "0.005 µs")]
)
def test_duration(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_compare_finds_what_became_slower() -> None:
    def timed(name: str, median: float, **info: Any) -> report.Timed:
        return report.Timed(name, "", median, info, "f")

    old = [timed("a", 1.0, share_of_limit=0.5), timed("b", 1.0, share_of_limit=0.5), timed("gone", 1.0)]
    new = [timed("a", 1.1), timed("b", 1.3, share_of_limit=0.49), timed("new", 9.0)]
    assert report.compare(old, new, 1.15, relative=False) == ["b: 1.30 times (1 s -> 1.3 s)"]
    assert report.compare(old, new, 1.05, relative=False)[0].startswith("a: 1.10")
    assert report.compare(old, new, 1.15, relative=True) == []
    assert report.compare(old, new, 1.01, relative=True) == ["b: 1.02 times (1 s -> 1.3 s)"]


@pytest.mark.parametrize(("slower", "code"), [(1.0, 0), (2.0, 1)])
def test_the_command_as_a_regression_check(stored: Path, tmp_path: Path, slower: float, code: int) -> None:
    new = tmp_path / "new.json"
    document = json.loads(stored.read_text())
    document["benchmarks"][1]["stats"]["median"] *= slower
    new.write_text(json.dumps(document))
    command = [sys.executable, "-m", "benchmarks.report", "--compare", str(stored), str(new)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == f"{code} slower than 1.15 times"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plots(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lines hold the stored numbers; the limit is drawn where a matrix product's rate would be."""
    from matplotlib import pyplot as plt

    drawn: dict[str, Any] = {}
    save = report._save

    def note(figure: Any, path: Path, timed: report.Timed) -> Path:
        drawn[path.name] = [(axes.get_lines(), axes.patches) for axes in figure.axes]
        return save(figure, path, timed)

    monkeypatch.setattr(report, "_save", note)
    paths = report.plots(report.read(stored), tmp_path / "plots")
    assert [path.name for path in paths] == ["throughput-forward-cifar10.png", "split.png", "scaling.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    lines = {line.get_label(): line for line in drawn["throughput-forward-cifar10.png"][0][0]}
    assert [list(axis) for axis in lines["fastddpm"].get_data()] == [[1, 8], [20, pytest.approx(8 / 0.3)]]
    assert lines["limit: these FLOPs\nat a product's rate"].get_ydata()[0] == pytest.approx(0.2e12 / 12e9)
    bars = drawn["split.png"][0][1]
    assert [bar.get_width() for bar in bars] == pytest.approx([0.75, 0.225, 0.025] * 2)
    assert [panel[0][0].get_ydata()[2] for panel in drawn["scaling.png"]] == [40, 40]  # ms
    assert not plt.get_fignums()


def test_one_batch_size_is_no_curve(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"benchmarks": [forward("fastddpm", 1, 0.05)]}))
    assert report.main([str(path), "--plots", str(tmp_path / "plots")]) in (0, 2)
    assert not list((tmp_path / "plots").glob("*.png"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "is no file of pytest-benchmark"), ('{"benchmarks": [{}]}', "KeyError")],
)
def test_a_file_that_is_none_is_named(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error


def test_what_is_stored_reports_the_same_without_the_rounds(stored: Path, tmp_path: Path) -> None:
    document = json.loads(stored.read_text())
    for found in document["benchmarks"]:
        found["stats"]["data"] = [found["stats"]["median"]] * 1000
    raw, kept = tmp_path / "raw.json", tmp_path / "kept.json"
    raw.write_text(json.dumps(document))
    assert report.main([str(raw), "--store", str(kept)]) == 0
    assert "data" not in kept.read_text() and kept.stat().st_size < raw.stat().st_size / 10
    assert [timed.median for timed in report.read(kept)] == [timed.median for timed in report.read(raw)]


def test_files_or_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main([])
    assert "name files to report, or --compare OLD NEW" in capsys.readouterr().err
