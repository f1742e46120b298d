"""A small checkpoint to damage, and what hostile authors do to one."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from fastddpm.storage import checkpoint

DOCUMENTS = {"config": {"width": 128, "lr": 2e-4, "name": "é"}, "state": [1, None, True, 0.1, "x"]}


def some_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": {"w": torch.randn(5, 7, generator=generator), "b": torch.randn(3, generator=generator)},
        "ema": {"w": torch.randn(5, 7, generator=generator).bfloat16(), "count": torch.tensor(2**53 + 1)},
    }


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def reseal(path: Path) -> None:
    """Give a tampered checkpoint a manifest that fits, as a hostile author would."""
    names = [p.name for p in path.iterdir() if not p.name.startswith("manifest")]
    files = {
        name: {"size": (path / name).stat().st_size, "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in names
    }
    write_manifest(path, json.dumps({"version": 1, "step": 1, "files": files}).encode())


def write_manifest(path: Path, data: bytes) -> None:
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "run", 1, some_tensors(), DOCUMENTS, keep=1)
