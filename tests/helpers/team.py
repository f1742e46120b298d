"""Several processes for a test, in a group over gloo: forked from one that has imported torch already."""

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastddpm.errors import FastddpmError
from fastddpm.runtime import distributed

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "fastddpm.train", "fastddpm.training.samples", "fastddpm.training.trainer", "torch._dynamo",
    "torch.distributed.fsdp", "torch.distributed.checkpoint",
])  # fmt: skip
LIMIT_S = 120.0


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative for a signal), what its function returned, and stderr."""

    code: int | None
    value: Any
    stderr: str


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]  # type: ignore[no-any-return]


def contract(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives process `rank` of `count` on one machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


def start(count: int, work: Callable[..., Any], *arguments: Any, directory: Path, **environment: str) -> list[Any]:
    """`count` processes that call `work(*arguments)`, each with RANK and the rest in its environment."""
    port = free_port()
    started = []
    for rank in range(count):
        variables = contract(rank, count, port) | environment
        process = _CONTEXT.Process(target=_child, args=(variables, directory / f"{rank}", work, arguments))
        process.start()
        started.append(process)
    return started


def wait(started: list[Any], directory: Path) -> list[Ended]:
    """Wait for processes of `start` in that directory; those that take too long are killed."""
    ended = []
    for rank, process in enumerate(started):
        process.join(LIMIT_S)
        if process.is_alive():
            process.kill()
            process.join()
        files = [Path(f"{directory / str(rank)}.{kind}") for kind in ("pt", "err")]
        value = torch.load(files[0], weights_only=False) if files[0].exists() else None  # written by our own child
        ended.append(Ended(process.exitcode, value, files[1].read_text() if files[1].exists() else ""))
    return ended


def run(count: int, work: Callable[..., Any], *arguments: Any, **environment: str) -> list[Ended]:
    """`count` processes that call `work(*arguments)`, and how they ended."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        return wait(start(count, work, *arguments, directory=directory, **environment), directory)


def values(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of `count` processes; fails with its traceback if it raises."""
    ended = run(count, work, *arguments)
    assert all(one.code == 0 for one in ended), "\n".join(one.stderr for one in ended)
    return [one.value for one in ended]


def _child(variables: dict[str, str], files: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= variables
    torch.set_num_threads(1)
    descriptor = os.open(f"{files}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    code = 0
    try:
        torch.save(work(*arguments), f"{files}.pt")
    except FastddpmError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def grouped(work: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> Any:
    """`work(group, *arguments)` inside the group; for `values` and `run`."""
    group = distributed.group_from_environment()
    with distributed.process_group(group, timeout_s=timeout_s):
        return work(group, *arguments)
