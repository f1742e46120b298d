"""Philox4x32-10 in NumPy: the specification, which every other implementation equals bit for bit."""

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_MASK = np.uint64(0xFFFFFFFF)


def philox(
    c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return four uint32 arrays: the outputs for each counter (c0, c1, c2, c3), in the broadcast shape.

    The counter words are integers that broadcast against each other; `seed` is a 64-bit key, its low
    word first (a negative seed is taken modulo 2^64).
    """
    words = [np.asarray(c).astype(np.uint64) & _MASK for c in (c0, c1, c2, c3)]
    x0, x1, x2, x3 = np.broadcast_arrays(*words)
    key = int(seed) & 0xFFFFFFFFFFFFFFFF
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        p0 = np.uint64(MULTIPLIERS[0]) * x0
        p1 = np.uint64(MULTIPLIERS[1]) * x2
        x0, x1, x2, x3 = (
            (p1 >> np.uint64(32)) ^ x1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> np.uint64(32)) ^ x3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0 = (k0 + KEY_INCREMENTS[0]) & 0xFFFFFFFF
        k1 = (k1 + KEY_INCREMENTS[1]) & 0xFFFFFFFF
    return x0.astype(np.uint32), x1.astype(np.uint32), x2.astype(np.uint32), x3.astype(np.uint32)


def normals(words: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the normals of four uint32 words by Box-Muller: float64, stacked on a new last axis of length 4.

    With u = w / 2^32 + 2^-33 for the radius and v = w / 2^32 for the angle, words (0, 1) give
    sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v), words (2, 3) the second pair. |z| <= 6.77.
    """
    w = [np.asarray(x, dtype=np.float64) for x in words]
    pairs = []
    for radius_word, angle_word in ((w[0], w[1]), (w[2], w[3])):
        radius = np.sqrt(-2.0 * np.log(radius_word * 2.0**-32 + 2.0**-33))
        angle = 2.0 * np.pi * (angle_word * 2.0**-32)
        pairs += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(pairs, axis=-1)
