"""Runs that the commands' tests start from."""

from pathlib import Path


def trained(path: Path, *more: str) -> Path:
    from fastddpm import train

    train.main([
        "--preset", "mnist", "--out", str(path), "--steps", "1", "--batch", "2", "--width", "8", "--groups", "4",
        "--multipliers", "1", "--attention-resolutions", "8", "--sample.count", "0", "--device", "cpu", *more,
    ])  # fmt: skip
    return path
