"""What killed processes leave is removed, what may be in use stays, and nothing that exists is lost."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastddpm.errors import StorageError, UsageError
from fastddpm.storage import files
from fastddpm.storage.files import check_out, open_to_append, set_aside, sweep, temporary_beside, write_whole
from fastddpm.storage.locks import locked


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(pid: int, path: Path, host: str | None = None, ending: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{host or files.host()}.{pid}.{ending}")


def test_only_what_is_provably_dead_is_swept(tmp_path: Path, dead: int) -> None:
    gone = [left_by(dead, tmp_path / "x.npz"), left_by(dead, tmp_path / "folder")]
    kept = [
        temporary_beside(tmp_path / "mine"), left_by(os.getppid(), tmp_path / "alive"),
        left_by(dead, tmp_path / "x.npz", "elsewhere"), left_by(dead, tmp_path / "locked"), tmp_path / ".hidden.tmp",
        tmp_path / f".x.{files.host()}.{dead}.txt",
    ]  # fmt: skip
    for path in [gone[0], *kept]:
        path.write_bytes(b"half")
    gone[1].mkdir()
    (gone[1] / "inside").write_bytes(b"half")
    link = left_by(dead, tmp_path / "link")
    link.symlink_to(tmp_path / ".hidden.tmp")
    with left_by(dead, tmp_path / "locked").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, link])


def test_a_directory_that_a_dead_process_moved_aside_comes_back(tmp_path: Path, dead: int) -> None:
    """It was killed between the two renames of `move_into_place`: the only copy has the name of the old one."""
    only, older = left_by(dead, tmp_path / "only", ending="old"), left_by(dead, tmp_path / "newer", ending="old")
    for path in (only, older, tmp_path / "newer"):
        path.mkdir()
        (path / "content").write_text(path.name)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer", "only"]
    assert (tmp_path / "only" / "content").read_text() == only.name
    assert (tmp_path / "newer" / "content").read_text() == "newer"


def test_a_file_that_is_being_written_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by a process that cannot see the writer's process id, as in another container."""
    monkeypatch.setattr(files, "alive", lambda pid: False)

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"all of it")
        sweep(tmp_path)
        assert temporary.exists()

    write_whole(tmp_path / "x", write)
    assert (tmp_path / "x").read_bytes() == b"all of it" and len(list(tmp_path.iterdir())) == 1
    with files.whole_directory(tmp_path / "folder") as temporary:
        (temporary / "inside").write_text("1")
        sweep(tmp_path)
    assert (tmp_path / "folder" / "inside").read_text() == "1" and len(list(tmp_path.iterdir())) == 2


def test_commands_sweep_where_they_write(tmp_path: Path, dead: int) -> None:
    left_by(dead, tmp_path / "x.npz").write_bytes(b"half")
    check_out(tmp_path / "new")
    check_out(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_appended_to_is_set_aside(tmp_path: Path) -> None:
    said: list[str] = []
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "no" / "such")
    for name in ("pipe", "folder", "link", "pipe"):
        with open_to_append(tmp_path / name, said.append) as file:
            file.write("1\n")
        assert (tmp_path / name).read_text().startswith("1\n")
    assert [line.partition(" is no file")[0] for line in said] == [
        str(tmp_path / name) for name in ("pipe", "folder", "link")
    ]
    assert (tmp_path / "pipe.damaged").is_fifo() and (tmp_path / "folder.damaged").is_dir()
    assert (tmp_path / "pipe").read_text() == "1\n1\n"


def test_nothing_that_was_set_aside_is_overwritten(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "x").write_text(str(i))
        set_aside(tmp_path / "x")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "x.damaged": "0", "x.damaged-2": "1", "x.damaged-3": "2",
    }  # fmt: skip


def test_a_lock_names_its_holder_and_waits_if_asked(tmp_path: Path) -> None:
    path, waited = tmp_path / ".lock", []
    with locked(path, str):
        with (
            pytest.raises(UsageError, match=rf"process {os.getpid()} on "),
            locked(path, lambda who: f"taken by {who}"),
        ):
            pytest.fail("locked twice")
        child = os.fork()
        if child == 0:  # this process has the descriptor, too, which the lock belongs to
            os._exit(0)
        os.waitpid(child, 0)
    program = f"""
from pathlib import Path
from fastddpm.storage.locks import locked
with locked(Path({str(path)!r}), str):
    print("held", flush=True)
    input()
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == "held\n"

    def release() -> None:
        waited.append(1)
        assert other.stdin is not None
        other.stdin.close()

    with locked(path, str, on_wait=release):
        assert path.read_text().startswith(f"{os.getpid()} ")
    assert waited == [1] and other.wait() != -1
    other.stdout.close()


def test_a_pipe_in_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with (
        pytest.raises(StorageError, match=r"\.lock in it is not a regular file; remove it"),
        locked(tmp_path / ".lock", str),
    ):
        pytest.fail("locked a pipe")
