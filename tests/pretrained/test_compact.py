"""A model in one file, and the one that comes with the package: its images, and every command on it."""

import dataclasses
import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.runs import trained

import fastddpm
from fastddpm.errors import DataError, UsageError
from fastddpm.pretrained import compact
from fastddpm.sampling.images import to_uint8
from fastddpm.storage import checkpoint

GOLDEN = Path(__file__).parent / "golden" / "digits.npz"


def test_the_digits_model_draws_the_images_that_are_kept() -> None:
    """Seeds 0 to 3 in 10 steps: other instructions may move a pixel by one level."""
    model = fastddpm.load("digits")
    config = model.preset.sample
    images = fastddpm.Sampler(model.unet, model.diffusion, 10, guidance=config.guidance).sample(range(4))
    with np.load(GOLDEN) as kept:
        expected = kept["images"].astype(int)
    assert expected.shape == (4, 1, 16, 16) and expected.std() > 60  # digits, not noise and not empty
    assert np.abs(to_uint8(images).astype(int) - expected).max() <= 1


def test_drawing_does_not_import_the_compiler(tmp_path: Path) -> None:
    """torch.compile's modules take seconds to import, and drawing uses none of them."""
    arguments = ["digits", "--seeds", "0", "--steps", "1", "--out", str(tmp_path / "one")]
    program = f"import sys; from fastddpm.sample import main; main({arguments}); print('torch._dynamo' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "one" / "samples.png").is_file() and out.splitlines()[-1] == "False"


def test_the_digits_model_is_small_and_tells_how_it_was_made() -> None:
    data = compact.DIGITS.read_bytes()
    assert len(data) < 2**21
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["fastddpm"])
    (start,) = header["recipe"]
    assert start["command"] == ["python", "-m", "fastddpm.train"] and start["data"]["name"] == "digits"
    assert {"torch", "numpy"} <= start["libraries"].keys() and len(header["weights_sha256"]) == 64
    of_command = fastddpm.preset("mnist")
    steps = header["preset"]["sample"]["steps"]
    sample = dataclasses.replace(of_command.sample, steps=steps)
    model = fastddpm.load("digits")
    assert model.preset == dataclasses.replace(of_command, sample=sample) and model.steps == 1000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def packed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "model.safetensors"
    importlib.import_module("fastddpm.pretrained.__main__").main([str(run), str(path), "--steps", "7"])
    size, checksum = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    assert capsys.readouterr().out == f"{path}: {size:,} bytes, sha256 {checksum}\n"
    return path


def test_a_packed_model_is_the_runs_rounded_once(run: Path, packed: Path) -> None:
    expected, found = fastddpm.load(run), fastddpm.load(packed)
    assert found.preset.sample.steps == 7 and found.preset.unet == expected.preset.unet and found.steps == 1
    for name, tensor in expected.unet.state_dict().items():
        ours = found.unet.state_dict()[name]
        assert ours.dtype == torch.float32 and torch.equal(ours, tensor.to(torch.float16).float()), name
    assert not found.unet.training and fastddpm.pretrained.read_preset(packed) == found.preset


def test_a_value_that_float16_cannot_hold_is_refused(run: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(run)
    saved.tensors["model"]["conv_out.bias"][0] = 7e4
    path = checkpoint.save(tmp_path / "run", 1, saved.tensors, saved.documents, keep=1)
    with pytest.raises(DataError, match=r"float16 cannot hold the values of conv_out\.bias, which reach 70000"):
        compact.pack(path, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def rewritten(path: Path, **changes: Any) -> None:
    """The file with another header, or with other tensors."""
    data = path.read_bytes()
    tensors = safetensors.torch.load(data)
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["fastddpm"])
    header |= {name: value for name, value in changes.items() if name in header}
    if "width" in changes:
        header["preset"]["unet"]["width"] = changes["width"]
    if changes.get("drop"):
        tensors.pop(changes["drop"])
    path.write_bytes(safetensors.torch.save(tensors, metadata={changes.get("key", "fastddpm"): json.dumps(header)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "other"}, "holds no model of fastddpm: its header has no configuration"),
        ({"format": 2}, "holds a model in a format that this version does not read; it reads 1"),
        ({"steps": "many"}, "steps must be an integer, 0 or more; got 'many'"),
        ({"preset": {"name": "x", "unet": 3}}, r"preset\.unet must be an object; got int"),
        ({"width": 16}, r"the weights do not fit the network of its configuration: time1\.weight is \(32, 8\)"),
        ({"drop": "conv_in.bias"}, r"configuration: conv_in\.bias is missing"),
    ],
)
def test_a_damaged_file_is_one_message(packed: Path, changes: dict[str, Any], message: str) -> None:
    rewritten(packed, **changes)
    with pytest.raises(DataError, match=message):
        fastddpm.load(packed)


def test_what_is_no_such_file_is_one_message(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*absent\.safetensors"):
        fastddpm.load(tmp_path / "absent.safetensors")
    packed.write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"model\.safetensors has .* bytes; by its header it should have"):
        fastddpm.load(packed)
    with pytest.raises(UsageError, match=r"name a \.safetensors file to write; got model"):
        importlib.import_module("fastddpm.pretrained.__main__").main([str(tmp_path), "model"])


def test_a_path_of_the_same_name_is_not_taken_by_surprise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").symlink_to(run)
    message = "digits is both the model that comes with fastddpm and a path here. For the path write /.*/digits"
    for work in (lambda: fastddpm.load("digits"), lambda: main("sample", "digits", "--seeds", "0")):
        with pytest.raises(UsageError, match=message):
            work()
    assert fastddpm.load("./digits").steps == fastddpm.load(tmp_path / "digits").steps == 1


def main(command: str, *arguments: str) -> None:
    importlib.import_module(f"fastddpm.{command}").main(arguments)


@pytest.mark.slow
def test_every_command_takes_the_digits_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results go to runs/digits of the current directory, never into the package."""
    before = sorted(compact.DIGITS.parent.rglob("*[!c]"))
    monkeypatch.chdir(tmp_path)
    main("sample", "digits", "--seeds", "0-1", "--steps", "2")
    main("inpaint", "digits", "--pick", "0", "--seeds", "0", "--steps", "2", "--resamplings", "1", "--frames", "0")
    main("compress", "encode", "digits", "digits", "two.fdz", "--count", "2", "--steps", "2")
    main("compress", "decode", "digits", "two.fdz", "two.npz")
    main(
        "evaluate",
        "digits",
        "--metrics",
        "none",
        "--pictures",
        "progressive",
        "--picture.rows",
        "1",
        "--steps",
        "2",
        "--batch",
        "2",
    )
    results = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    expected = {"samples-0-1/samples.npz", "inpainting/inpainted.npz", "evaluation/metrics.json"}
    assert {f"runs/digits/{name}" for name in expected} | {"two.fdz", "two.npz"} <= results
    assert {path.partition("/")[0] for path in results} == {"runs", "two.fdz", "two.npz"}
    with np.load("two.npz") as decoded:
        digits = fastddpm.data.open_dataset(None, image_size=16, channels=1)
        np.testing.assert_array_equal(decoded["images"], digits.images[:2])
    assert sorted(compact.DIGITS.parent.rglob("*[!c]")) == before


def test_results_of_a_packed_file_lie_beside_it(packed: Path) -> None:
    main("sample", str(packed), "--seeds", "0-1", "--steps", "2")
    assert (packed.parent / "model" / "samples-0-1" / "samples.npz").exists()
