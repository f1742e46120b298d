"""Time other tiles of the Triton kernels than the rules choose, on this GPU, and keep what is faster.

    python benchmarks/tune.py --preset cifar10 --out benchmarks/results/triton-tiles-sm_90.json
    python benchmarks/tune.py --preset cifar10 --out FILE --install    # and into kernels/triton_tiles.json

For every kind of call that a training or a sampling step of the preset makes. A tile counts only if its results are
those of the rules' tile, up to rounding, and it is installed only if it saves 3 % of the call's time. Sides take turns.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
import triton
from resources import preset_calls
from shapes import Call, describe
from torch import Tensor
from triton.runtime.errors import TritonError

from fastddpm.kernels import triton_tiles
from fastddpm.kernels.attention import tiles as attention_tiles
from fastddpm.kernels.group_norm_silu import tiles as norm_tiles
from fastddpm.ops import registry
from fastddpm.presets import PRESETS
from fastddpm.storage.files import write_json

MODULES = {"attention": attention_tiles, "group_norm_silu": norm_tiles}
WORTH = 0.97  # of the rules' time, at most
_FINALISTS = 4
_MOST_VALUES = 128  # of a tile, to a thread
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Decision:
    """One choice of a tile: `tiles.choose(*sizes, chip)`."""

    tiles: ModuleType
    sizes: tuple[Any, ...]

    @property
    def key(self) -> tuple[str, str]:
        kernel, shape = self.tiles.key(*self.sizes)
        return kernel, shape


@dataclass(frozen=True)
class Timed:
    """A decision with the median seconds of the call under the rules' tile and under the best one."""

    decision: Decision
    call: str
    rule: Any
    rule_seconds: float
    best: Any
    best_seconds: float
    tried: int
    dropped: int  # did not compile, did not fit on the chip, or gave other numbers

    @property
    def ratio(self) -> float:
        return self.best_seconds / self.rule_seconds


