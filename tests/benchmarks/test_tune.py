"""The tuner of the Triton kernels' tiles, in the interpreter and with a clock of the tests' own."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import resources
import shapes
import tune

from fastddpm.kernels import triton_tiles
from fastddpm.kernels.attention import tiles as attention_tiles
from fastddpm.kernels.group_norm_silu import tiles as norm_tiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
CPU = torch.device("cpu")


def meta(*size: int) -> torch.Tensor:
    return torch.empty(size, device="meta")


def attention_backward() -> shapes.Call:
    return shapes.Call("attention_backward", (*(meta(1, 20, 40) for _ in range(4)), meta(1, 20), 0.1, False))


def norm(name: str = "group_norm_silu") -> shapes.Call:
    """24 channels per 2 groups, 5x7, channels_last, with a time embedding."""
    x, c, nc = meta(2, 24, 5, 7).to(memory_format=torch.channels_last), meta(24), meta(2, 24)
    options: tuple[Any, ...] = (None, nc, None, None, True, 0.0, None, None, None, 0)
    if name == "group_norm_silu":
        return shapes.Call(name, (x, c, c, 2, 1e-6, *options))
    return shapes.Call(name, (x, x, c, c, meta(2, 2), meta(2, 2), 2, *options, None, None))


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty file of tiles, of this test alone."""
    path = tmp_path / "tiles.json"
    path.write_text("{}\n")
    monkeypatch.setattr(triton_tiles, "FILE", path)
    forget()
    yield path
    forget()


def forget() -> None:
    for cached in (triton_tiles.table, attention_tiles.choose, norm_tiles.choose):
        cached.cache_clear()


class Clock:
    """Seconds that a tile takes: 1 for the rules' and all others, and `seconds` for `fast`."""

    def __init__(self, fast: Any, seconds: float) -> None:
        self.fast, self.seconds, self.taken = fast, seconds, 0

    def __call__(self, run: Any) -> float:
        run()
        self.taken += 1
        tiles = attention_tiles if isinstance(self.fast, attention_tiles.Tile) else norm_tiles
        chosen = []
        inner = tiles.choose

        def record(*arguments: Any) -> Any:
            chosen.append(inner(*arguments))
            return chosen[-1]

        with tune.choosing(tiles, record):
            run()
        return self.seconds if self.fast in chosen else 1.0


@pytest.mark.slow
@pytest.mark.parametrize("call", [norm(), norm("group_norm_silu_backward"), attention_backward()], ids=lambda c: c.name)
def test_every_candidate_computes_the_same(call: shapes.Call) -> None:
    """The kernels may be taken apart in all these ways, so nothing is dropped where nothing is too large."""
    found = tune.tune(call, CPU, lambda run: 1.0, 1)
    assert [timed.decision.key[0] for timed in found] == (
        ["attention queries", "attention keys"]
        if call.name == "attention_backward"
        else [f"group_norm_silu {'backward' if 'backward' in call.name else 'forward'}"]
    )
    for timed in found:
        assert timed.tried >= 6 and timed.dropped == 0
        assert timed.best == timed.rule  # all are equally fast


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "installed"), [(0.5, 1), (0.96, 1), (0.98, 0)])
def test_a_faster_tile_is_installed_and_used_on_this_chip_alone(
    seconds: float, installed: int, own_table: Path
) -> None:
    call = norm()
    sizes = (2, 35, 2, 12, 4, True, False)
    rule = norm_tiles.choose(*sizes, "sm_90")
    fast = dataclasses.replace(rule, warps=2 * rule.warps)
    found = tune.tune(call, CPU, Clock(fast, seconds), 3)
    assert found[0].best == fast and found[0].ratio == seconds and found[0].decision.sizes == sizes
    assert tune.install(found, "sm_90", own_table) == installed
    forget()
    assert norm_tiles.choose(*sizes, "sm_90") == (fast if installed else rule)
    assert norm_tiles.choose(3, *sizes[1:], "sm_90") == (fast if installed else norm_tiles.by_rules(3, *sizes[1:]))
    assert norm_tiles.choose(4, *sizes[1:], "sm_90") == norm_tiles.by_rules(4, *sizes[1:])
    assert norm_tiles.choose(*sizes, "sm_80") == rule


@pytest.mark.slow
def test_timed_again_and_no_longer_faster_is_removed(own_table: Path) -> None:
    sizes = ("forward", 20, 40, 4)
    rule = attention_tiles.choose(*sizes, "sm_90")
    fast = dataclasses.replace(rule, stages=3)
    timed = tune.Timed(tune.Decision(attention_tiles, sizes), "attention", rule, 1.0, fast, 0.5, 1, 0)
    assert tune.install([timed], "sm_90", own_table) == 1
    forget()
    assert attention_tiles.choose(*sizes, "sm_90") == fast
    tune.install([dataclasses.replace(timed, best=rule, best_seconds=1.0)], "sm_90", own_table)
    assert json.loads(own_table.read_text()) == {}


@pytest.mark.slow
def test_a_tile_with_other_numbers_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of fewer channels than its groups have loses some of them."""
    wrong = norm_tiles.Tile(block_p=64, block_c=4, groups=1, warps=4, chunks=0)
    monkeypatch.setattr(tune, "candidates", lambda decision, rule: [wrong])
    (timed,) = tune.tune(norm(), CPU, Clock(wrong, 0.1), 1)
    assert (timed.tried, timed.dropped) == (1, 1)
    assert timed.best == timed.rule != wrong


@pytest.mark.slow
def test_shapes_already_timed_are_not_timed_again() -> None:
    clock = Clock(None, 1.0)
    (timed,) = tune.tune(norm(), CPU, clock, 1)
    taken = clock.taken
    assert taken > 0
    assert tune.tune(norm(), CPU, clock, 1, {timed.decision.key}) == []
    assert clock.taken == taken


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--out", str(tmp_path / "tiles.json")])
    assert "timed on a GPU" in capsys.readouterr().err
    assert list(tmp_path.glob("tiles.json.new")) == []


@pytest.mark.slow
def test_the_timed_tile_is_compiled_for_its_chip(own_table: Path) -> None:
    tile = {"rows": 16, "chunk": 16, "warps": 2, "stages": 3}
    kernel, shape = attention_tiles.key("keys", 20, 40, 4)
    own_table.write_text(json.dumps({"sm_90": {kernel: {shape: tile}}}))
    forget()
    warps = {chip: [dict(k.options)["num_warps"] for k in resources.kernels_of(attention_backward(), chip)]
             for chip in ("sm_80", "sm_90")}  # fmt: skip
    assert warps == {"sm_80": [4, 4], "sm_90": [4, 2]}


def test_the_installed_file_names_tiles() -> None:
    """Every entry of the file that is shipped makes a tile of its kernel."""
    kinds = {"attention": attention_tiles.Tile, "group_norm_silu": norm_tiles.Tile}
    shipped = json.loads((Path(triton_tiles.__file__).parent / "triton_tiles.json").read_text())
    for kernels in shipped.values():
        for kernel, by_shape in kernels.items():
            assert all(kinds[kernel.split()[0]](**tile) for tile in by_shape.values())
