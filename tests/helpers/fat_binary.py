"""The code for GPUs inside a library that nvcc made: which chips, and which instructions.

Layouts and encodings as `cuobjdump -lelf -lptx -sass` shows them; a CUDA toolkit does not always have that program.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_FAT_BINARY = b"\x50\xed\x55\xba"
_INSTRUCTION = 16  # bytes
_LOAD_GLOBAL, _STORE_GLOBAL = 0x981, 0x986  # the low 12 bits of LDG and STG
_BYTES = (1, 1, 2, 2, 4, 8, 16)  # what bits 73 to 75 of a load or store say that it moves


@dataclass(frozen=True)
class Part:
    """PTX, or the machine code (SASS) of one source for one chip."""

    kind: str
    architecture: int
    of_that_only: bool  # 90a, not 90
    content: bytes


def parts(library: bytes) -> Iterator[Part]:
    at = library.find(_FAT_BINARY)
    while at >= 0:
        header, size = struct.unpack_from("<HQ", library, at + 6)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", library, entry)
            (architecture,) = struct.unpack_from("<I", library, entry + 28)
            (flags,) = struct.unpack_from("<Q", library, entry + 40)
            start = entry + entry_header
            content = library[start : start + entry_size]
            yield Part("PTX" if kind == 1 else "SASS", architecture, bool(flags >> 20 & 1), content)
            entry = start + entry_size
        at = library.find(_FAT_BINARY, end)


def kernels(part: Part) -> Iterator[tuple[str, bytes]]:
    """Mangled names and instructions of an ELF file for a GPU."""
    elf = part.content
    assert elf[:4] == b"\x7fELF", "compressed"
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, of_names = struct.unpack_from("<HHH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = sections[of_names][4]
    for name, _, _, _, offset, length in sections:
        text = elf[names + name : elf.index(b"\0", names + name)].decode()
        if text.startswith(".text."):
            yield text.removeprefix(".text."), elf[offset : offset + length]


def global_accesses(code: bytes) -> tuple[list[int], list[int]]:
    """How many bytes each load from, and each store to, global memory moves for a thread."""
    loads: list[int] = []
    stores: list[int] = []
    for low, high in struct.iter_unpack("<QQ", code[: len(code) // _INSTRUCTION * _INSTRUCTION]):
        if low & 0xFFF in (_LOAD_GLOBAL, _STORE_GLOBAL):
            (loads if low & 0xFFF == _LOAD_GLOBAL else stores).append(_BYTES[high >> 9 & 7])
    return loads, stores
