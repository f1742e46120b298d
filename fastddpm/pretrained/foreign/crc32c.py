"""CRC32C, the checksum of TensorFlow's checkpoints: by the compiled library, or without one by NumPy."""

import numpy as np

from fastddpm.kernels import native

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
_DOUBLINGS = 9
_ROW = 2**_DOUBLINGS  # bytes that NumPy takes one after another, in all rows at once
_BLOCK = 2**13  # rows, whose bytes and registers stay in the cache


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """Return the CRC32C of `data`, which is dense: 32 bits, initial value and final inversion as in RFC 3720."""
    array = np.frombuffer(data, np.uint8)
    return by_numpy(array) if native.unavailable() else native.crc32c(array)


def masked(crc: int) -> int:
    """Return a CRC32C as TensorFlow stores it: rotated right by 15 bits, plus a constant, modulo 2^32."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def by_numpy(data: np.ndarray) -> int:
    """Return the CRC32C of uint8 (N,) without the library.

    The register is linear in the bytes. So rows of equal length are taken side by side, each from a register of 0, and
    neighbours are joined in pairs: the left one is carried over as many zero bytes as the right one is long. Zero bytes
    in front change nothing, and the initial register, all ones, is the first four bytes inverted.
    """
    table = _bytes_table()
    head = data[: len(data) % _ROW if len(data) > _ROW else len(data)]
    register = np.uint32(0xFFFFFFFF)
    for byte in head:
        register = _next(table, register, byte)
    rows = data[len(head) :].reshape(-1, _ROW)
    registers = np.zeros(1 << max(len(rows) - 1, 0).bit_length(), np.uint32)
    first = len(registers) - len(rows)
    if len(rows):
        registers[first] = register
        for at in range(0, len(rows), _BLOCK):
            some = registers[first + at : first + at + _BLOCK]
            for column in np.ascontiguousarray(rows[at : at + _BLOCK].T):
                some[:] = _next(table, some, column)
        register = _joined(registers, table)
    return int(register) ^ 0xFFFFFFFF


def _joined(registers: np.ndarray, table: np.ndarray) -> np.uint32:
    """Return the register of all rows from those of each, whose number is a power of two."""
    # over[k][b]: what the byte b at place k of a register becomes over so many zero bytes, at first 1.
    bytes_at = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
    over = _next(table, bytes_at, np.zeros((), np.uint8))
    for _ in range(_DOUBLINGS):
        over = _carried(over, over)
    while len(registers) > 1:
        registers = _carried(over, registers[::2]) ^ registers[1::2]
        over = _carried(over, over)
    return np.uint32(registers[0])


def _next(table: np.ndarray, register: np.ndarray, byte: np.ndarray) -> np.ndarray:
    """Return registers after one more byte each."""
    following: np.ndarray = (register >> np.uint32(8)) ^ table[(register ^ byte) & np.uint32(255)]
    return following


def _carried(over: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """Return registers after the zero bytes that `over` stands for."""
    parts = [over[k][registers >> np.uint32(8 * k) & np.uint32(255)] for k in range(4)]
    carried: np.ndarray = parts[0] ^ parts[1] ^ parts[2] ^ parts[3]
    return carried


def _bytes_table() -> np.ndarray:
    """Return what each byte makes of a register of 0, uint32 (256,)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & np.uint32(1), np.uint32(_POLYNOMIAL), np.uint32(0))
    return table
