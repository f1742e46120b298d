"""index.html of a run: its numbers, its pictures, what it says of missing files, and that data cannot become markup."""

import ast
import base64
import importlib
import io
import json
import os
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.run_directory import BINS, PRESET, SCORES, record, session, write_run
from PIL import Image

from fastddpm import page as command
from fastddpm.errors import StorageError, UsageError
from fastddpm.runtime import cli
from fastddpm.sampling.images import save_animation, save_png
from fastddpm.storage import checkpoint
from fastddpm.training import run_log
from fastddpm.training.page import render, summary, try_write_page, write_page
from fastddpm.unet import UNet

ALLOWED = {
    "html", "head", "meta", "title", "link", "style", "body", "main", "header", "section", "footer", "h1", "h2", "h3",
    "p", "span", "small", "code", "sub", "a", "i", "dl", "dt", "dd", "div", "ul", "ol", "li", "progress", "details",
    "summary", "figure", "figcaption", "picture", "source", "img", "svg", "g", "path", "text", "table", "thead",
    "tbody", "tr", "th", "td",
}  # fmt: skip
WITHOUT_END = {"meta", "link", "img", "source"}


class Parsed(HTMLParser):
    """A page as its elements (tag, attributes) and the text that a reader sees; all elements must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.words.append(" " if tag in ("dd", "h1") else "")
        if tag not in WITHOUT_END:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(run: Path, **options: Any) -> Parsed:
    return Parsed(write_page(run, **options).read_text(encoding="utf-8"))


def decoded(uri: str) -> Image.Image:
    head, _, data = uri.partition(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == f"data:image/{str(picture.format).lower()}"
    return picture


# What it says


def test_a_finished_run(tmp_path: Path) -> None:
    """Numbers that follow from the log by hand: 1000 steps of 8 images at 40 a second are 200 s."""
    text = page_of(write_run(tmp_path / "run"), training=False).text
    parameters = sum(parameter.numel() for parameter in UNet(PRESET.unet).parameters())
    loss = float(np.median([10 / step for step in range(810, 1001, 10)]))
    for said in (
        f"A denoising diffusion model (DDPM) of {parameters:,} parameters that draws 12×12 colour images, trained on "
        "1,234 images of photos for 1,000 steps of 8 images.",
        "finished", "step 1,000 of 1,000", f"loss {loss:.4f}", "time spent 3 min 20 s", "speed 40 images/s",
        "25% waiting for data", "memory 0.50 GiB", "Seeds 0 to 3, ancestral sampling in 50 steps",
        "T = 200, linear schedule; predicts the noise ε", "batch 8, learning rate 0.0002 after 10 steps of warm-up",
        "fid train 12.346 3.17 in the paper Fréchet distance between Gaussians fitted to the Inception features",
        "bpd test 3.5000 ± 0.0100 bits/dim ≤ 3.75 in the paper", "50,000 samples, ancestral, 50 steps; 1,234 images of",
        "after 1,000 steps", "2026-02-03", "unet.width: 128 -> 8", "python -m fastddpm.evaluate", "--data /data/photos",
        "--resume --out", "--steps 2000", "2026-01-02T03:04:05+00:00 at step 0", "a machine; fastddpm 0.2, torch 2.13",
    ):  # fmt: skip
        assert said in text, said
    assert "time left" not in text and "cannot be" not in text and "none yet" not in text


def test_a_run_in_progress_says_what_is_left(tmp_path: Path) -> None:
    """400 of 1000 steps at 40 images a second, 8 in a step: 600 * 8 / 40 = 120 s are left."""
    lines = [record(step) for step in range(10, 401, 10)]
    run = write_run(tmp_path / "run", records=lines, finished=False)
    parsed = page_of(run, training=True)
    for said in ("training", "step 400 of 1,000", "time left 2 min 00 s", "They are drawn at the end", "reload it"):
        assert said in parsed.text, said
    assert parsed.all("progress") == [{"value": "400", "max": "1000", "aria-label": "steps of training"}]
    stopped = page_of(run, training=False).text
    assert "it stopped at step 400" in stopped and f"fastddpm.train --resume --out {run}" in stopped
    assert "time left" not in stopped


def test_whether_a_run_trains_is_seen_from_its_lock(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records=[record(10)], finished=False)
    assert summary.summarize(run).state == "stopped"
    with checkpoint.lock(run):
        assert summary.summarize(run).state == "training"
        write_run(run, finished=False)
        assert summary.summarize(run).state == "drawing samples"
    assert summary.summarize(run).state == "finished"


def test_a_change_by_override_is_marked_and_told(tmp_path: Path) -> None:
    sessions = [session(), session(500, changed=["lr: 0.0002 -> 0.0001", "batch: 8 -> 16"])]
    html = write_page(write_run(tmp_path / "run", sessions=sessions)).read_text()
    parsed = Parsed(html)
    assert "step 500 lr: 0.0002 -> 0.0001 batch: 8 -> 16" in parsed.text
    marks = re.findall(r'<g class="mark"><title>(.*?)</title><path d="M([\d.]+) ', html, re.DOTALL)
    assert [text for text, _ in marks] == ["lr: 0.0002 -&gt; 0.0001\nbatch: 8 -&gt; 16"] * 3  # not in the chart over t
    middle = (46 + 410) / 2  # of a panel whose axis begins at 0 and ends at 1000
    assert [float(x) for _, x in marks] == [pytest.approx(middle, abs=0.1)] * 3


def test_the_command_lines_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the shell and by the commands, also of a run whose name has quotes and spaces."""
    parse, understood = cli.parse, []

    def only_parse(*given: Any, **options: Any) -> None:
        understood.append(parse(*given, **options))
        raise KeyboardInterrupt

    run = write_run(tmp_path / """it's "a run" $HOME""")
    parsed = Parsed(write_page(run, training=False).read_text())
    lines = [line for line in re.findall(r"python -[mc] .*", "".join(parsed.words)) if str(tmp_path) in line]
    monkeypatch.setattr(cli, "parse", only_parse)
    programs = []
    for python, kind, name, *arguments in map(shlex.split, lines):
        assert python == "python"
        if kind == "-c":
            programs.append(ast.literal_eval(re.findall(r"load\((.*)\)\.save", name)[0]))
            continue
        assert str(run) in arguments
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(name).main([word for word in arguments if word != "--resume"])
    assert programs == [str(run)] and len(understood) == 5


