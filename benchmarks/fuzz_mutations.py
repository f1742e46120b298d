"""Damage to files, drawn from a seed: bits, cuts, forged values with checksums that fit, and things that are no files.

`damage` changes a file in place and says how. Nothing outside the file's directory is written: what a link leads to is
in the same directory, or does not exist, or is /dev/zero, which is only read.
"""

import hashlib
import io
import json
import os
import random
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Draw = random.Random
Changed = tuple[bytes, str]
Forger = Callable[[Draw, bytes], Changed]
SPARSE_BYTES = 4 * 2**30
BOMB_BYTES = 640 * 2**20  # unpacked; packed it takes less than a megabyte
_HERE = "@@HERE@@"
_DEEP = 100_000
# JSON that takes the place of a value.
_VALUES = (
    "null", "true", "0", "-1", "1", "2", "1.5", "-0.0", "1e-320", "1e999", "NaN", "-Infinity", "65536", "2147483648",
    "9223372036854775808", "9" * 400, "-" + "9" * 400, "1" + "0" * 5000, '""', '"x"', '"none"', '"\\ud800"',
    '"\\u0000"',
    '"\\u001b[31m\\r\\nred"', '"/dev/zero"', '"../../run"', '"' + "x" * 100_000 + '"', "[]", "{}", "[null]", "[{}]",
    '{"x": 1}', "[" + "0," * 200_000 + "0]", "[" * 60 + "]" * 60, "[" * _DEEP + "]" * _DEEP,
    '{"a":' * 5000 + "1" + "}" * 5000,
)  # fmt: skip


def damage(draw: Draw, path: Path, others: list[Path], *, written: bool, content_only: bool) -> str:
    """Damage the file `path` and return what was done.

    `others`: files of the same tree. `written`: a command may open it for writing, so that it becomes no link to a
    device. `content_only`: it stays a regular file.
    """
    if content_only or draw.random() < 0.72:
        data, what = changed(draw, path.read_bytes(), path.name)
        path.write_bytes(data)
        return what
    return _replaced(draw, path, others, written)


def _replaced(draw: Draw, path: Path, others: list[Path], written: bool) -> str:
    kinds = ["a pipe", "a directory", "a broken link", "a link to itself", "empty", "missing", "another file", "sparse"]
    kind = draw.choice(kinds if written else [*kinds, "a link to /dev/zero"])
    if kind == "sparse":
        os.truncate(path, SPARSE_BYTES)
        return f"grown to {SPARSE_BYTES} bytes, sparse"
    data = path.read_bytes()
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
        (path / "x").write_bytes(data)
    elif kind == "a broken link":
        path.symlink_to(path.with_name("nowhere"))
    elif kind.startswith("a link"):
        path.symlink_to(path if kind == "a link to itself" else "/dev/zero")
    elif kind == "empty":
        path.touch()
    elif kind == "another file":
        other = draw.choice(others)
        path.write_bytes(other.read_bytes())
        return f"replaced by a copy of {other.name}"
    return f"replaced: {kind}"


def changed(draw: Draw, data: bytes, name: str) -> Changed:
    """Return the content with one change, and what that was. Half of the changes know the format of the file."""
    forge = _FORGERS.get(Path(name).suffix)
    if forge is not None and draw.random() < 0.5:
        try:
            return forge(draw, data)
        except (ValueError, KeyError, IndexError, struct.error, tarfile.TarError, zipfile.BadZipFile):
            pass  # the file is of another kind than its name says
    return draw.choice(_BYTES)(draw, data)


# Bytes


def _place(draw: Draw, data: bytes) -> int:
    """A place in the data, often near its beginning or its end, where headers are."""
    near = min(len(data), 512)
    return draw.choice((draw.randrange(len(data)), draw.randrange(near), len(data) - 1 - draw.randrange(near)))


def _bits(draw: Draw, data: bytes) -> Changed:
    array = bytearray(data or b"\0")
    places = [(_place(draw, array), draw.randrange(8)) for _ in range(draw.randint(1, 8))]
    for place, bit in places:
        array[place] ^= 1 << bit
    return bytes(array), f"bits flipped: {places}"


def _set(draw: Draw, data: bytes) -> Changed:
    array = bytearray(data or b"\0")
    numbers = b"\0\x7f\x80\xff" + draw.randbytes(1)
    places = [(_place(draw, array), draw.choice(numbers)) for _ in range(draw.randint(1, 8))]
    for place, value in places:
        array[place] = value
    return bytes(array), f"bytes set: {places}"


