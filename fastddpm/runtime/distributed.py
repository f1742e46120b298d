"""Rank, world size and collectives, for processes started by torchrun.

Processes are described by torchrun's environment variables, which SLURM scripts, Ray Train and accelerate set as well:
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. A process group that already exists is used as it is.
"""

import atexit
import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from fastddpm.errors import FastddpmError, UsageError

from .progress import announced, discard, log

T = TypeVar("T")
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
# Messages of gloo, NCCL and the TCP store about a process that is gone or does not answer, when they raise a plain
# RuntimeError.
_LOST_PEER = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|timeout caused pair closure|TCPStore"
)
MAX_TIMEOUT_S = 10_000_000  # four months; torch's clocks overflow at some more
_formed_a_group = False


class LostProcessError(FastddpmError):
    """Another process died or does not answer: exit code 75 (EX_TEMPFAIL), because starting again may help."""

    exit_code = 75


@dataclass(frozen=True)
class ProcessGroup:
    """The rank of this process, 0..world_size-1, and the world size. A process on its own is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files and messages that are written once."""
        return self.rank == 0

    def share(self, num: int) -> range:
        """Return this process's contiguous share of 0..num-1, in rank order; lengths differ by at most one."""
        return range(self.rank * num // self.world_size, (self.rank + 1) * num // self.world_size)


SINGLE_PROCESS = ProcessGroup()


def group_from_environment() -> ProcessGroup:
    """Return rank and world size from RANK and WORLD_SIZE, or rank 0 of 1 without them.

    Raises `UsageError`, naming all that is missing or wrong among the variables that torchrun sets.
    """
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    problems = [name for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)) if value is None]
    if rank is not None and world_size is not None and not rank < world_size:
        problems.append(f"RANK (must be in 0..WORLD_SIZE-1; got {rank} of {world_size})")
    problems += [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if _number(name, 0) is None]
    _refuse(problems)
    assert rank is not None and world_size is not None
    return ProcessGroup(rank, world_size)


def _refuse(problems: Sequence[str]) -> None:
    """Raise `UsageError` with the values of these environment variables, if there are any."""
    if problems:
        shown = ", ".join(f"{name} = {os.environ.get(name.partition(' ')[0], 'nothing')!r:.40}" for name in problems)
        raise UsageError(
            f"the environment describes no process of torchrun: {shown}. Start with torchrun, or unset these variables"
        )


def _check_meeting_place() -> None:
    """Raise `UsageError` if MASTER_ADDR and MASTER_PORT do not tell where the processes meet."""
    port = _number("MASTER_PORT", None)
    problems = [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR (must name the host of rank 0)"]
    if port is None or not 0 < port < 2**16:
        problems.append("MASTER_PORT (must be in 1..65535)")
    _refuse(problems)


def _number(name: str, default: int | None) -> int | None:
    """Return the natural number in an environment variable, `default` without the variable, None for other text."""
    text = os.environ.get(name)
    if text is None:
        return default
    return int(text) if re.fullmatch("[0-9]{1,9}", text.strip()) else None


def local_rank() -> int:
    """Return the rank within this machine (LOCAL_RANK, default 0), which is also the index of the process's GPU."""
    return _number("LOCAL_RANK", 0) or 0


def local_world_size(world_size: int) -> int:
    """Return the number of processes on this machine (LOCAL_WORLD_SIZE, default: all `world_size`), at least 1."""
    return max(1, _number("LOCAL_WORLD_SIZE", world_size) or world_size)


def restarted() -> bool:
    """Return whether torchrun (--max-restarts) or SLURM (--requeue) has restarted this command."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in _RESTARTS)


@contextlib.contextmanager
def process_group(group: ProcessGroup, *, device: str = "cpu", timeout_s: float | None = None) -> Iterator[None]:
    """Form the process group that the collectives below use inside the block; do nothing for a single process.

    CPU tensors are sent by gloo and, with `device` "cuda", GPU tensors by NCCL. `timeout_s`: seconds without an answer
    after which a process counts as lost. Default: torch's own limits. Raises `LostProcessError` if a process is lost,
    and `UsageError` if MASTER_PORT is in use or an existing process group has no backend for the CPU.
    """
    if group.world_size == 1:
        yield
        return
    import torch.distributed as dist
    from torch.distributed.constants import default_pg_timeout

    with _report_lost_peer(timeout_s):
        if dist.is_initialized():
            if "cpu" not in str(dist.get_backend_config()):
                raise UsageError(
                    "the existing process group has no CPU backend; form it with backend cpu:gloo,cuda:nccl"
                )
            yield
            return
        _form(group, device, default_pg_timeout if timeout_s is None else timedelta(seconds=timeout_s))
        yield
        # Not after an error: other processes may still be waiting for this one in a collective.
        dist.destroy_process_group()


def _form(group: ProcessGroup, device: str, limit: timedelta) -> None:
    """Initialise torch's process group. Each wait for the other processes takes at most `limit`."""
    import torch.distributed as dist

    _check_meeting_place()
    global _formed_a_group
    _formed_a_group = True
    # A client of the TCP store whose server process is stopped waits without a limit, whatever the timeout.
    stuck = threading.Timer(2 * limit.total_seconds(), _end_stuck, (limit.total_seconds(),))
    stuck.daemon = True
    stuck.start()
    try:
        with announced(f"waiting for all {group.world_size} processes", log if group.is_main else discard):
            store, rank, world_size = next(dist.rendezvous("env://", group.rank, group.world_size, timeout=limit))
            # torchrun keeps its store over restarts. Without a prefix of its own an attempt would find the addresses of
            # the last attempt's processes, which are gone.
            attempt = dist.PrefixStore(f"attempt-{os.environ.get(_RESTARTS[0], '0')}", store)
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=limit)
    finally:
        stuck.cancel()
        _exit_when_uncaught()


