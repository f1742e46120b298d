"""Where the commands write: refused before the work if it cannot be, one line if it fails, any encoding and reader."""

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastddpm import ablation, compress, curves, evaluate, inpaint, sample, train
from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.presets import PRESETS, write_preset
from fastddpm.runtime import cli
from fastddpm.runtime.progress import log
from fastddpm.storage.files import check_out

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A directory that passes for a run until something in it is read: nothing may come so far."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("")
    (tmp_path / "a-file").write_text("")
    return str(tmp_path / "run")


@pytest.mark.parametrize("place", ["a-file", "a-file/below", "a-file/far/below"])
def test_an_output_that_cannot_be_is_refused_before_any_work(place: str, checkpoint: str, tmp_path: Path) -> None:
    out = str(tmp_path / place)
    commands = {
        sample: [checkpoint, "--out", out],
        evaluate: [checkpoint, "--out", out],
        inpaint: [checkpoint, "--out", out],
        ablation: ["--out", out],
        train: ["--out", out],
        compress: ["decode", checkpoint, "no-such-file.fdz", out],
    }
    for command, arguments in commands.items():
        with pytest.raises(StorageError, match="a-file is not a directory"):
            command.main(arguments)
    for arguments in (
        ["encode", checkpoint, "digits", f"{out}/x.fdz"],
        ["decode", checkpoint, "x.fdz", f"{out}/x.npz"],
    ):
        with pytest.raises(StorageError, match="a-file is not a directory"):
            compress.main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file", "run"]


def test_a_picture_of_curves_and_a_compressed_file_need_a_place(checkpoint: str, tmp_path: Path) -> None:
    log = '{"step": 2, "loss": 1.0}\n'
    (Path(checkpoint) / "log.jsonl").write_text(log)
    write_preset(PRESETS["mnist"], Path(checkpoint) / "config.json")
    with pytest.raises(StorageError, match="a-file is not a directory"):
        curves.main([checkpoint, "--out", str(tmp_path / "a-file" / "x.png")])
    with pytest.raises(UsageError, match="is a directory; name the file to write"):
        compress.main(["encode", checkpoint, "digits", checkpoint])


def test_check_out_makes_nothing_and_asks_for_permission(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "deep")
    check_out(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=r"cannot write into /proc/a/b: /proc cannot be written to"):
        check_out(Path("/proc/a/b"))
    with pytest.raises(StorageError, match="holds no NUL"):
        check_out(tmp_path / "a\0b")


def run(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command that raises `error`."""

    def main(arguments: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_faults_of_the_disk_and_of_memory_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code, message in [
        (PermissionError(errno.EACCES, "Permission denied", "somewhere/x"), 5, "somewhere/x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 5, "the output: No space left on device"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
            2,
            "not enough memory: CUDA out of memory. Tried",
        ),
        (MemoryError(), 2, "not enough memory: an allocation failed"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 2, "Take a smaller --batch"),
    ]:
        assert run(error, monkeypatch) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), OSError(errno.ENOENT, "No such file", "x"), KeyError(1)]
)
def test_what_is_no_users_mistake_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(arguments: Sequence[str]) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(type(error)):
        cli.run(main)


def printing(text: str, stdout: object, encoding: str) -> subprocess.CompletedProcess[bytes]:
    program = (
        f"import sys; sys.argv = ['x']; from fastddpm.runtime import cli; cli.run(lambda arguments: print({text!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": ""}
    return subprocess.run([sys.executable, "-c", program], env=environment, stdout=stdout, stderr=subprocess.PIPE)


def test_a_table_is_printed_whatever_the_encoding() -> None:
    done = printing("fixed \u03a3 \u00b1 1", subprocess.PIPE, "latin-1")
    assert (done.returncode, done.stdout) == (0, b"fixed \\u03a3 \xb1 1\n"), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is full is a Linux thing")
def test_an_output_that_is_full_is_told_once() -> None:
    with open("/dev/full", "wb") as full:
        done = printing("x", full, "utf-8")
    assert done.returncode == 5
    assert done.stderr == b"error: a file or the output: No space left on device\n"


def test_control_characters_from_a_file_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """They could clear the terminal or pass for other lines; letters of any language stay."""

    def main(arguments: Sequence[str]) -> None:
        log("class \x1b[31mrøv\r")
        raise DataError("\x1b[2J\0\ud800 of 月\nlisted: \x9b")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 3
    assert capsys.readouterr().err == "class \\x1b[31mrøv\\r\nerror: \\x1b[2J\\x00\\ud800 of 月\nlisted: \\x9b\n"