def test_steps_that_were_skipped_and_too_few_steps_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records=[record(10)], finished=False)
    (run / "not_finite.jsonl").write_text('{"step": 3}\n{"step": 4}\n')
    text = page_of(run, training=False).text
    assert "2 steps were skipped" in text and "10 steps are too few to give images" in text


def test_scores_of_an_earlier_step_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "evaluation" / "metrics.json").write_text(
        json.dumps(SCORES | {"checkpoint": SCORES["checkpoint"] | {"step": 600}})
    )
    assert "after 600 steps; the run has gone on since" in page_of(run).text


# Its pictures


def test_pictures_are_in_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    parsed = page_of(run)
    grid, animation, *previews = (image["src"] for image in parsed.all("img"))
    files = [run / "samples.png", run / "denoising.gif", *sorted((run / "previews").iterdir())]
    for uri, path in zip((grid, animation, *previews), files, strict=True):
        assert base64.b64decode(uri.partition(",")[2]) == path.read_bytes()
        assert decoded(uri).size == Image.open(path).size
    assert np.abs(np.asarray(decoded(parsed.all("source")[0]["srcset"]), float) - (200, 0, 0)).max() < 6  # last frame


def test_many_previews_are_thinned_evenly(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", previews=range(100, 3101, 100))
    parsed = page_of(run)
    shown = [int(image["alt"].split()[-1]) for image in parsed.all("img") if image["alt"].startswith("Preview")]
    assert len(shown) == 12 and shown[0] == 100 and shown[-1] == 3100
    assert set(np.diff(shown)) <= {200, 300} and "12 of 31 are shown" in parsed.text


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    """To a half and a fifth, which the mean colours of its ends survive; noise as PNG has 1 MB."""
    run = write_run(tmp_path / "run", previews=[100])
    noise = np.random.default_rng(0).integers(0, 128, (200, 1700, 3), dtype=np.uint8)
    noise[:, :850] += 100
    for path in (run / "samples.png", run / "previews" / "step-00000100.png"):
        save_png(Image.fromarray(noise), path)
    grid, _, preview = (image["src"] for image in page_of(run).all("img"))
    for uri, size, most in ((grid, (850, 100), 100_000), (preview, (340, 40), 10_000)):
        picture = decoded(uri)
        assert picture.size == size and len(uri) < most
        values = np.asarray(picture.convert("RGB"), float)
        half = size[0] // 2
        assert abs(values[:, :half].mean() - 163.5) < 3 and abs(values[:, half:].mean() - 63.5) < 3


def test_an_animation_too_large_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    frames = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (1100, 1100), dtype=np.uint8)) for k in (0, 1)]
    save_animation(frames, run / "denoising.gif")
    parsed = page_of(run)
    assert "The animation cannot be shown: " in parsed.text and "at most 2,000,000" in parsed.text
    assert all("gif" not in image["src"][:20] for image in parsed.all("img"))


