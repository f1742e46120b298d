"""Checkpoints: exact, and never read when damaged or hostile."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.saved_checkpoint import DOCUMENTS, saved, snapshot, some_tensors

from fastddpm.errors import DataError, UsageError
from fastddpm.storage import checkpoint

__all__ = ["saved"]

# Round trip


def test_every_bit_survives(tmp_path: Path) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    flat = torch.randn(20)
    tied = torch.randn(4, 3)
    tensors = {
        "bits": {
            "bf16": bits.view(torch.bfloat16),  # every pattern, NaN payloads and subnormals included
            "fp16": bits.view(torch.float16),
            "fp32": torch.tensor([0x7FC12345, 1, -(2**31), 0x3F800001], dtype=torch.int32).view(torch.float32),
            "fp64": torch.tensor([0.1, -0.0, 5e-324], dtype=torch.float64),
            "int64": torch.tensor([2**63 - 1, -(2**63), 2**53 + 1]),
            "uint8": torch.arange(256, dtype=torch.uint8),
            "bool": torch.tensor([True, False]),
        },
        "shapes": {
            "scalar": torch.tensor(3),
            "empty": torch.empty(0, 4),
            "transposed": torch.randn(3, 5).t(),
            "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "expanded": torch.randn(1, 3).expand(4, 3),
            "first_half": flat[:10],
            "second_half": flat[10:],
            "overlapping": flat[5:15],
            "tied": tied,
            "tied_too": tied,
            "parameter": torch.nn.Parameter(torch.randn(2)),
        },
    }
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, tensors, DOCUMENTS, keep=1))
    assert loaded.tensors.keys() == tensors.keys()
    for part, content in tensors.items():
        assert loaded.tensors[part].keys() == content.keys()
        for name, tensor in content.items():
            read = loaded.tensors[part][name]
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.is_contiguous()
            expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(read.reshape(-1).view(torch.uint8), expected), name
    assert loaded.documents == DOCUMENTS
    assert (loaded.step, loaded.path) == (1, tmp_path / "checkpoints/step-00000001")
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.step = 2  # type: ignore[misc]


def test_loaded_tensors_are_writable_and_apart(saved: Path) -> None:
    first, second = checkpoint.load(saved), checkpoint.load(saved)
    before = second.tensors["weights"]["b"].clone()
    first.tensors["weights"]["w"].zero_()
    assert torch.equal(second.tensors["weights"]["b"], before)
    assert torch.equal(first.tensors["weights"]["b"], before)


def test_files_are_what_other_tools_expect(saved: Path) -> None:
    read = safetensors.torch.load_file(saved / "weights.safetensors")
    assert torch.equal(read["w"], some_tensors()["weights"]["w"])
    assert json.loads((saved / "config.json").read_text()) == DOCUMENTS["config"]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "manifest.sha256"], cwd=saved, check=True)
    listed = json.loads((saved / "manifest.json").read_text())["files"]
    assert listed.keys() | {"manifest.json", "manifest.sha256"} == {p.name for p in saved.iterdir()}
    for name, entry in listed.items():
        data = (saved / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_parts(saved: Path) -> None:
    (saved / "weights.safetensors").write_bytes(b"damaged")
    loaded = checkpoint.load(saved, parts=["ema"])
    assert loaded.tensors.keys() == {"ema"}
    assert torch.equal(loaded.tensors["ema"]["w"], some_tensors()["ema"]["w"])
    assert loaded.documents == DOCUMENTS
    assert checkpoint.load(saved, parts=()).tensors == {}
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        checkpoint.load(saved, parts=["ema", "weights"])
    with pytest.raises(UsageError, match="no part 'adam'; it has weights, ema"):
        checkpoint.load(saved, parts=["adam"])


# Which checkpoints there are


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_newest_is_loaded_and_only_the_newest_kept(tmp_path: Path) -> None:
    for step in (1, 2, 99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, some_tensors(step), {}, keep=2)
    assert steps(tmp_path) == ["step-100000000", "step-99999999"]
    loaded = checkpoint.load(tmp_path)
    assert loaded.step == 100_000_000
    assert torch.equal(loaded.tensors["weights"]["w"], some_tensors(100_000_000)["weights"]["w"])


def test_later_steps_are_never_pruned(tmp_path: Path) -> None:
    for step in (10, 20, 5, 6, 7):
        checkpoint.save(tmp_path, step, some_tensors(), {}, keep=2)
    assert steps(tmp_path) == ["step-00000006", "step-00000007", "step-00000010", "step-00000020"]


def test_same_step_is_replaced(tmp_path: Path) -> None:
    for seed in (1, 2):
        checkpoint.save(tmp_path, 3, some_tensors(seed), {"seed": seed}, keep=2)
    assert steps(tmp_path) == ["step-00000003"]
    loaded = checkpoint.load(tmp_path)
    assert loaded.documents == {"seed": 2}
    assert torch.equal(loaded.tensors["weights"]["w"], some_tensors(2)["weights"]["w"])


def test_a_step_caught_between_old_and_new_is_read(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, some_tensors(), {}, keep=3)
    path = checkpoint.save(tmp_path, 2, some_tensors(), {"old": True}, keep=3)
    path.rename(path.with_name("step-00000002.old"))
    assert checkpoint.load(tmp_path).documents == {"old": True}
    checkpoint.save(tmp_path, 2, some_tensors(), {"old": False}, keep=3)
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]
    assert checkpoint.load(tmp_path).documents == {"old": False}


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    directory = tmp_path / "checkpoints"
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (directory / f".tmp-00000001-{pid}").mkdir(parents=True)
        (directory / f".tmp-00000001-{pid}" / "ema.safetensors").write_bytes(b"half")
    with pytest.raises(UsageError, match="holds no checkpoint"):
        checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, 5, {}, {}, keep=1)
    assert steps(tmp_path) == [f".tmp-00000001-{os.getppid()}", "step-00000005"]


def test_absent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    for path, expected in [
        ("none", "does not exist"),
        ("a\0b", "does not exist"),
        ("x" * 300, "does not exist"),
        ("file", "is a file"),
        ("empty", "holds no checkpoint"),
        ("empty/checkpoints", "holds no checkpoint"),
    ]:
        with pytest.raises(UsageError, match=expected) as caught:
            checkpoint.load(tmp_path / path)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2
    assert checkpoint.load_newest(tmp_path / "none", pytest.fail) is None
    assert checkpoint.load_newest(tmp_path / "empty", pytest.fail) is None


@pytest.mark.parametrize(
    ("tensors", "documents", "step", "keep", "expected"),
    [
        ({"../x": {}}, {}, 1, 1, "'../x'"),
        ({}, {"a/b": 1}, 1, 1, "'a/b'"),
        ({}, {"": 1}, 1, 1, "''"),
        ({}, {"manifest": 1}, 1, 1, "manifest"),
        ({}, {}, -1, 1, "step"),
        ({}, {}, 10**12, 1, "step"),
        ({}, {}, 1, 0, "keep"),
        ({"ema": {"z": torch.zeros(2, dtype=torch.complex64)}}, {}, 1, 1, "'z' of dtype torch.complex64"),
        ({"ema": {"__metadata__": torch.zeros(2)}}, {}, 1, 1, "__metadata__"),
        ({"ema": {"deep": torch.zeros([1] * 9)}}, {}, 1, 1, "8 dimensions"),
        ({}, {"log": ["x" * 100] * 30_000}, 1, 1, "bytes of JSON"),
        ({}, {"log": {1: 0, "1": 0}}, 1, 1, "given twice"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    tmp_path: Path, tensors: Any, documents: Any, step: int, keep: int, expected: str
) -> None:
    with pytest.raises((UsageError, DataError), match=expected):
        checkpoint.save(tmp_path, step, tensors, documents, keep)
    assert snapshot(tmp_path) == {}


# Damage


@pytest.fixture
def no_parsing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a tensor or document is parsed; the manifest may be, once verified."""

    def parse(data: bytes, where: Path) -> Any:
        pytest.fail(f"{where} was parsed before everything was verified")

    monkeypatch.setattr(checkpoint, "parse_json", parse)
    monkeypatch.setattr(checkpoint, "parse_tensors", parse)


