"""Images that cannot be used, each with the reason."""

import itertools
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
from helpers.image_folder import PIXELS, png
from PIL import Image


def huge_header() -> bytes:
    """A PNG of 65535 by 65535 pixels as far as its header says."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def listed(message: str) -> dict[str, str]:
    """The reason by image that a message about bad images gives, grouped or not; every group must count its images."""
    found: dict[str, str] = {}
    lines = message.splitlines()
    for i, line in enumerate(lines):
        group = re.fullmatch(r"  (\d+) images: (.*)", line)
        if group:
            inside = list(itertools.takewhile(lambda other: other.startswith("    "), lines[i + 1 :]))
            assert len(inside) == int(group[1])
            found |= {name: reason or group[2] for name, _, reason in (other[4:].partition(": ") for other in inside)}
        elif line.startswith("  ") and line[2] != " ":
            name, reason = line[2:].split(": ", 1)
            found[name] = reason
    return found


def spoil(root: Path) -> dict[str, str]:
    """Put every kind of bad image into `root`; returns a part of the reason for each."""
    transparent = Image.fromarray(PIXELS[0]).convert("RGBA")
    transparent.putpixel((0, 0), (1, 2, 3, 0))
    bad = {
        "0/empty.png": (b"", "the file is empty"),
        "0/text.png": (b"this is text", "not an image of a known format"),
        "0/cut.png": (png(PIXELS[0])[:-60], "damaged"),
        "0/cut.JPG": (png(PIXELS[0], "JPEG")[:-60], "damaged"),
        "1/cmyk.jpg": (png(Image.fromarray(PIXELS[0]).convert("CMYK"), "JPEG"), "CMYK"),
        "1/dot.png": (png(PIXELS[0, :1, :1]), "1x1, expected 8x8; --resize area crops and resizes"),
        "1/long.png": (png(np.zeros((10000, 1, 3), np.uint8)), "1x10000, expected 8x8"),
        "1/transparent.png": (png(transparent), "transparent"),
        "2/huge.png": (huge_header(), "64,000,000"),
        "2/pixmap.png": (png(PIXELS[0], "PPM"), "not an image of a known format"),
    }
    for name, (data, _) in bad.items():
        (root / name).write_bytes(data)
    reasons = {name: reason for name, (_, reason) in bad.items()}
    (root / "0" / "loop.png").symlink_to("loop.png")
    (root / "1" / "nowhere.png").symlink_to("does-not-exist.png")
    os.mkfifo(root / "2" / "pipe.png")
    (root / "2" / "locked.png").write_bytes(png(PIXELS[0]))
    return reasons | {
        "0/loop.png": "cannot be read: Too many levels of symbolic links",
        "1/nowhere.png": "cannot be read: No such file or directory",
        "2/pipe.png": "cannot be read: not a regular file",
        "2/locked.png": "cannot be read: Permission denied",
    }
