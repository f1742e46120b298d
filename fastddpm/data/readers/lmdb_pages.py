"""Verify the pages of an LMDB file, because the lmdb library trusts them and would crash at a damaged one.

A file is a row of pages of equal size. The first two are meta pages; the one of the later transaction holds. It names
the root of a tree: branch pages with the numbers of other pages, and leaf pages with keys and values. A value too large
for a leaf has pages of its own. All numbers are little-endian.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

from fastddpm.errors import DataError
from fastddpm.storage.reading import open_regular

_MAGIC = 0xBEEFC0DE
_PAGE_SIZES = tuple(2**i for i in range(8, 17))
_EMPTY = 2**64 - 1  # the root of a tree without pages
_MAX_DEPTH = 32  # the library's
# After the page's header: magic, version, address, map size, two databases of 48 bytes, of which the first begins with
# the page size and the second holds the images, last page, transaction.
_META = struct.Struct("<16x I 4x 8x 8x I 44x 32x Q Q Q Q")
_HEADER = struct.Struct("<Q 2x H H H")  # number of the page, kind, end of the table of nodes, begin of the nodes
_BRANCH, _LEAF = 1, 2
_NODE = struct.Struct("<I H H")  # size of the value, flags, size of the key; in a branch, 6 bytes are a page's number
_ELSEWHERE = 1  # a flag: the value is on pages of its own, and the node has their number


class Meta(NamedTuple):
    """The fields of a meta page that reading depends on."""

    magic: int
    page_size: int
    entries: int
    root: int
    last_page: int
    transaction: int


def read_meta(path: Path) -> Meta | None:
    """Return the meta page that holds; None if the file is not an LMDB. Raises DataError if it is damaged or cut short.

    The library would crash when it reads beyond the end of a file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = _meta(file.fileno(), 0)
            if first is None:
                return None
            if first.page_size not in _PAGE_SIZES:
                raise DataError(f"{path} is damaged: its page size is {first.page_size:,} bytes")
            second = _meta(file.fileno(), first.page_size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if second is not None and second.page_size != first.page_size:
        raise DataError(f"{path} is damaged: its two meta pages differ in the size of a page")
    meta = second if second is not None and second.transaction > first.transaction else first
    expected = (meta.last_page + 1) * meta.page_size
    if size < expected:
        raise DataError(
            f"{path} is cut short: it has {size:,} bytes of the {expected:,} that its last page needs; copy it again"
        )
    return meta


def _meta(descriptor: int, offset: int) -> Meta | None:
    data = os.pread(descriptor, _META.size, offset)
    meta = Meta(*_META.unpack(data)) if len(data) == _META.size else None
    return meta if meta is not None and meta.magic == _MAGIC else None


def verify(path: Path, meta: Meta) -> None:
    """Read every branch and leaf page once. Raises DataError unless all that they point to lies inside the file.

    Values themselves are not read.
    """
    entries = 0
    left = meta.last_page + 1  # pages that may still be visited: a tree has no page twice
    stack = [] if meta.root == _EMPTY else [(meta.root, 1)]
    try:
        with open_regular(path) as file:
            while stack:
                number, depth = stack.pop()
                left -= 1
                if left < 0 or depth > _MAX_DEPTH or number > meta.last_page:
                    raise ValueError(f"page {number:,} of {meta.last_page + 1:,} is in its tree of pages")
                page = os.pread(file.fileno(), meta.page_size, number * meta.page_size)
                children, values = _content(page, number, meta)
                stack += [(child, depth + 1) for child in children]
                entries += values
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:
        raise DataError(f"{path} is damaged: {error}; copy it again") from error
    if entries != meta.entries:
        raise DataError(f"{path} is damaged: it has {entries:,} values, not {meta.entries:,}; copy it again")


def _content(page: bytes, number: int, meta: Meta) -> tuple[list[int], int]:
    """Return the pages below a branch page, or the number of values of a leaf. Raises ValueError if it is damaged."""
    own_number, kind, table_end, nodes_begin = _HEADER.unpack_from(page)
    if own_number != number or kind not in (_BRANCH, _LEAF):
        raise ValueError(f"page {number:,} is no page of its tree")
    count = (table_end - _HEADER.size) // 2
    if table_end % 2 or not _HEADER.size <= table_end <= nodes_begin <= meta.page_size or count < kind % 2 + 1:
        raise ValueError(f"page {number:,} has no table of nodes")
    offsets = struct.unpack_from(f"<{count}H", page, _HEADER.size)
    if min(offsets) < nodes_begin:
        raise ValueError(f"page {number:,} has a node in its table of nodes")
    nodes = [(offset, *_NODE.unpack_from(page, offset)) for offset in offsets]
    ends = [offset + _NODE.size + key for offset, _, _, key in nodes]
    if kind == _BRANCH:
        if max(ends) > meta.page_size:
            raise ValueError(f"page {number:,} has a key that ends beyond it")
        return [low | high << 32 for _, low, high, _ in nodes], 0
    for (_, size, flags, _), end in zip(nodes, ends, strict=True):
        if flags not in (0, _ELSEWHERE):
            raise ValueError(f"page {number:,} holds a database of its own, or several values of a key")
        if end + (8 if flags else size) > meta.page_size:
            raise ValueError(f"page {number:,} has a value that ends beyond it")
        if flags:
            first = int.from_bytes(page[end : end + 8], "little")
            if first + -(-(_HEADER.size + size) // meta.page_size) > meta.last_page + 1:
                raise ValueError(f"page {number:,} has a value beyond the end of the file")
    return [], count