def _cut(draw: Draw, data: bytes) -> Changed:
    length = draw.choice((draw.randint(0, len(data)), draw.randint(0, min(len(data), 64)), max(0, len(data) - 1)))
    return data[:length], f"cut to {length} of {len(data)} bytes"


def _appended(draw: Draw, data: bytes) -> Changed:
    more = draw.randbytes(draw.randint(1, 4096))
    return data + more, f"{len(more)} bytes appended"


def _range(draw: Draw, data: bytes) -> Changed:
    start = _place(draw, data or b"\0")
    length = draw.randint(1, draw.choice((8, 64, 4096)))
    fill = draw.choice((b"\0" * length, b"\xff" * length, draw.randbytes(length)))
    return data[:start] + fill + data[start + length :], f"{length} bytes at {start} overwritten, {fill[:4]!r}.."


def _moved(draw: Draw, data: bytes) -> Changed:
    start, end = sorted((_place(draw, data or b"\0"), _place(draw, data or b"\0")))
    if draw.random() < 0.5:
        return data[:start] + data[end:], f"bytes {start} to {end} left out"
    return data[:end] + data[start:], f"bytes {start} to {end} repeated"


_BYTES: tuple[Forger, ...] = (_bits, _set, _cut, _appended, _range, _moved)

# JSON


def forged_json(draw: Draw, data: bytes) -> Changed:
    """Return valid JSON, or nearly so, with another value or key somewhere."""
    document = json.loads(data)
    holders = [node for node in _nodes(document) if node]
    if not holders or draw.random() < 0.04:
        raw = draw.choice(_VALUES)
        return raw.encode(), f"the document is {raw[:40]}"
    holder = draw.choice(holders)
    key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    how = draw.choice(("value", "value", "value", "value", "near", "near", "missing", "unknown", "twice", "swapped"))
    value, raw = holder[key], ""
    if how == "missing":
        del holder[key]
    elif how == "unknown" and isinstance(holder, dict):
        holder[draw.choice(("x", "", "\x1b[31m", "x" * 70_000, "__class__"))] = value
    elif how == "twice" and isinstance(holder, dict):
        holder[key], raw = _HERE, f"{json.dumps(value)}, {json.dumps(key)}: {json.dumps(value)}"
    elif how == "swapped":
        other = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    else:
        holder[key], raw = _HERE, _near(draw, value) if how == "near" else draw.choice(_VALUES)
    text = json.dumps(document).replace(f'"{_HERE}"', raw)
    return text.encode(), f"{how} of {str(key)[:40]!r}: {raw[:40]}"


def _nodes(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, (dict, list)) else []
    return own + [node for child in children for node in _nodes(child)]


def _near(draw: Draw, value: Any) -> str:
    """A value of the same type, as a forger would choose it."""
    if isinstance(value, bool):
        return json.dumps(not value)
    if isinstance(value, int):
        return str(draw.choice((value + 1, value - 1, -value, 3 * value, value ^ 1 << draw.randrange(12), 2**31 - 1)))
    if isinstance(value, float):
        return json.dumps(draw.choice((-value, value * 1e-30, value * 1e30, value + 1, 0.0)))
    if isinstance(value, str):
        return json.dumps(draw.choice((value[:-1], value + "x", value.upper(), value[::-1], "\n" + value, value * 50)))
    return json.dumps([value, value])


def _json_lines(draw: Draw, data: bytes) -> Changed:
    lines = data.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    line, what = forged_json(draw, lines[number])
    lines[number] = line + b"\n"
    return b"".join(lines), f"line {number + 1}: {what}"


def _text(draw: Draw, data: bytes) -> Changed:
    """Text with characters that its readers treat specially, or with another number."""
    numbers = list(re.finditer(rb"\d+", data))
    if numbers and draw.random() < 0.5:
        start, end = draw.choice(numbers).span()
        put = draw.choice((b"0", b"-1", b"9" * 400, b"1" + b"0" * 5000, b"4294967296", b"1.5", b"", b"nan"))
    else:
        start = end = draw.randint(0, len(data))
        special = (b'"', b"\0", b"\r", b"\n", b",", b"\xff\xfe", b"\x1b[31m", b"-", b"../")
        put = draw.choice((*special, b"x" * 200_000, b",\n" * 1000))
    return data[:start] + put + data[end:], f"{put[:20]!r} put in at {start}, in place of {end - start} bytes"