def _end_stuck(limit_s: float) -> None:
    """End the process when forming the group has taken more than twice the limit."""
    print(f"error: {_lost_peer_message('not all processes joined the group', limit_s)}", file=sys.stderr, flush=True)
    os._exit(LostProcessError.exit_code)


def _exit_when_uncaught() -> None:
    """End the process at once after an uncaught exception is shown, so that the other processes notice."""
    previous = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            previous(kind, error, trace)
        finally:
            exit_now(1)

    sys.excepthook = show


def exit_now(code: int) -> None:
    """Exit with `code` (0: return); in a process that formed a process group, at once, by os._exit.

    gloo's threads outlive the group: one that waits for another process keeps the interpreter from exiting, and one
    that frees a tensor while the interpreter exits aborts the process (SIGABRT) after its work is done.
    """
    if _formed_a_group:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or a broken pipe
                stream.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def is_lost_peer(error: BaseException) -> bool:
    """Return whether torch raised this because another process is gone or does not answer."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, FastddpmError)
        and bool(_LOST_PEER.search(_reason(error)))
    )


@contextlib.contextmanager
def _report_lost_peer(timeout_s: float | None) -> Iterator[None]:
    """Turn torch's errors about lost processes into `LostProcessError`, and a port in use into `UsageError`."""
    try:
        yield
    except RuntimeError as error:
        reason = _reason(error)
        if "EADDRINUSE" in reason:
            raise UsageError(
                f"MASTER_PORT {os.environ.get('MASTER_PORT')} is in use on this machine; choose another"
            ) from error
        if not is_lost_peer(error):
            raise
        raise LostProcessError(_lost_peer_message(reason, timeout_s)) from error


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _lost_peer_message(reason: str, timeout_s: float | None) -> str:
    limit = "in time" if timeout_s is None else f"for {timeout_s:g} s"
    return (
        f"another process died or did not answer {limit} ({reason[:160]}). Saved files are complete: start again to "
        "continue from them (training: with --resume; torchrun --max-restarts does so by itself)"
    )


def all_gather_object(value: T, group: ProcessGroup) -> list[T]:
    """Return `value` of every process, in rank order: numbers, arrays, lists and dictionaries of these."""
    if group.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[T | None] = [None] * group.world_size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def on_main(action: Callable[[], T], group: ProcessGroup) -> T:
    """Call `action` in rank 0 and return its result in every process.

    The other processes wait for it. A `FastddpmError` that it raises is raised in every process.
    """
    if group.world_size == 1:
        return action()
    import torch.distributed as dist

    outcome: list[tuple[T | None, FastddpmError | None]] = [(None, None)]
    if group.is_main:
        try:
            outcome = [(action(), None)]
        except FastddpmError as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def assert_same(value: object, name: str, group: ProcessGroup) -> None:
    """Raise `UsageError` in every process if `value` differs between them. `name`: its name in the message."""
    values = all_gather_object(value, group)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UsageError(f"the processes differ in {name}: {values[0]} in process 0, {other} in process {rank}")
