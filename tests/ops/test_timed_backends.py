"""The table of the fastest backend of each operation and shape, with a made-up table and a made-up GPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastddpm.ops import backend, timed, use_backend


@pytest.fixture
def on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """CPU tensors count as those of a GPU, of sm_90."""
    path = tmp_path / "backends.json"
    monkeypatch.setattr(timed, "FILE", path)
    monkeypatch.setattr(timed, "chip", lambda device: "sm_90")
    monkeypatch.setattr(timed, "GPUS", ("cpu",))
    timed.table.cache_clear()
    yield path
    timed.table.cache_clear()


def chosen(**shapes: tuple[int, ...]) -> str:
    arguments = {"scale": 0.1, **{name: torch.empty(shape) for name, shape in shapes.items()}}
    return backend.implementation("attention", "cpu", arguments).__name__.rpartition(".")[2]


def test_the_timed_backend_is_taken_for_its_shape_alone(on_a_gpu: Path, implementation: str) -> None:
    on_a_gpu.write_text(json.dumps({"sm_90": {"attention": {
        "q 4x16x32 float32, k 4x16x32 float32, v 4x16x32 float32": "sdpa"}}}))  # fmt: skip
    with use_backend("auto"):
        ladder = chosen(q=(4, 8, 32), k=(4, 8, 32), v=(4, 8, 32))
        assert ladder != "sdpa"
        for n, expected in ((4, "sdpa"), (7, "sdpa"), (8, ladder), (3, ladder)):
            assert chosen(q=(n, 16, 32), k=(n, 16, 32), v=(n, 16, 32)) == expected
    with use_backend("reference"):  # what was asked for by name
        assert chosen(q=(4, 16, 32), k=(4, 16, 32), v=(4, 16, 32)) == "reference"


def test_a_backend_that_is_not_there_is_passed_over(on_a_gpu: Path, implementation: str) -> None:
    words = "q 4x16x32 float32, k 4x16x32 float32, v 4x16x32 float32"
    on_a_gpu.write_text(json.dumps({"sm_90": {"attention": {words: "vulkan"}}, "sm_80": {}}))
    with use_backend("auto"):
        assert chosen(q=(4, 16, 32), k=(4, 16, 32), v=(4, 16, 32)) != "vulkan"


def test_the_shipped_table_names_backends() -> None:
    for operations in json.loads(timed.FILE.read_text()).values():
        assert all(backend._exists(name, one) for name, shapes in operations.items() for one in shapes.values())