def materialise(call: Call, device: torch.device) -> tuple[Any, ...]:
    """The call's arguments with values: normal numbers, and zeros where integers are meant."""
    generator = torch.Generator(device).manual_seed(0)

    def real(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        empty = torch.empty_like(argument, device=device)
        return empty.normal_(generator=generator) if argument.is_floating_point() else empty.zero_()

    return tuple(map(real, call.args))


@contextlib.contextmanager
def choosing(tiles: ModuleType, choose: Callable[..., Any]) -> Iterator[None]:
    """`tiles.choose` is `choose` in the block."""
    before = tiles.choose
    tiles.choose = choose  # type: ignore[attr-defined]
    try:
        yield
    finally:
        tiles.choose = before  # type: ignore[attr-defined]


def decisions(call: Call, run: Callable[[], object]) -> list[Decision]:
    """Those that `run` makes, which is the call."""
    tiles = MODULES[call.name.removesuffix("_backward")]
    chosen, found = tiles.choose, []

    def record(*arguments: Any) -> Any:
        found.append(Decision(tiles, arguments[:-1]))
        return chosen(*arguments)

    with choosing(tiles, record):
        run()
    return found


@contextlib.contextmanager
def trying(decision: Decision, tile: Any) -> Iterator[None]:
    """`tile` for this decision in the block."""
    chosen = decision.tiles.choose

    def choose(*arguments: Any) -> Any:
        return tile if arguments[:-1] == decision.sizes else chosen(*arguments)

    with choosing(decision.tiles, choose):
        yield


def candidates(decision: Decision, rule: Any) -> list[Any]:
    """Tiles worth a try, without the rules'."""
    if decision.tiles is attention_tiles:
        found = _attention_candidates(*decision.sizes[1:3])
    else:
        found = _norm_candidates(decision.sizes, rule)
    return [tile for tile in found if tile != rule]


def _attention_candidates(tokens: int, channels: int) -> list[attention_tiles.Tile]:
    columns, widest = attention_tiles.columns(tokens), max(16, attention_tiles.next_power_of_2(channels))
    return [
        attention_tiles.Tile(rows, chunk, warps, stages)
        for rows, chunk, warps, stages in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
        if rows <= columns and chunk <= widest and rows * columns <= _MOST_VALUES * 32 * warps
    ]


def _norm_candidates(sizes: tuple[Any, ...], rule: norm_tiles.Tile) -> list[norm_tiles.Tile]:
    """The rules' tile with twice and half of each number, and the other ways to take an image apart."""
    _, pixels, groups, cpg, *_ = sizes
    most_chunks = norm_tiles.ceil_div(pixels, rule.block_p)
    found = [dataclasses.replace(rule, warps=warps) for warps in (1, 2, 4, 8, 16)]
    for together in {max(1, rule.groups // 2), min(groups, 2 * rule.groups)}:
        block_c = norm_tiles.next_power_of_2(together * cpg)
        found += [dataclasses.replace(rule, groups=together, block_c=block_c, warps=warps) for warps in (4, 8, 16)]
    if rule.chunks:
        for rows in (rule.block_p // 2, 2 * rule.block_p):
            if 1 <= rows <= norm_tiles.next_power_of_2(pixels):
                found.append(dataclasses.replace(rule, block_p=rows))
        found += [dataclasses.replace(rule, chunks=n) for n in (1, 2, 4, 8, 16, 32) if n <= most_chunks]
        found.append(dataclasses.replace(rule, block_p=norm_tiles.next_power_of_2(pixels), chunks=0, warps=16))
    else:
        rows = max(1, rule.block_p // 4)
        found += [dataclasses.replace(rule, block_p=rows, chunks=n) for n in (1, 2, 4)]
    return [tile for tile in dict.fromkeys(found) if tile.block_p * tile.block_c <= _MOST_VALUES * 32 * tile.warps]


def agree(ours: Any, expected: Any) -> bool:
    """Whether two results are equal up to the order of sums."""
    pairs = zip(_tensors(ours), _tensors(expected), strict=True)
    return all(_agree(left.float(), right.float(), torch.finfo(right.dtype).eps) for left, right in pairs)


def _agree(ours: Tensor, expected: Tensor, eps: float) -> bool:
    if not ours.isfinite().all() or ours.numel() == 0:
        return ours.numel() == 0
    return bool((ours - expected).abs().max() <= max(4 * eps, 2e-5) * expected.abs().max())


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def gpu_seconds(run: Callable[[], object]) -> float:
    """The median over 20 ms of calls in a CUDA graph: without the host, whose part of a call is the longer one.

    The L2 cache keeps what fits from one call to the next, as it does between the kernels of a step.
    """
    milliseconds: float = triton.testing.do_bench_cudagraph(run, rep=20, return_mode="median")
    return milliseconds / 1e3


@contextlib.contextmanager
def dropping_what_cannot_be_compiled() -> Iterator[None]:
    """Triton's own errors, and those of a pass of its compiler; not what a GPU says of a wrong access."""
    try:
        yield
    except TritonError:
        pass
    except RuntimeError as error:
        if "PassManager" not in str(error):
            raise


def tune(
    call: Call, device: torch.device, timer: Timer, rounds: int, done: Collection[tuple[str, str]] = ()
) -> list[Timed]:
    """The best tile of every decision of the call whose key is not `done`, one after another."""
    arguments = materialise(call, device)
    module = importlib.import_module(f"fastddpm.kernels.{call.name.removesuffix('_backward')}.triton")

    def run() -> Any:
        return registry.call(module, call.name, arguments)

    expected, results = run(), []
    for decision in decisions(call, run):
        if decision.key in done:
            continue
        rule = decision.tiles.choose(*decision.sizes, triton_tiles.chip(device))
        sides, tried = [rule], candidates(decision, rule)
        for tile in tried:
            with trying(decision, tile), dropping_what_cannot_be_compiled():
                if agree(run(), expected):
                    sides.append(tile)
        kept = len(sides) - 1
        first = _times(decision, sides, run, timer, 1)
        sides = [rule, *sorted(sides[1:], key=lambda tile: first[tile])[:_FINALISTS]]
        seconds = _times(decision, sides, run, timer, rounds)
        best = min(sides, key=lambda tile: seconds[tile])
        results.append(Timed(
            decision, f"{call.name} {describe(call)}", rule, seconds[rule], best, seconds[best], len(tried),
            len(tried) - kept,
        ))  # fmt: skip
    return results


def _times(
    decision: Decision, sides: Sequence[Any], run: Callable[[], object], timer: Timer, rounds: int
) -> dict[Any, float]:
    """Median seconds of the call with each tile; the sides take turns."""
    times: dict[Any, list[float]] = {tile: [] for tile in sides}
    for _ in range(rounds):
        for tile in sides:
            with trying(decision, tile):
                times[tile].append(timer(run))
    return {tile: median(found) for tile, found in times.items()}


def install(results: Sequence[Timed], chip: str, path: Path = triton_tiles.FILE) -> int:
    """Write the tiles that save enough; a shape timed again is replaced, or left to the rules. Returns how many."""
    table = json.loads(path.read_text(encoding="utf-8"))
    count = 0
    for timed in results:
        kernel, shape = timed.decision.key
        shapes = table.setdefault(chip, {}).setdefault(kernel, {})
        shapes.pop(shape, None)
        if timed.ratio <= WORTH:
            shapes[shape] = dataclasses.asdict(timed.best)
            count += 1
    kept = {name: {kernel: shapes for kernel, shapes in kernels.items() if shapes} for name, kernels in table.items()}
    write_json(path, {name: kernels for name, kernels in kept.items() if kernels})
    return count


def document(results: Sequence[Timed], chip: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Everything that was timed, with the machine."""
    return {
        "chip": chip,
        "machine": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
        "timed": [
            {
                "kernel": timed.decision.key[0], "shape": timed.decision.key[1], "first call": timed.call,
                "rule": dataclasses.asdict(timed.rule), "rule_us": round(1e6 * timed.rule_seconds, 2),
                "best": dataclasses.asdict(timed.best), "best_us": round(1e6 * timed.best_seconds, 2),
                "ratio": round(timed.ratio, 4), "tried": timed.tried, "dropped": timed.dropped,
            }
            for timed in results
        ],
    }  # fmt: skip


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, what: str, file: Path
) -> tuple[argparse.Namespace, torch.device]:
    """The options, with those of all that times `what` to write `file`, and the GPU; exits with 2 without one."""
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all that was timed, kept up to date")
    parser.add_argument("--install", action="store_true", help=f"write {file.name}, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, f"{what} are timed on a GPU, and torch sees none\n")
    return options, torch.device("cuda", torch.cuda.current_device())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, action="append", help="default: all")
    parser.add_argument("--batch", type=int, action="append", help="default: the preset's")
    parser.add_argument("--dtype", choices=_DTYPES, action="append", help="default: bfloat16")
    options, device = parse(parser, arguments, "tiles", triton_tiles.FILE)
    chip = triton_tiles.chip(device)
    triton_tiles.table().clear()  # the rules' tiles are what the others are held against
    seen: set[tuple[str, str]] = set()
    results: list[Timed] = []
    for preset, dtype in itertools.product(options.preset or PRESETS, options.dtype or ["bfloat16"]):
        for batch in options.batch or [PRESETS[preset].train.batch]:
            for call in preset_calls(preset, batch, _DTYPES[dtype]):
                if call.name.removesuffix("_backward") not in MODULES:
                    continue
                for timed in tune(call, device, gpu_seconds, options.rounds, seen):
                    seen.add(timed.decision.key)
                    results.append(timed)
                    print(f"{timed.ratio:.3f} {' '.join(timed.decision.key)}: {timed.best}", flush=True)
                    write_json(options.out, document(results, chip, device, options.rounds))
    if options.install:
        print(f"{install(results, chip)} of {len(results)} tiles installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