def damaged(saved: Path, file: Path) -> bool:
    """Whether loading fails, naming the file; a manifest's two files answer for each other."""
    try:
        checkpoint.load(saved)
    except DataError as error:
        return file.name in str(error) and str(saved) in str(error)
    return False


@pytest.mark.usefixtures("no_parsing")
def test_every_flipped_byte_is_detected(saved: Path) -> None:
    files = sorted(saved.iterdir())
    assert len(files) == 6
    draw = random.Random(5)
    detected = 0
    for _ in range(200):
        file = draw.choice(files)
        data = file.read_bytes()
        position = draw.randrange(len(data))
        file.write_bytes(data[:position] + bytes([data[position] ^ draw.randrange(1, 256)]) + data[position + 1 :])
        detected += damaged(saved, file)
        file.write_bytes(data)
    print(f"flipped bytes detected: {detected}/200")
    assert detected == 200


@pytest.mark.slow
@pytest.mark.usefixtures("no_parsing")
@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_every_bit_of_the_manifest_counts(saved: Path, name: str) -> None:
    file = saved / name
    data = file.read_bytes()
    missed = []
    for position in range(len(data)):
        for bit in (1, 0x20, 0x80):  # 0x20 turns a hexadecimal digit's case, which means the same
            file.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
            if not damaged(saved, file):
                missed.append((position, bit))
    assert missed == []


