"""The codec's stack of bits beside constriction's, on the same symbols: bits and speed.

python benchmarks/codec_libraries.py --out FILE.json      (pip install constriction scipy)

The symbols are the pixels of 400 embedded digits. Each has a Gaussian of its own on the 256 levels, whose mean is off
by as much as its deviation says, as the decoder of a trained chain has. Sides push all symbols onto a stack of random
words and pop them again; what a side pops is checked. `ideal` is -log2 of the probabilities in float64.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

sys.path.insert(0, str(Path(__file__).parent))
import machine

from fastddpm.codec.ans import EMPTY, AnsStack
from fastddpm.codec.conditionals import pixel_cells
from fastddpm.codec.quantised import NORMAL, RELEASED, Cdf, QuantisedGaussian
from fastddpm.data import open_dataset

IMAGES, DEVIATION, LANES, BELOW = 400, 0.05, 4096, 200_000
CELLS = pixel_cells()
Side = tuple[Callable[[], object], Callable[[], np.ndarray], Callable[[], float | None]]
"""Push all symbols, pop them, and the bits that are on the stack in between, None where another side has the same."""


def tanh_cdf(z: Any) -> Any:
    """The released code's approximation of the normal distribution."""
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def ideal(symbols: np.ndarray, mean: np.ndarray, cdf: Callable[[Any], Any]) -> float:
    """Return the bits of all symbols."""
    edges = [CELLS.origin + (symbols + i) * CELLS.width for i in (0, 1)]
    low = np.where(symbols == 0, 0.0, cdf((edges[0] - mean) / DEVIATION))
    high = np.where(symbols == CELLS.bins - 1, 1.0, cdf((edges[1] - mean) / DEVIATION))
    return float(-np.log2(high - low).sum())


def ours(symbols: np.ndarray, mean: np.ndarray, cdf: Cdf, lanes: int) -> Side:
    """`AnsStack` with the masses of `QuantisedGaussian`, computed in each push and pop."""
    stack = AnsStack(np.random.default_rng(0).integers(0, 2**16, BELOW).astype(np.uint16))
    stack.resize(lanes)

    def push() -> None:
        stack.push(*QuantisedGaussian(CELLS, mean, DEVIATION, cdf=cdf).intervals(symbols))

    def pop() -> np.ndarray:
        return stack.pop(len(symbols), QuantisedGaussian(CELLS, mean, DEVIATION, cdf=cdf).find)

    def bits() -> float:
        stack.resize(1)
        found = 16 * (stack.balance - BELOW) + math.log2(stack.head / EMPTY)
        stack.resize(lanes)
        return found

    return push, pop, bits


def stack_alone(symbols: np.ndarray, mean: np.ndarray, cdf: Cdf, lanes: int) -> Side:
    """`AnsStack` with masses that are known."""
    start, mass = QuantisedGaussian(CELLS, mean, DEVIATION, cdf=cdf).intervals(symbols)
    stack = AnsStack(np.random.default_rng(0).integers(0, 2**16, BELOW).astype(np.uint16))
    stack.resize(lanes)
    return (
        lambda: stack.push(start, mass),
        lambda: stack.pop(len(symbols), lambda _, part: (symbols[part], start[part], mass[part])),
        lambda: None,
    )


