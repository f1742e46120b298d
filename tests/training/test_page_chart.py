"""Charts of the page, read back: a point is where the ticks around it say."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from fastddpm.training.page.chart import Curve, line_chart, short, smoothed

X = np.linspace(0, 1000, 41)


def chart(y: np.ndarray, **options: object) -> ElementTree.Element:
    svg = line_chart([Curve(X, y)], title="Loss", x_label="step", x_range=(0, 1000), **options)  # type: ignore[arg-type]
    return ElementTree.fromstring(str(svg))


def points(svg: ElementTree.Element) -> np.ndarray:
    """The pixels of the last curve, float64 (N, 2)."""
    data = [path.attrib["d"] for path in svg.findall("path") if path.get("class") == "curve"][-1]
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", data)])


def ticks(svg: ElementTree.Element, kind: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, pixels) of the ticks with texts of the class `kind`, whose texts come after their lines."""
    found = []
    for line, text in zip(svg, [*svg][1:], strict=False):
        if line.get("class") in ("rule", "tick") and text.get("class") == kind:
            value = str(text.text).replace(",", "").replace("k", "e3").replace("M", "e6")
            x, y = map(float, re.findall(r"M([\d.]+) ([\d.]+)", line.attrib["d"])[0])
            found.append((float(value), y if axis == "y" else x))
    return np.array([value for value, _ in found]), np.array([pixel for _, pixel in found])


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e5])
def test_points_are_where_the_ticks_say(log: bool, scale: float) -> None:
    y = scale * np.exp(-X / 300)
    svg = chart(y, log=log)
    values, pixels = ticks(svg, "end", "y")
    assert 3 <= len(values) <= 7
    slope, offset = np.polyfit(np.log(values) if log else values, pixels, 1)
    np.testing.assert_allclose(points(svg)[:, 1], slope * (np.log(y) if log else y) + offset, atol=0.3)
    values, pixels = ticks(svg, "middle", "x")
    assert values.tolist() == [0, 250, 500, 750, 1000]
    np.testing.assert_allclose(points(svg)[:, 0], np.interp(X, values, pixels), atol=0.11)
    assert slope < 0 and points(svg).min() > 0 and points(svg)[:, 1].max() <= 250


def test_a_gap_interrupts_the_curve_and_a_lonely_point_is_a_dot() -> None:
    y = np.ones(41)
    y[[10, 20, 21]] = np.nan, np.inf, 1e31
    data = chart(y).findall("path")[-1].attrib["d"]
    assert data.count("M") == 3 and len(points(chart(y))) == 38
    alone = np.full(41, np.nan)
    alone[7] = 3.0
    assert re.fullmatch(r"M[\d.]+ [\d.]+h\.01", chart(alone).findall("path")[-1].attrib["d"])
    assert line_chart([Curve(X, X * np.nan)], title="", x_label="", x_range=(0, 1)) is None


def test_thinning_keeps_every_extreme() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(20_000.0), rng.normal(size=20_000)
    y[[5_001, 12_345]] = 50, -50
    y[7_000:8_000] = np.nan
    svg = line_chart([Curve(x, y)], title="", x_label="", x_range=(0, 1))
    root = ElementTree.fromstring(str(svg))
    drawn = points(root)
    assert len(drawn) <= 800 and root.findall("path")[-1].attrib["d"].count("M") == 2
    values, pixels = ticks(root, "end", "y")
    slope, offset = np.polyfit(values, pixels, 1)
    np.testing.assert_allclose(sorted((drawn[:, 1] - offset) / slope)[:: len(drawn) - 1], [-50, 50], atol=0.2)
    assert drawn[0, 0] == 46 and drawn[-1, 0] == 410


def test_marks_and_level() -> None:
    svg = chart(np.linspace(1, 3, 41), marks=[(500, "a < b"), (750, "c")], level=(2.0, "limit"))
    titles = [title.text for title in svg.iter("title")]
    assert titles == ["a < b", "c"]
    (level,) = [group for group in svg.findall("g") if group.get("class") == "level"]
    assert "limit" in [text.text for text in level]
    values, pixels = ticks(svg, "end", "y")
    drawn = float(re.findall(r"M\d+ ([\d.]+)H", level[0].attrib["d"])[0])
    assert drawn == pytest.approx(np.interp(2.0, values, pixels), abs=0.2)
    far = chart(np.linspace(1, 3, 41), level=(100.0, "limit"))
    assert not [group for group in far.findall("g") if group.get("class") == "level"]


def test_a_screen_reader_is_told_what_it_shows() -> None:
    svg = chart(np.linspace(12_000, 0.0312, 41))
    assert (svg.get("role"), svg.get("aria-label")) == ("img", "Loss: 12k at first, 0.0312 at last")


def test_smoothed_is_the_mean_of_the_neighbours() -> None:
    y = np.random.default_rng(0).normal(size=800)
    half = 10  # of 800 values
    inner = np.convolve(y, np.full(2 * half + 1, 1 / (2 * half + 1)), "valid")
    np.testing.assert_allclose(smoothed(y)[half:-half], inner, atol=1e-12)
    assert smoothed(y)[0] == pytest.approx(y[: half + 1].mean())
    y[100] = np.nan
    assert smoothed(y)[100] == pytest.approx(np.nanmean(y[90:111])) and np.isnan(smoothed(np.full(3, np.nan))).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00012345, "0.000123"), (1.5, "1.5"), (250, "250"), (1234, "1,234"), (20_000, "20k"),
     (999_999, "1000k"), (1_250_000, "1.25M"), (-20_000, "-20k"), (1e30, "1e+30")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