@pytest.mark.usefixtures("no_parsing")
def test_truncation_and_growth_are_detected(saved: Path) -> None:
    draw = random.Random(6)
    files = sorted(saved.iterdir())
    detected = 0
    for index in range(50):
        file = files[index % len(files)]
        data = file.read_bytes()
        file.write_bytes(data[: draw.randrange(len(data)) if index >= len(files) else 0])
        detected += damaged(saved, file)
        file.write_bytes(data)
    print(f"truncations detected: {detected}/50")
    data = files[1].read_bytes()
    files[1].write_bytes(data[:10])
    with pytest.raises(DataError, match=f"{files[1]} is damaged: it has 10 bytes, and {len(data)} were written"):
        checkpoint.load(saved)
    files[1].write_bytes(data)
    assert detected == 50
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data + b"\n")
        assert damaged(saved, file)
        file.write_bytes(data)


@pytest.mark.usefixtures("no_parsing")
def test_missing_swapped_and_extra_files_are_detected(saved: Path) -> None:
    files = sorted(saved.iterdir())
    for file in files:
        data = file.read_bytes()
        file.unlink()
        assert damaged(saved, file)
        os.mkfifo(file)
        assert damaged(saved, file)
        file.unlink()
        file.mkdir()
        assert damaged(saved, file)
        file.rmdir()
        file.write_bytes(data)
    for name in ("extra.safetensors", ".hidden", "extra.json"):
        (saved / name).write_bytes(b"")
        assert damaged(saved, saved / name)
        (saved / name).unlink()
    ema, weights = saved / "ema.safetensors", saved / "weights.safetensors"
    ema.rename(saved / "x"), weights.rename(ema), (saved / "x").rename(weights)
    assert damaged(saved, weights)


def test_a_renamed_checkpoint(saved: Path) -> None:
    free = saved.parents[2] / "my-model"
    shutil.copytree(saved, free)
    assert checkpoint.load(free).step == 1
    saved.rename(saved.with_name("step-00000009"))
    with pytest.raises(DataError, match="step-00000009 holds step 1"):
        checkpoint.load(saved.with_name("step-00000009"))


def test_the_previous_checkpoint_is_named_and_fallen_back_to(tmp_path: Path) -> None:
    first, second, third = (
        checkpoint.save(tmp_path, step, some_tensors(step), {"step": step}, keep=9) for step in (1, 2, 3)
    )
    (third / "ema.safetensors").write_bytes(b"")
    (second / "config.json").write_bytes(b"extra")
    with pytest.raises(DataError, match=f"{third}/ema.safetensors is damaged.*use the previous checkpoint, {second}"):
        checkpoint.load(tmp_path)
    warnings: list[str] = []
    newest = checkpoint.load_newest(tmp_path, warnings.append)
    assert newest is not None
    assert newest.path == first
    assert newest.documents == {"step": 1}
    assert torch.equal(newest.tensors["weights"]["w"], some_tensors(1)["weights"]["w"])
    assert len(warnings) == 2
    assert f"{third}/ema.safetensors" in warnings[0]
    assert f"{second}/config.json" in warnings[1]
    (first / "manifest.json").unlink()
    with pytest.raises(DataError, match="no earlier checkpoint"):
        checkpoint.load(first)
    with pytest.raises(DataError, match="every checkpoint in"):
        checkpoint.load_newest(tmp_path, warnings.append)


def test_unreadable_is_not_absent(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "iterdir", failing)
    with pytest.raises(DataError, match="checkpoints cannot be read: Input/output error"):
        checkpoint.load_newest(saved.parents[1], pytest.fail)
