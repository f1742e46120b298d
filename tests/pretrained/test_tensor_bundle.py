"""TensorFlow's checkpoints: CRC32C, the table, and damage in every byte."""

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
from helpers.foreign_files import write_bundle, write_index
from helpers.marks import instruction_sets, on_instruction_set

from fastddpm.errors import DataError, UsageError
from fastddpm.kernels import native
from fastddpm.pretrained.foreign import tensor_bundle
from fastddpm.pretrained.foreign.crc32c import by_numpy, crc32c, masked

# RFC 3720, B.4, and the check value of the catalogue of CRCs.
KNOWN = {
    bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C, b"123456789": 0xE3069283, b"": 0,
}  # fmt: skip


def bit_by_bit(data: bytes) -> int:
    """The definition: division by the polynomial, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("isa", [*instruction_sets(), "numpy"])
def test_crc32c(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa == "numpy":
        monkeypatch.setattr(native, "unavailable", lambda: "not built")
    elif native.unavailable():
        pytest.skip(str(native.unavailable()))
    with contextlib.nullcontext() if isa == "numpy" else on_instruction_set(isa):
        for data, expected in KNOWN.items():
            assert crc32c(data) == expected
        draw = random.Random(0)
        for size in (1, 3, 7, 8, 9, 511, 512, 513, 1024, 1025, 1537, 5000):
            data = draw.randbytes(size)
            assert crc32c(data) == bit_by_bit(data), size
        view = np.frombuffer(draw.randbytes(600), np.uint8)[3:]  # not aligned to words
        assert crc32c(view) == bit_by_bit(view.tobytes())


@pytest.mark.skipif(native.unavailable() is not None, reason="compares with the compiled library")
def test_crc32c_of_many_rows_by_numpy() -> None:
    data = np.random.default_rng(0).integers(0, 256, 5_000_001, dtype=np.uint8)
    assert by_numpy(data) == native.crc32c(data)


def test_the_mask_is_leveldbs() -> None:
    """Google's own test: masking is not idempotent, and undone by the inverse rotation."""
    crc = crc32c(b"foo")
    rotated = (masked(crc) - 0xA282EAD8) & 0xFFFFFFFF
    assert ((rotated >> 17 | rotated << 15) & 0xFFFFFFFF) == crc != masked(crc) != masked(masked(crc))


def variables(count: int = 30) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    arrays = {f"model/layer_{i}/W": draw.standard_normal((i % 3 + 1, 4)).astype(np.float32) for i in range(count)}
    return arrays | {"global_step": np.array(790_000), "model/scalar": np.float32([]).reshape(0, 3)}


@pytest.mark.parametrize("shards", [1, 3])
def test_every_variable_comes_back(shards: int, tmp_path: Path) -> None:
    arrays = variables()
    write_bundle(tmp_path / "model.ckpt-1", arrays, shards)
    bundle = tensor_bundle.open_bundle(tensor_bundle.find(tmp_path) or tmp_path)
    assert bundle.shards == shards and bundle.variables.keys() == arrays.keys()
    for name, array in tensor_bundle.read(bundle, list(arrays)).items():
        assert array.dtype == arrays[name].dtype and np.array_equal(array, arrays[name]), name


def test_a_directory_with_several_checkpoints_is_refused_with_their_names(tmp_path: Path) -> None:
    for number in (1, 2):
        write_bundle(tmp_path / f"model.ckpt-{number}", variables(2))
    with pytest.raises(UsageError, match=r"holds 2 TensorFlow checkpoints; name one: .*model\.ckpt-1, model\.ckpt-2"):
        tensor_bundle.find(tmp_path)
    assert tensor_bundle.find(tmp_path / "model.ckpt-2") == tmp_path / "model.ckpt-2"
    assert tensor_bundle.find(tmp_path / "model.ckpt-3") is None


def test_any_flipped_bit_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    """Of the index those in the handle of the empty table of filters and in the padding change nothing."""
    arrays = variables(6)
    prefix = tmp_path / "model.ckpt-1"
    write_bundle(prefix, arrays)
    draw = random.Random(1)
    for file, tries in ((tmp_path / "model.ckpt-1.index", 300), (tmp_path / "model.ckpt-1.data-00000-of-00001", 60)):
        whole = file.read_bytes()
        refused = 0
        for _ in range(tries):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            try:
                found = tensor_bundle.read(tensor_bundle.open_bundle(prefix), list(arrays))
                assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
            except DataError as error:
                refused += 1
                assert "\n" not in str(error)
        assert refused > 0.85 * tries
        file.write_bytes(whole)


def test_cut_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "model.ckpt-1"
    write_bundle(prefix, variables(6), shards=2)
    index, data = (tmp_path / f"model.ckpt-1.{end}" for end in ("index", "data-00001-of-00002"))
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    bundle = tensor_bundle.open_bundle(prefix)
    with pytest.raises(DataError, match=r"fewer than the variables that the index places in it|is cut"):
        tensor_bundle.read(bundle, list(bundle.variables))
    data.unlink()
    with pytest.raises(DataError, match=r"its file model\.ckpt-1\.data-00001-of-00002 is missing"):
        tensor_bundle.read(bundle, list(bundle.variables))
    with pytest.raises(DataError, match="lacks the variable model/nothing"):
        tensor_bundle.read(bundle, ["model/nothing"])
    for size in (0, 47, 60, len(index.read_bytes()) - 49):
        cut = index.read_bytes()[:size]
        (tmp_path / "cut.index").write_bytes(cut)
        with pytest.raises(DataError, match="not the index of a TensorFlow checkpoint"):
            tensor_bundle.open_bundle(tmp_path / "cut")
    with pytest.raises(UsageError, match="there is no TensorFlow checkpoint"):
        tensor_bundle.open_bundle(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (b"\x08\x01\x28\x90\x4e", "of shape .. should take 4 bytes"),  # float32, no shape, size 10,000
        (b"\x08\x07", "has TensorFlow's type number 7"),  # text
        (b"\x08\x01\x28\x04\x18\x05", "in number 5"),  # shard 5 of 1
        (b"\x08\x01\x28\x04\x3a\x00", "is partitioned"),
        (b"\x08\x01\x20\xff\xff\xff\xff\xff\xff\xff\xff\x7f\x28\x04", "outside of any file"),
        (b"\x08\x01\x12\x0c\x12\x0a\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "no shape"),
        (b"\x08\x01\x12\xff\x01", "a message is cut"),
        (b"\x0b", "of unknown kind"),
        (b"\x0a\x00", "text where a number belongs"),
    ],
)
def test_forged_entries_are_refused(entry: bytes, message: str, tmp_path: Path) -> None:
    """With checksums that fit."""
    write_index(tmp_path / "m", [(b"", b"\x08\x01"), (b"model/w", entry)])
    (tmp_path / "m.data-00000-of-00001").write_bytes(bytes(8))
    with pytest.raises(DataError, match=message):
        tensor_bundle.read(tensor_bundle.open_bundle(tmp_path / "m"), ["model/w"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\x08\x01\x10\x01", "big-endian"),
        (b"\x1a\x02\x10\x02", "reader of version 2"),
        (b"\x08\x80\x60", "12288 data"),
    ],
)
def test_headers_of_what_is_not_read_are_refused(header: bytes, message: str, tmp_path: Path) -> None:
    write_index(tmp_path / "m", [(b"", header)])
    with pytest.raises(DataError, match=message):
        tensor_bundle.open_bundle(tmp_path / "m")