# What is missing or damaged


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "What this run trains is unknown"),
        ("log.jsonl", "There is no line in the log yet: one is written every 10 steps"),
        ("environment.json", "DDPM"),
        ("samples.png", "From noise to images"),
        ("denoising.gif", "Seeds 0 to 3"),
        ("previews", "There are none yet: one is drawn every 100 steps"),
        ("evaluation", "None has been measured"),
    ],
)
def test_a_missing_file(name: str, said: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    os.rename(run / name, tmp_path / "away")
    assert said in page_of(run).text


@pytest.mark.parametrize("damage", [b"", b"\xff\x00{", b"[]", b'{"sessions": [5, {"step": {}, "data": []}]}', b"null"])
def test_damaged_files_do_not_stop_it(damage: bytes, tmp_path: Path) -> None:
    """All at once; what each reader says is on the page, and nothing is silently taken for good."""
    run = write_run(tmp_path / "run", previews=[100, 200])
    for path in (*run.glob("*.json*"), *run.rglob("*.png"), *run.glob("*.gif"), run / "evaluation" / "metrics.json"):
        path.write_bytes(damage)
    text = page_of(run).text
    for said in ("The configuration cannot be read", "The scores cannot be read", "no line in the log"):
        assert said in text, said
    for name in ("samples.png", "The animation", "step-00000100.png"):
        assert f"{name} cannot be shown" in text, name


def replace_by_directory(path: Path) -> None:
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    os.mkfifo(path)


def replace_by_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("replace", [replace_by_directory, replace_by_pipe, replace_by_broken_link])
def test_what_is_no_file_does_not_stop_it(replace: Callable[[Path], None], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", previews=[100])
    for path in (*run.glob("*.*"), run / "previews" / "step-00000100.png", run / "evaluation" / "metrics.json"):
        path.unlink()
        replace(path)
    assert "What this run trains is unknown" in page_of(run).text


def test_numbers_that_are_none_or_infinite_do_not_stop_it(tmp_path: Path) -> None:
    names = ("loss", "gradient_norm", "lr", "images_per_s", "data_wait", "memory_mib")
    lines = [record(10, **dict.fromkeys(names)), record(20, **dict.fromkeys(names, float("inf")))]
    lines += [record(30, **dict.fromkeys(names, 1e-320), loss_by_t=[None] * BINS), {"step": 40}, record(50, loss=-1.0)]
    lines += [record(60, loss_by_t=[1.0]), record(70, loss_by_t=[])]
    assert "step 70 of 1,000" in page_of(write_run(tmp_path / "run", records=lines), training=True).text


# Strings from outside

HOSTILE = (
    """</style></title><script>alert(1)</script><img src="http://x/y.png" onerror='alert(2)'>{{ 7 * 7 }}"""
    "\x00\ud800\x1b[2J"
)


def test_strings_of_the_data_are_text(tmp_path: Path) -> None:
    """In every place that a page takes a string from: names, classes, commands, changes, scores, paths."""
    data = {"name": HOSTILE, "checksum": HOSTILE, "source": HOSTILE, "classes": [HOSTILE] * 3, "images": 3}
    hostile = session(5, data=data, changed=[HOSTILE], command=[HOSTILE], device=HOSTILE, started=HOSTILE)
    run = write_run(tmp_path / "a<b>&\"'", sessions=[hostile | {"libraries": {HOSTILE: HOSTILE}}])
    found = json.loads(json.dumps(SCORES))
    found["train"][HOSTILE] = found["train"]["fid"] | {"data": {"name": HOSTILE}, "date": HOSTILE}
    (run / "evaluation" / "metrics.json").write_text(json.dumps(found))
    parsed = page_of(run)
    check_self_contained(parsed)
    shown = HOSTILE.partition("\x00")[0]
    assert parsed.text.count("<script>alert(1)</script>") >= 10 and "{{ 7 * 7 }}" in parsed.text
    assert shown[:60] in parsed.text and "a<b>&\"'" in parsed.text
    written = (run / "index.html").read_text(encoding="utf-8")
    assert not [c for c in written if c != "\n" and not c.isprintable()] and r"\x1b[2J" in written


def check_self_contained(parsed: Parsed) -> None:
    """Only elements of the template, no script, no handler, and no address but data and places in the page."""
    assert {tag for tag, _ in parsed.elements} <= ALLOWED
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes[name][:100])
    (policy,) = [meta for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    path = write_page(write_run(tmp_path / "run"))
    check_self_contained(Parsed(path.read_text()))
    assert not re.search(r"https?://|@import|url\(", path.read_text())


# Its size, and the time that it takes


def test_a_long_log_is_read_by_some_of_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 9,000 lines about 3,000, the last one among them; the curve still spans all."""
    lines = [{"step": step, "loss": 10 / step} for step in range(1, 9001)]
    run = write_run(tmp_path / "run", records=lines)
    parsed: list[bytes] = []
    parse = run_log.parse_json
    monkeypatch.setattr(run_log, "parse_json", lambda line, where: (parsed.append(line), parse(line, where))[1])
    html = write_page(run).read_text()
    assert 2900 < len(parsed) <= 3002 and json.loads(parsed[-1])["step"] == 9000
    assert f"{len(parsed):,} of the 9,000 lines" in Parsed(html).text and "step 9,000" in Parsed(html).text
    paths = re.findall(r'<path class="curve".*? d="M([\d.]+) .*?L([\d.]+) [\d.]+"/>', html)
    assert all(float(first) < 47 and float(last) == 410 for first, last in paths) and len(paths) == 2
    assert len(html) < 150_000


# Writing it


def test_a_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = write_run(tmp_path / "run"), []
    (run / "index.html").mkdir()
    assert try_write_page(run, report=said.append) == []
    assert len(said) == 1 and re.match(r".*index\.html is not written: cannot write .*: Is a directory", said[0])
    with pytest.raises(StorageError):
        write_page(run)
    monkeypatch.setattr(render, "_charts", lambda summary: 1 / 0)
    assert try_write_page(run, report=said.append) == [] and "division by zero" in said[1]
    assert sorted(path.name for path in run.glob(".*")) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", finished=False)
    command.main([str(one), str(two)])
    assert capsys.readouterr().out == f"{one / 'index.html'}\n{two / 'index.html'}\n"
    assert all((run / "index.html").read_text().endswith("</html>\n") for run in (one, two))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no run given"),
        (["nowhere"], "there is no directory nowhere"),
        (["other"], "other is not a run directory: it has no config.json"),
    ],
)
def test_what_is_no_run_is_refused(
    names: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=message):
        command.main(names)
    assert [path.name for path in tmp_path.rglob("*")] == ["other"]
