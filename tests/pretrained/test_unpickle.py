"""Pickles from strangers: tensors only, in a child process with limits; whatever else is in them is not made."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.marks import slow

from fastddpm.errors import DataError, UsageError
from fastddpm.pretrained.foreign import unpickle
from fastddpm.pretrained.foreign.unpickle_child import collect, unpickled

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3)}


class Evil:
    """Runs a command when it is unpickled without restriction."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_pickle_runs_nothing_and_is_named(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "extra": Evil(tmp_path / "made")}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match=r"evil\.pt cannot be read: it asks for (posix|nt)\.system, which") as refused:
        unpickle.read(tmp_path / "evil.pt")
    assert "\n" not in str(refused.value) and not (tmp_path / "made").exists()


@pytest.mark.parametrize("zipped", [True, slow(False)])
def test_both_formats_of_torch_save_are_read_in_the_child(zipped: bool, tmp_path: Path) -> None:
    whole = {"ema": {"shadow": TENSORS}, "step": 7, "optimizer": {"state": {0: {"m": torch.zeros(2)}}}, "note": None}
    torch.save(whole, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    found = unpickle.read(tmp_path / "file.pt")
    assert found.values == {"step": 7}
    assert found.tensors.keys() == {"ema/shadow/a.weight", "ema/shadow/b"}
    assert all(torch.equal(found.tensors[f"ema/shadow/{name}"], tensor) for name, tensor in TENSORS.items())


@pytest.mark.slow
def test_a_file_that_unpacks_to_more_than_its_size_meets_the_limit_on_memory(tmp_path: Path) -> None:
    """1.6 GB of zeros, compressed in the zip that torch.save leaves uncompressed."""
    torch.save({"w": torch.zeros(3 * 2**27)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for name in whole.namelist():
            with whole.open(name) as source, bomb.open(name, "w", force_zip64=True) as target:
                while data := source.read(2**24):
                    target.write(data)
    (tmp_path / "whole.pt").unlink()
    assert (tmp_path / "bomb.pt").stat().st_size < 2**25
    with pytest.raises(DataError, match=r"takes more memory|at one of its limits|is damaged"):
        unpickle.read(tmp_path / "bomb.pt")


@pytest.mark.slow
def test_a_child_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(TENSORS, tmp_path / "file.pt")
    monkeypatch.setattr(unpickle, "_PROGRAM", "import time; time.sleep(600)")
    monkeypatch.setattr(unpickle, "_WAIT", 0.01)
    with pytest.raises(DataError, match=r"was not read within .* s"):
        unpickle.read(tmp_path / "file.pt")
    monkeypatch.setattr(unpickle, "_PROGRAM", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(unpickle, "_WAIT", 1)
    with pytest.raises(DataError, match="ended by signal 9, at one of its limits"):
        unpickle.read(tmp_path / "file.pt")


def test_what_is_no_file_is_said_before_a_child_is_started(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        unpickle.read(tmp_path / "nothing.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(DataError, match="not a regular file"):
        unpickle.read(tmp_path / "pipe.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "an object of list, not a dictionary"),
        ({"w": torch.zeros(1).expand(10**9)}, "'w' claims 1,000,000,000 elements"),
        ({"w": torch.eye(3).to_sparse()}, "'w' is no dense tensor"),
        ({"a/b": torch.zeros(1), "a": {"b": torch.zeros(1)}}, "two tensors called 'a/b'"),
    ],
)
def test_what_is_no_dictionary_of_dense_tensors_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(value)


def test_an_endless_nest_of_dictionaries_ends() -> None:
    nest: dict[str, Any] = {"w": torch.zeros(1)}
    nest["again"] = nest
    tensors, _ = collect(nest)
    assert len(tensors) == 8 and min(tensors, key=len) == "w"


def test_objects_are_refused_by_the_restricted_unpickler(tmp_path: Path) -> None:
    """In this process; the child does the same."""
    for name, data in {
        "module.pt": {"net": torch.nn.Linear(1, 1)}, "ordered.pt": OrderedDict(TENSORS)
    }.items():  # fmt: skip
        torch.save(data, tmp_path / name)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": Evil(tmp_path / "made")}, protocol=2))
    assert unpickled(str(tmp_path / "ordered.pt")).keys() == TENSORS.keys()
    for name in ("module.pt", "plain.pkl"):
        with pytest.raises(pickle.UnpicklingError):
            unpickled(str(tmp_path / name))
    assert not (tmp_path / "made").exists()
    text = unpickle._explained("UnpicklingError: class torch_utils.persistence._reconstruct_persistent_obj")
    assert "EDM has another network" in text and "generate.py" in text