# Arrays


def _npy(draw: Draw, data: bytes) -> Changed:
    """A header that promises another shape or type than the data have."""
    array = np.load(io.BytesIO(data), allow_pickle=False)
    shape, descr = list(array.shape), array.dtype.str
    how = draw.choice(("shape", "shape", "type", "type", "order", "values", "long"))
    if how == "shape":
        shape = draw.choice((
            [2**40, *shape[1:]], [2**31, 2**31, 2**31], [-1], [0, *shape[1:]], [2, *shape], shape[1:], [], [1] * 40,
            [2**70], shape[::-1], [*shape, 1],
        ))  # fmt: skip
    elif how == "type":
        descr = draw.choice(("|O", "<f8", "<c16", "<M8[ns]", "|V0", "|S0", "<U1000", "|b1", "<i8", ">u8", "<f2", "|u1"))
    elif how == "values":
        values = array.copy()
        if values.size and values.dtype.kind in "iuf":
            limits = np.iinfo(values.dtype) if values.dtype.kind in "iu" else None
            extremes = [limits.max, limits.min, 0] if limits else [np.nan, np.inf, -3e38, 0.0, -1.0]
            values.reshape(-1)[draw.randrange(values.size)] = draw.choice(extremes)
        file = io.BytesIO()
        np.save(file, values)
        return file.getvalue(), "an extreme value"
    shown = tuple(shape) if how != "long" else "(" * 20_000
    header = f"{{'descr': '{descr}', 'fortran_order': {how == 'order'}, 'shape': {shown}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) & 0xFFFF)
    return start + header + array.tobytes(), f"forged header: {how}, {descr} {str(shown)[:60]}"


def _zip(draw: Draw, data: bytes) -> Changed:
    """An archive with a changed member, whose CRC fits."""
    warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    number = draw.randrange(len(members))
    info, content = members[number]
    name, method, what = info.filename, info.compress_type, ""
    how = draw.choice(
        ("content", "content", "content", "content", "bomb", "name", "missing", "twice", "method", "size")
    )
    if how == "content":
        content, what = changed(draw, content, name)
    elif how == "name":
        name = draw.choice(("../x.png", "/x.png", "x\x1b[31m.png", "", "a/" * 3000 + "x.png", name.upper(), ".hidden"))
    elif how == "method":
        method = draw.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i, (other, kept) in enumerate(members):
            if i != number:
                archive.writestr(other, kept)
            elif how == "bomb":
                _bomb(archive, name, content)
            elif how != "missing":
                for _ in range(2 if how == "twice" else 1):
                    archive.writestr(name, content, compress_type=method)
    result = file.getvalue()
    if how == "size":  # in the central directory, which readers trust
        place = result.rindex(b"PK\1\2") + draw.choice((20, 24))
        size = draw.choice((0, 2**31, 2**32 - 1, 2**32 - 2))
        result = result[:place] + struct.pack("<I", size) + result[place + 4 :]
    return result, f"member {name[:40]!r}: {how} {what}"


