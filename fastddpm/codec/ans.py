"""A stack of bits for symbols: range asymmetric numeral systems (Duda 2013), many symbols at once.

Pushing a symbol that owns the interval [start, start + mass) of 0..2^bits - 1 adds bits - log2(mass) bits to the stack.
Popping is the exact inverse: it draws a symbol from the bits on the stack and removes as many. Each lane (a head of 64
bits) takes one symbol at a time, all lanes in one NumPy operation, over a common stack of 16-bit words. Changing the
number of lanes costs no bits, because a lane is itself pushed onto the others, or popped from them.

A maintained coder (constriction) cannot stand in for it: the masses of .fdz files have 32 bits, constriction's have 24.
docs/measurements/codec-libraries.md compares both.
"""

from collections.abc import Callable

import numpy as np

from fastddpm.errors import DataError

Find = Callable[[np.ndarray, slice], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""(values uint64, which symbols to pop) -> the symbols int64 whose intervals hold the values, start, mass uint64."""

PRECISION = 32  # bits of the intervals of symbols
# A head holds 48 to 64 bits, so that intervals of 32 bits distort a probability by 2^-16 at most.
EMPTY = 2**48
_WORD = 16
_BITS = np.uint64(PRECISION)
_REFILL = (np.uint64(2**32), np.uint64(EMPTY))


class AnsStack:
    """A stack of bits, last in, first out.

    `words`: the initial words, uint16, deepest first. `head`: the initial head, 2^48..2^64 - 1. Popping more than is
    there raises DataError; with `lending`, zero words are supplied instead, and `borrowed` counts them. `low`: the
    smallest `balance` since it was last set.
    """

    def __init__(self, words: np.ndarray | None = None, head: int = EMPTY, *, lending: bool = False) -> None:
        self._heads = np.array([head], dtype=np.uint64)
        self._buffer = np.zeros(0, np.uint16) if words is None else words.astype(np.uint16)
        self._size = len(self._buffer)
        self._lending = lending
        self.borrowed = 0
        self.low = self.balance

    @property
    def lanes(self) -> int:
        """The number of lanes."""
        return len(self._heads)

    @property
    def balance(self) -> int:
        """The number of words below the heads, less the borrowed ones."""
        return self._size - self.borrowed

    @property
    def head(self) -> int:
        """The head of the first lane."""
        return int(self._heads[0])

    @property
    def words(self) -> np.ndarray:
        """A copy of the words below the heads, uint16, deepest first."""
        return self._buffer[: self._size].copy()

    def push(self, start: np.ndarray, mass: np.ndarray, pad: np.ndarray | None = None) -> None:
        """Push n symbols, given as intervals of 32 bits: `start` and `mass`, uint64 (n,) each.

        `pad`: 32 bits per symbol, uint64 (n,), that are XORed with its value. Raises DataError for an empty interval,
        which only a damaged stream leads to.
        """
        if not mass.all():
            raise DataError("the stream holds a symbol of probability 0; it is damaged")
        for first in range((len(start) - 1) // self.lanes * self.lanes, -1, -self.lanes):
            part = slice(first, first + self.lanes)
            self._push(start[part], mass[part], _BITS, None if pad is None else pad[part])

    def pop(self, count: int, find: Find, pad: np.ndarray | None = None) -> np.ndarray:
        """Pop `count` symbols, int64, in the order in which `push` was given them.

        `find` returns the symbols whose intervals hold given values. With a `pad` of random bits the symbols are
        random, whatever is on the stack. Raises DataError if the stack ends too early.
        """
        parts = []
        for first in range(0, count, self.lanes):
            part = slice(first, min(first + self.lanes, count))
            parts.append(self._pop(part, find, _BITS, None if pad is None else pad[part]))
        return np.concatenate(parts)

    def resize(self, lanes: int) -> None:
        """Change the number of lanes to `lanes`, a power of two."""
        while self.lanes < lanes:
            self._unfold()
        while self.lanes > lanes:
            self._fold()

    def _push(
        self, start: np.ndarray, mass: np.ndarray, bits: np.ndarray | np.uint64, pad: np.ndarray | None = None
    ) -> None:
        heads = self._heads[: len(start)]
        for _ in _REFILL:
            full = (heads >> np.uint64(1)) >> (np.uint64(63) - bits) >= mass
            if not full.any():
                break
            chosen = heads[full]
            self._put(chosen)
            heads[full] = chosen >> np.uint64(_WORD)
        quotient = heads // mass
        value = heads - quotient * mass + start
        heads[:] = (quotient << bits) | (value if pad is None else value ^ pad)

    def _pop(self, part: slice, find: Find, bits: np.ndarray | np.uint64, pad: np.ndarray | None = None) -> np.ndarray:
        heads = self._heads[: part.stop - part.start]
        value = heads & ((np.uint64(1) << bits) - np.uint64(1))
        value = value if pad is None else value ^ pad
        symbols, start, mass = find(value, part)
        heads[:] = mass * (heads >> bits) + (value - start)
        for least in _REFILL:  # the word that was moved out last comes back first
            short = heads < least
            if short.any():
                chosen = heads[short]
                heads[short] = chosen << np.uint64(_WORD) | self._take(len(chosen))
        return symbols

    def _fold(self) -> None:
        """Push the upper half of the lanes onto the lower: 48 bits of each as words, the rest, 2^e + f, as e and f."""
        half = self.lanes // 2
        upper, self._heads = self._heads[half:], self._heads[:half].copy()
        for shift in (0, 16, 32):
            self._put(upper >> np.uint64(shift))
        rest = upper >> np.uint64(48)
        exponent = np.frexp(rest.astype(np.float64))[1].astype(np.uint64) - np.uint64(1)
        one = np.ones(half, np.uint64)
        self._push(rest - (one << exponent), one, exponent)
        self._push(exponent, one, np.uint64(4))

    def _unfold(self) -> None:
        """Double the number of lanes, as the inverse of `_fold`."""
        everything = slice(0, self.lanes)
        exponent = self._pop(everything, _uniform, np.uint64(4))
        rest = self._pop(everything, _uniform, exponent) + (np.uint64(1) << exponent)
        for _ in range(3):
            rest = rest << np.uint64(_WORD) | self._take(self.lanes)
        self._heads = np.concatenate([self._heads, rest])

    def _put(self, words: np.ndarray) -> None:
        """Append the low 16 bits of each of `words`."""
        size = self._size + len(words)
        if size > len(self._buffer):
            self._buffer = np.concatenate([self._buffer[: self._size], np.zeros(size + 1024, np.uint16)])
        self._buffer[self._size : size] = words  # uint16 keeps the low 16 bits
        self._size = size

    def _take(self, count: int) -> np.ndarray:
        missing = count - self._size
        if missing > 0:
            if not self._lending:
                raise DataError("the stream ends too early")
            self._buffer = np.concatenate([np.zeros(missing, np.uint16), self._buffer[: self._size]])
            self._size = count
            self.borrowed += missing
        self._size -= count
        self.low = min(self.low, self.balance)
        return self._buffer[self._size : self._size + count].astype(np.uint64)


def _uniform(value: np.ndarray, _part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return value, value, np.ones_like(value)
