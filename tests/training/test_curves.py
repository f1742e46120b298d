"""Curves of runs in one picture."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm import curves
from fastddpm.config import DiffusionConfig, Preset
from fastddpm.errors import UsageError
from fastddpm.presets import write_preset
from fastddpm.training import plots


def a_run(path: Path, lines: int = 8, seed: int = 0, by_t: bool = True) -> Path:
    write_preset(Preset("x", diffusion=DiffusionConfig(timesteps=100)), path / "config.json")
    generator = np.random.default_rng(seed)
    with (path / "log.jsonl").open("w") as file:
        for i in range(lines):
            table = generator.uniform(0.01, 1, 4).tolist()
            record = {"step": 50 * (i + 1), "loss": 1 / (i + 1), "gradient_norm": None if i == 2 else 0.5}
            table[1] = None if i % 2 else table[1]
            file.write(json.dumps(record | ({"loss_by_t": table} if by_t else {})) + "\n")
    return path


def test_means_by_t_leave_out_empty_bins() -> None:
    table = [[1.0, None, 3.0], [5.0, None, None], [9.0, None, 4.0]]
    t, means = plots.mean_by_t([{"loss_by_t": [7.0]}, *({"loss_by_t": row} for row in table)], 30)
    np.testing.assert_allclose(t, [5, 15, 25])
    np.testing.assert_allclose(means, [5, np.nan, 3.5])


def test_the_lines_drawn_are_those_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    run = a_run(tmp_path / "a")
    curves.main([str(run), str(a_run(tmp_path / "b", seed=1)), "--out", str(tmp_path / "x.png")])
    loss, norm, by_t = drawn[0].axes
    assert [len(axes.lines) for axes in (loss, norm, by_t)] == [2, 2, 2]
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [(50 * i, 1 / i) for i in range(1, 9)])
    assert norm.lines[0].get_xdata().tolist() == [50, 100, 200, 250, 300, 350, 400]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a", "b"]
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    expected = np.mean([records[6]["loss_by_t"][0], records[7]["loss_by_t"][0]])
    assert by_t.lines[0].get_ydata()[0] == pytest.approx(expected)


def test_a_line_marks_where_options_were_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    changed = {"step": 200, "changed": ["lr: 0.002 -> 0.001", "batch: 16 -> 32"]}
    run, other = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    (run / "environment.json").write_text(json.dumps({"sessions": [{"step": 0, "changed": []}, {"step": 9}, changed]}))
    curves.main([str(other), str(run), "--out", str(tmp_path / "x.png")])
    for axes in drawn[0].axes[:2]:
        _, line, mark = axes.lines
        assert list(mark.get_xdata()) == [200, 200] and mark.get_color() == line.get_color()
        assert [text.get_text() for text in axes.texts] == ["lr: 0.002 -> 0.001\nbatch: 16 -> 32"]
    assert len(drawn[0].axes[2].lines) == 2 and not drawn[0].axes[2].texts


def test_quarters_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    records = [{"step": i, "loss_by_t": [float(i), 2.0 * i]} for i in range(1, 9)]
    assert plots.loss_by_t(records, 10, tmp_path / "x.png", "title")
    (axes,) = drawn[0].axes
    np.testing.assert_allclose([line.get_ydata()[1] for line in axes.lines], [3, 7, 11, 15])
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [2.5, 7.5])
    assert not plots.loss_by_t([{"step": 1}], 10, tmp_path / "x.png", "title")


@pytest.mark.slow
def test_the_command_writes_a_picture_beside_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run", lines=3)
    old = a_run(tmp_path / "old", by_t=False)
    empty = a_run(tmp_path / "empty", lines=0)
    curves.main([str(run), str(old), str(empty)])
    out, err = capsys.readouterr()
    assert out.strip() == str(run / "curves.png") and "empty has no line in its log yet" in err
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 1000 and len(np.unique(np.asarray(picture))) > 10


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path / "run")
    for runs, message in (
        ([tmp_path], "it has no log.jsonl"),
        ([run, run], "named twice"),
        ([a_run(tmp_path / "empty", lines=0)], "nothing to draw"),
    ):
        with pytest.raises(UsageError, match=message):
            curves.main([str(path) for path in runs])
    monkeypatch.delitem(sys.modules, "fastddpm.training.plots")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(UsageError, match=r"curves need matplotlib: pip install 'fastddpm\[report\]'"):
        curves.main([str(run)])


@pytest.mark.slow
def test_no_text_is_read_as_a_formula(tmp_path: Path) -> None:
    """matplotlib raises for a formula that it cannot parse, in the name of a run or among its changes."""
    runs = [a_run(tmp_path / name) for name in ("$\\no$", "b")]
    session = {"step": 100, "changed": ["data: $\\x$\x00\ud800 -> $"]}
    (runs[0] / "environment.json").write_text(json.dumps({"sessions": [session]}))
    curves.main([*map(str, runs), "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").stat().st_size
    assert plots.loss_by_t([{"step": 1, "loss_by_t": [1.0]}], 10, tmp_path / "y.png", "$\\no$")