def _bomb(archive: zipfile.ZipFile, name: str, begin: bytes) -> None:
    """A member that begins as another one and unpacks to 640 MiB of zeros."""
    info = zipfile.ZipInfo(name)
    info.compress_type, info._compresslevel = zipfile.ZIP_DEFLATED, 1  # type: ignore[attr-defined]
    with archive.open(info, "w", force_zip64=True) as opened:
        opened.write(begin)
        for _ in range(BOMB_BYTES // 2**24):
            opened.write(bytes(2**24))


# Other formats, with checksums that fit


def _safetensors(draw: Draw, data: bytes) -> Changed:
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.3:  # numbers of a tensor
        body = bytearray(data[8 + length :])
        start = draw.randrange(max(1, len(body) // 4)) * 4
        body[start : start + 4] = struct.pack("<f", draw.choice((float("nan"), float("inf"), 3e38, -1e-45, 0.0)))
        return data[: 8 + length] + body, f"another number at byte {start}"
    header, what = forged_json(draw, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :], f"header: {what}"


def _fdz(draw: Draw, data: bytes) -> Changed:
    length = int.from_bytes(data[8:12], "little")
    header, body = zlib.decompress(data[12 : 12 + length]), data[12 + length : -32]
    what = "body"
    if draw.random() < 0.7:
        header, what = forged_json(draw, header)
    else:
        body, what = draw.choice(_BYTES)(draw, body)
    packed = zlib.compress(header)
    result = data[:8] + len(packed).to_bytes(4, "little") + packed + body
    return result + hashlib.sha256(result).digest(), f"sealed again, {what}"


def _fdpack(draw: Draw, data: bytes) -> Changed:
    """Another description, index or image, with every checksum but the images' own made to fit."""
    trailer = struct.Struct("<QQ32s32s8s")
    start, length, _, _, magic = trailer.unpack(data[-trailer.size :])
    said = json.loads(data[start : start + length])
    first = start - said["count"] * (16 + 8 * said["labels"])
    images, index, text = data[:first], data[first:start], data[start : start + length]
    part = draw.choice(("description", "description", "index", "images"))
    if part == "description":
        text, what = forged_json(draw, text)
    elif part == "index":
        index, what = draw.choice((_bits, _set, _range))(draw, index)
        index = index[: start - first]
        text = text.replace(said["index_sha256"].encode(), hashlib.sha256(index).hexdigest().encode())
    else:
        images, what = draw.choice((_bits, _set))(draw, images)
    body = images + index + text
    ends = len(images + index), len(text), hashlib.sha256(text).digest(), hashlib.sha256(body).digest(), magic
    return body + trailer.pack(*ends), f"sealed again, {part}: {what}"


def _png(draw: Draw, data: bytes) -> Changed:
    """Another chunk, with a CRC that fits."""
    chunks, place = [], 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + length]])
        place += length + 12
    chunk = chunks[draw.choice((0, draw.randrange(len(chunks))))]
    if chunk[0] == b"IHDR":
        field = draw.randrange(4)
        size = struct.pack(">I", draw.choice((0, 1, 9, 7000, 2**16, 2**31 - 1, 2**32 - 1)))
        chunk[1] = (
            [size + chunk[1][4:], chunk[1][:4] + size + chunk[1][8:]][field % 2]
            if field < 3
            else _set(draw, chunk[1])[0]
        )
    elif draw.random() < 0.2:
        bomb = zlib.compress(bytes(2**26), 9)
        chunks.insert(1, draw.choice(([b"zTXt", b"x\0\0" + bomb], [b"iCCP", b"x\0\0" + bomb], [b"IDAT", bomb])))
    else:
        chunk[1] = draw.choice(_BYTES)(draw, chunk[1])[0]
    parts = (
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big") for kind, body in chunks
    )
    return data[:8] + b"".join(parts), f"chunk {chunk[0]!r} with a CRC that fits"


def _tar(draw: Draw, data: bytes) -> Changed:
    """Another content or header of a member, with a checksum that fits."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(info, archive.extractfile(info).read()) for info in archive if info.isreg()]  # type: ignore[union-attr]
    number, file = draw.randrange(len(members)), io.BytesIO()
    how = draw.choice(("content", "content", "name", "type", "pax"))
    what = ""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for i, (info, content) in enumerate(members):
            if i == number and how == "content":
                content, what = changed(draw, content, info.name)
                info.size = len(content)
            elif i == number and how == "name":
                info.name = draw.choice(
                    ("../x.png", "/x.png", "x\x1b[31m.png", "a/" * 2000 + "x.png", "x" * 5000, "\udcff.png")
                )
            elif i == number and how == "type":
                info.type = draw.choice(
                    (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE)
                )
                info.linkname = "/dev/zero"
            elif i == number:
                info.pax_headers = {
                    draw.choice(
                        ("size", "path", "GNU.sparse.map", "GNU.sparse.size", "mtime", "hdrcharset")
                    ): draw.choice(("-1", "9" * 400, "x", "", "1,2,3", str(2**62)))
                }
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue(), f"member {number}: {how} {what}"


_FORGERS: dict[str, Forger] = {
    ".json": forged_json, ".jsonl": _json_lines, ".csv": _text, ".cls": _text,
    ".lock": _text, ".sha256": _text, ".npy": _npy, ".npz": _zip, ".pth": _zip, ".zip": _zip,
    ".tar": _tar, ".png": _png, ".safetensors": _safetensors, ".fdz": _fdz, ".fdpack": _fdpack,
}  # fmt: skip
