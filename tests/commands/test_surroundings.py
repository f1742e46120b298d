"""Surroundings that a command may meet: no home, no directory, few files, wrong variables. One line each."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.marks import slow

from fastddpm.errors import UsageError
from fastddpm.runtime import distributed
from fastddpm.runtime.options import parse_numbers

TRAIN = ["fastddpm.train", "--steps", "1", "--batch", "2", "--width", "8", "--groups", "4", "--multipliers", "1",
         "--sample.count", "0", "--device", "cpu"]  # fmt: skip


def python(
    *arguments: str,
    cwd: Path | None = None,
    before: Callable[[], object] | None = None,
    without: tuple[str, ...] = (),
) -> "subprocess.CompletedProcess[str]":
    """Run Python with this checkout's package; `before`: in the child; `without`: variables that it does not get."""
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(
        [sys.executable, *arguments], text=True, capture_output=True, cwd=cwd, preexec_fn=before,
        env=kept | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


def assert_one_message(done: "subprocess.CompletedProcess[str]", code: int, message: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x"}, "RANK = 'x'"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "got 1 of 1"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE = '-2'"),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK = 'a'"),
        ({"LOCAL_WORLD_SIZE": "9" * 5000}, "LOCAL_WORLD_SIZE = '999"),
        ({"RANK": "", "LOCAL_RANK": "1.5"}, "RANK = '', LOCAL_RANK = '1.5'"),
    ],
)
def test_wrong_variables_of_torchrun_are_named_together(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as refused:
        distributed.group_from_environment()
    assert message in str(refused.value) and "Start with torchrun, or unset these variables" in str(refused.value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "MASTER_ADDR (must name the host of rank 0) = 'nothing', MASTER_PORT (must be in 1..65535) = 'nothing'"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"}, "MASTER_PORT (must be in 1..65535) = 'port'"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "MASTER_PORT (must be in 1..65535) = '70000'"),
    ],
)
def test_processes_need_a_place_to_meet(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    group = distributed.ProcessGroup(0, 2)
    with pytest.raises(UsageError) as refused, distributed.process_group(group, timeout_s=5):
        pytest.fail("formed a group")
    assert message in str(refused.value)


def test_a_user_without_a_home_is_told_what_to_set() -> None:
    """As in a container that runs under an id that it does not know; the cache of data needs a directory."""
    if os.getuid():
        pytest.skip("only root can become a user without an entry")
    program = (
        "import os, pwd\n"
        "from fastddpm.data.cache import default_directory\n"
        "from fastddpm.errors import UsageError\n"
        "os.setuid(12345)\n"
        "try: default_directory()\n"
        "except UsageError as error: print(error)"
    )
    done = python("-c", program, without=("HOME", "XDG_CACHE_HOME"))
    assert "this user has no home directory for the cache; set XDG_CACHE_HOME" in done.stdout, done.stderr


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = python("-m", *TRAIN, cwd=tmp_path / "gone", before=lambda: os.rmdir(tmp_path / "gone"))
    assert_one_message(done, 2, "the current directory cannot be used (No such file or directory); change to another")


def test_no_directory_for_temporary_files(tmp_path: Path) -> None:
    """TMPDIR names none, and /tmp, /var/tmp and the current directory, which Python tries next, cannot be written."""
    program = (
        "import sys, tempfile\n"
        "tempfile._candidate_tempdir_list = lambda: ['/no/such']\n"
        "from fastddpm import doctor\n"
        "from fastddpm.runtime import cli\n"
        "sys.argv = ['doctor']\n"
        "cli.run(doctor.main)"
    )
    done = python("-c", program, cwd=tmp_path)
    assert_one_message(done, 2, "set TMPDIR to a directory that can be written to")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [slow(8), 12, slow(20)])
def test_few_files_may_be_open(limit: int, tmp_path: Path) -> None:
    """The command does its work, or says in one line which limit is in the way."""
    done = python(
        "-m",
        *TRAIN,
        "--out",
        str(tmp_path / "run"),
        before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )
    assert done.returncode == 0 or "ulimit -n" in done.stderr.splitlines()[-1], done.stderr


def test_no_more_threads_may_be_started(tmp_path: Path) -> None:
    program = (
        "import sys, threading\n"
        'def refuse(*_, **__): raise RuntimeError("can\'t start new thread")\n'
        "from fastddpm.runtime import cli\n"
        "threading.Thread.start = refuse\n"
        "cli.run(lambda arguments: threading.Thread().start())"
    )
    done = python("-c", program, cwd=tmp_path)
    assert_one_message(done, 2, "the system allows this user no more threads; raise ulimit -u")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--out", "a\\0b"], 5, "holds no NUL character"),
        (["--out", "/proc/run"], 5, "cannot write into /proc/run"),
        (["--timeout", "inf"], 2, "--timeout must be more than 0 and at most"),
        (["--timeout", "nan"], 2, "--timeout must be more than 0 and at most"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    program = (
        f"import sys\nfrom fastddpm import train\nfrom fastddpm.runtime import cli\nsys.argv = ['x', *{arguments!r}]\n"
    )
    program = program.replace("\\\\0", "\\0") + "cli.run(train.main)"
    done = python("-c", program, cwd=tmp_path)
    assert_one_message(done, code, message)


@pytest.mark.parametrize("text", ["1" * 5000, "5-" + "9" * 5000, "1,,2", "1-2-3", "³", "-1", ""])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--seeds takes numbers and ranges"):
        parse_numbers(text, "seeds")