def constriction_side(symbols: np.ndarray, model: Any, arguments: Callable[[], Sequence[np.ndarray]]) -> Side:
    """constriction's `AnsCoder` with a family of models; `arguments` are computed in each push and pop."""
    import constriction

    words = np.random.default_rng(0).integers(1, 2**32, BELOW // 2).astype(np.uint32)
    coder = constriction.stream.stack.AnsCoder(words)
    before, whole = coder.num_valid_bits(), symbols.astype(np.int32)
    return (
        lambda: coder.encode_reverse(whole, model, *arguments()),
        lambda: coder.decode(model, *arguments()),
        lambda: float(coder.num_valid_bits() - before),
    )


def table(mean: np.ndarray) -> np.ndarray:
    """Return the probability of every level for each symbol, float32 (n, 256), by the tanh."""
    edges = CELLS.origin + np.arange(1, CELLS.bins) * CELLS.width
    inner = tanh_cdf((edges - mean[:, None]) / DEVIATION)
    return np.diff(inner, axis=1, prepend=0.0, append=1.0).astype(np.float32)


def sides(symbols: np.ndarray, mean: np.ndarray) -> dict[str, tuple[Side, int, str]]:
    """Every side, with how many of the symbols it takes, and the distribution."""
    import constriction

    model = constriction.stream.model

    def units(count: int) -> tuple[np.ndarray, np.ndarray]:
        """The means in levels, and the deviation."""
        levels = ((mean[:count] - CELLS.origin) / CELLS.width - 0.5).astype(np.float32)
        return levels, np.full(count, DEVIATION / CELLS.width, np.float32)

    few = 4000
    spread = DEVIATION / CELLS.width
    custom = model.CustomModel(
        lambda x, m: float(tanh_cdf((x - m) / spread)), lambda p, m: m + spread * (p - 0.5), 0, CELLS.bins - 1
    )
    gaussian, every = model.QuantizedGaussian(0, CELLS.bins - 1), len(symbols)
    return {
        "fastddpm, normal, 4096 lanes": (ours(symbols, mean, NORMAL, LANES), every, "normal"),
        "constriction QuantizedGaussian": (
            constriction_side(symbols, gaussian, lambda: units(every)), every, "normal"
        ),
        "fastddpm, tanh, 4096 lanes": (ours(symbols, mean, RELEASED, LANES), every, "tanh"),
        "fastddpm, tanh, 16 lanes": (ours(symbols, mean, RELEASED, 16), every, "tanh"),
        "constriction Categorical, 256 probabilities each": (
            constriction_side(symbols, model.Categorical(perfect=False), lambda: [table(mean)]), every, "tanh"
        ),
        "constriction CustomModel": (
            constriction_side(symbols[:few], custom, lambda: units(few)[:1]), few, "tanh"
        ),
        "fastddpm, the stack alone, 4096 lanes": (stack_alone(symbols, mean, RELEASED, LANES), every, "tanh"),
    }  # fmt: skip


def measure(symbols: np.ndarray, mean: np.ndarray, rounds: int) -> list[dict[str, Any]]:
    """Bits per symbol and rates, all sides taking turns."""
    chosen = sides(symbols, mean)
    rows, calls = [], []
    for name, ((push, pop, bits), count, kind) in chosen.items():
        push()
        length = bits()
        if not np.array_equal(pop(), symbols[:count]):
            raise RuntimeError(f"{name} popped other symbols than were pushed")
        exact = ideal(symbols[:count], mean[:count], ndtr if kind == "normal" else tanh_cdf)
        rows.append({"side": name, "symbols": count})
        if length is not None:
            rows[-1] |= {"bits": length / count, "over_ideal": (length - exact) / count}
        calls.append((push, pop))
    times = [([], []) for _ in calls]  # type: ignore[var-annotated]
    for _ in range(rounds):
        for pair, (pushing, popping) in zip(calls, times, strict=True):
            for call, seconds in zip(pair, (pushing, popping), strict=True):
                start = machine.perf_counter()
                call()
                seconds.append(machine.perf_counter() - start)
    for row, (pushing, popping) in zip(rows, times, strict=True):
        row |= {"push_per_s": row["symbols"] / np.median(pushing), "pop_per_s": row["symbols"] / np.median(popping)}
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def precision() -> float:
    """Return the bits of constriction's masses: what a symbol costs that has the least of them."""
    import constriction

    coder, count = constriction.stream.stack.AnsCoder(), 1000
    sure = constriction.stream.model.Categorical(np.array([1.0, 0.0], np.float32), perfect=False)
    coder.encode_reverse(np.ones(count, np.int32), sure)
    return coder.num_valid_bits() / count


def main(arguments: Sequence[str] | None = None) -> None:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = parser.parse_args(arguments)
    images = open_dataset(None, image_size=16, channels=1).images
    symbols = np.array(images[np.arange(IMAGES) * len(images) // IMAGES]).reshape(-1).astype(np.int64)
    mean = CELLS.centres(symbols) + DEVIATION * np.random.default_rng(1).normal(size=len(symbols))
    rows = measure(symbols, mean, options.rounds)
    document = {
        "machine": machine.description() | {"numpy": np.__version__, "constriction": version("constriction")},
        "cores": os.cpu_count(), "load": os.getloadavg(), "rounds": options.rounds,
        "constriction_bits_of_least_mass": precision(), "rows": rows,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
