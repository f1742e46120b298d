"""A stack of bits that symbols are pushed onto and popped from, exactly: range asymmetric numeral systems (Duda 2013).

A symbol that owns the interval [start, start + mass) of 0..2^bits - 1 costs bits - log2(mass) when it is pushed, and
popping draws one from bits that are there, at the same price: drawing is the inverse of coding. Lanes (heads of 64
bits) take a symbol each at once, and share one stack of 16-bit words below them. Their number may change at any time,
for no bits at all: a lane is itself pushed onto the others, or popped from them.
"""

from collections.abc import Callable

import numpy as np

from fastddpm.errors import DataError

# (value below 2^bits of each lane, which of the symbols) -> symbols, start, mass.
Find = Callable[[np.ndarray, slice], tuple[np.ndarray, np.ndarray, np.ndarray]]

PRECISION = 32  # bits of a symbol's interval
# A head holds 48 to 64 bits, so that an interval of 32 bits distorts a probability by 2^-16 at most.
EMPTY = 2**48
_WORD = 16
_BITS = np.uint64(PRECISION)
_REFILL = (np.uint64(2**32), np.uint64(EMPTY))


class AnsStack:
    """Bits, last in first out. `words`: uint16, the deepest first; `head`: 2^48..2^64 - 1.

    With `lending`, words of zero come when there are none left; without it, `DataError`. `borrowed`: how many came.
    `low`: the least that there was of words less borrowed ones since it was last set.
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
        return len(self._heads)

    @property
    def balance(self) -> int:
        """Words below the heads, less those borrowed."""
        return self._size - self.borrowed

    @property
    def head(self) -> int:
        """The first lane."""
        return int(self._heads[0])

    @property
    def words(self) -> np.ndarray:
        """What lies below the heads, the deepest first; uint16."""
        return self._buffer[: self._size].copy()

    def push(self, start: np.ndarray, mass: np.ndarray, pad: np.ndarray | None = None) -> None:
        """Put symbols on top, uint64 (n,) each: their intervals of 32 bits.

        `pad`: 32 bits for each, uint64 (n,), that its value is changed by (exclusive or). Raises `DataError` for an
        empty interval, which only a damaged stream leads to.
        """
        if not mass.all():
            raise DataError("the stream holds a symbol that cannot be")
        for first in range((len(start) - 1) // self.lanes * self.lanes, -1, -self.lanes):
            part = slice(first, first + self.lanes)
            self._push(start[part], mass[part], _BITS, None if pad is None else pad[part])

    def pop(self, count: int, find: Find, pad: np.ndarray | None = None) -> np.ndarray:
        """Take `count` symbols, int64, in the order in which `push` was given them; `find` says whose a value is.

        With a `pad` of random bits the symbols are as random, whatever lies on the stack.
        """
        parts = []
        for first in range(0, count, self.lanes):
            part = slice(first, min(first + self.lanes, count))
            parts.append(self._pop(part, find, _BITS, None if pad is None else pad[part]))
        return np.concatenate(parts)

    def resize(self, lanes: int) -> None:
        """Go on with `lanes` lanes, a power of two."""
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
        for least in _REFILL:  # what was pushed out second comes back first
            short = heads < least
            if short.any():
                chosen = heads[short]
                heads[short] = chosen << np.uint64(_WORD) | self._take(len(chosen))
        return symbols

    def _fold(self) -> None:
        """Push the upper half of the lanes onto the lower: 48 bits each as words, the rest, 2^e + f, as e and f."""
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
        """The inverse of `_fold`."""
        everything = slice(0, self.lanes)
        exponent = self._pop(everything, _uniform, np.uint64(4))
        rest = self._pop(everything, _uniform, exponent) + (np.uint64(1) << exponent)
        for _ in range(3):
            rest = rest << np.uint64(_WORD) | self._take(self.lanes)
        self._heads = np.concatenate([self._heads, rest])

    def _put(self, words: np.ndarray) -> None:
        """The low 16 bits of each."""
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
