"""The page in headless Chromium: pictures decoded, no message on the console, nothing wider than a phone, contrast."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.marks import slow
from helpers.run_directory import record, session, write_run

from fastddpm.training.page import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (360, 800, 1600)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; there is none")

# Shows the page in frames of several widths and measures it from outside: the page itself runs no script.
PROBE = """<!DOCTYPE html><body><pre id="found"></pre><script>
const found = {};
const luminance = colour => {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255);
  const [r, g, b] = parts.map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = element => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
};
const contrast = element => {
  const style = getComputedStyle(element);
  const [a, b] = [luminance(element.closest("svg") ? style.fill : style.color), luminance(ground(element))].sort();
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const measure = async (frame, width) => {
  const page = frame.contentDocument;
  const images = [...page.images];
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  const texts = [...page.querySelectorAll("p, dt, dd, li, small, code, figcaption, h1, h2, h3, a, summary, text")];
  const shown = texts.filter(text => text.getBoundingClientRect().height > 0 && text.textContent.trim());
  found[width] = {
    scroll: page.documentElement.scrollWidth,
    images: images.map(image => [image.complete, image.naturalWidth, image.getBoundingClientRect().width]),
    rendering: [...page.querySelectorAll("img.pixels")].map(image => getComputedStyle(image).imageRendering),
    ticks: Math.min(...[...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)),
    columns: getComputedStyle(page.querySelector(".charts")).gridTemplateColumns.split(" ").length,
    ground: luminance(getComputedStyle(page.body).backgroundColor),
    contrast: Math.min(...shown.map(contrast)),
    text: page.body.innerText,
  };
  if (Object.keys(found).length === WIDTHS) document.getElementById("found").textContent = JSON.stringify(found);
};
</script>FRAMES</body>"""


def shown(page: Path, scheme: str, tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    """What the probe measures of a page at each width, and the messages on the console."""
    frames = "".join(
        f"""<iframe src="{html.escape(page.as_uri())}" style="width:{width}px;height:3000px;border:0"
        onload="measure(this, {width})"></iframe>"""
        for width in WIDTHS
    )
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("WIDTHS", str(len(WIDTHS))).replace("FRAMES", frames))
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--allow-file-access-from-files", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
            "--virtual-time-budget=20000",
            f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(text)), [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


HOSTILE = "<script>console.error('run')</script><img src=x onerror=console.error('run')>"


@pytest.mark.parametrize("scheme", ["light", slow("dark")])
def test_a_page_is_right_at_every_width(scheme: str, tmp_path: Path) -> None:
    data = session()["data"] | {"name": HOSTILE}
    sessions = [session(data=data), session(500, data=data, changed=["lr: 1 -> 2"])]
    run = write_run(tmp_path / "run", sessions=sessions, previews=range(100, 1001, 100))
    found, messages = shown(write_page(run, training=False), scheme, tmp_path)
    assert messages == []
    for width in WIDTHS:
        page = found[str(width)]
        assert page["scroll"] == width, "wider than its window"
        assert len(page["images"]) == 12 and all(complete and natural for complete, natural, _ in page["images"])
        assert max(drawn for _, _, drawn in page["images"]) <= width and set(page["rendering"]) == {"pixelated"}
        assert page["ticks"] >= 10 and page["columns"] == (1 if width == 360 else 2)
        assert page["contrast"] >= 4.5  # WCAG AA
        assert page["ground"] < 0.05 if scheme == "dark" else page["ground"] > 0.9
        for text in (HOSTILE, "1,000 steps of 8 images", "step 500", "3.17 in the paper", "Loss by timestep"):
            assert text in page["text"], text
    assert max(drawn for _, _, drawn in found["1600"]["images"]) > 550  # the closing grid is large


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["in progress", "empty"])
def test_other_pages_are_right_too(kind: str, tmp_path: Path) -> None:
    lines = [record(step) for step in range(10, 401, 10)] if kind == "in progress" else [record(10)]
    run = write_run(tmp_path / "run", records=lines, finished=False, previews=[100] if kind == "in progress" else [])
    if kind == "empty":
        (run / "config.json").unlink()
    found, messages = shown(write_page(run, training=kind == "in progress"), "light", tmp_path)
    assert messages == []
    for width in WIDTHS:
        assert found[str(width)]["scroll"] == width and found[str(width)]["contrast"] >= 4.5
    assert ("time left" in found["360"]["text"]) == (kind == "in progress")


@pytest.mark.slow
def test_the_probe_itself_sees_errors_and_wide_pages(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<body style='background:white'><div class=charts style='width:2000px'><p style='color:#ccc'>pale</p>"
        "<svg><text>t</text></svg><img src=nothing.png></div><script>console.error('seen')</script>"
    )
    found, messages = shown(page, "light", tmp_path)
    assert any("seen" in line for line in messages)
    assert found["360"]["scroll"] > 1900 and found["360"]["contrast"] < 2 and not found["360"]["images"][0][1]
