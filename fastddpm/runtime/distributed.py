"""Several processes at one piece of work, as torchrun starts them: who this one is, and what all of them found.

The contract is that of torchrun, which SLURM scripts, Ray Train and accelerate fulfil as well: RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment. A group that the starter has formed is used as it is.
"""

import atexit
import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from fastddpm.errors import FastddpmError, UsageError

T = TypeVar("T")
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
# How gloo, NCCL and the store between them say that another process is gone or does not answer, where the type of the
# error does not.
_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|timeout caused pair closure|TCPStore"
)
_formed_a_group = False


class LostProcessError(FastddpmError):
    """Another process died or does not answer: exit code 75, that of what may be tried again."""

    exit_code = 75


@dataclass(frozen=True)
class ProcessGroup:
    """This process's number, 0..count-1, and how many there are."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what all of them share."""
        return self.rank == 0

    def share(self, num: int) -> range:
        """This process's share of 0..num-1: contiguous, in the order of ranks; lengths differ by one at most."""
        return range(self.rank * num // self.world_size, (self.rank + 1) * num // self.world_size)


SINGLE_PROCESS = ProcessGroup()


def group_from_environment() -> ProcessGroup:
    """This process as RANK and WORLD_SIZE say; alone without them. Raises `UsageError` for what torchrun never sets."""
    try:
        rank, count = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    except ValueError:
        raise UsageError("RANK and WORLD_SIZE in the environment must be numbers, as torchrun sets them") from None
    if not 0 <= rank < count:
        raise UsageError(f"RANK must be in 0..WORLD_SIZE-1; got {rank} of {count}")
    return ProcessGroup(rank, count)


def local_rank() -> int:
    """This process's number on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def restarted() -> bool:
    """Whether torchrun (--max-restarts) or SLURM (--requeue) started this command again after it had stopped."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in _RESTARTS)


@contextlib.contextmanager
def process_group(group: ProcessGroup, *, device: str = "cpu", timeout_s: float | None = None) -> Iterator[None]:
    """A group of all processes inside the block, for `all_gather_object` and the rest; nothing for one alone.

    Tensors on the CPU travel by gloo; with `device` "cuda" those on GPUs by NCCL. A process that does not answer for
    `timeout_s` (torch's own limits unless given) counts as lost. Raises `LostProcessError` when one is.
    """
    if group.world_size == 1:
        yield
        return
    import torch.distributed as dist
    from torch.distributed.constants import default_pg_timeout

    with _report_lost_peer(timeout_s):
        if dist.is_initialized():
            if "cpu" not in str(dist.get_backend_config()):
                raise UsageError("the process group that was formed has NCCL alone; form it with cpu:gloo,cuda:nccl")
            yield
            return
        _form(group, device, default_pg_timeout if timeout_s is None else timedelta(seconds=timeout_s))
        yield
        # Not where an error leaves the block: other processes may be waiting for this one to take part.
        dist.destroy_process_group()


def _form(group: ProcessGroup, device: str, limit: timedelta) -> None:
    """Meet the other processes, waiting for each answer for `limit` at most."""
    import torch.distributed as dist

    global _formed_a_group
    _formed_a_group = True
    # A store whose process is stopped keeps a client that has given up waiting for a key, without a limit.
    stuck = threading.Timer(2 * limit.total_seconds(), _end_stuck, (limit.total_seconds(),))
    stuck.daemon = True
    stuck.start()
    try:
        store, rank, count = next(dist.rendezvous("env://", group.rank, group.world_size, timeout=limit))
        # torchrun keeps its store over restarts: without a name of its own an attempt would find the addresses of the
        # processes of the one before, which are gone.
        attempt = dist.PrefixStore(f"attempt-{os.environ.get(_RESTARTS[0], '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=count, timeout=limit)
    finally:
        stuck.cancel()
        _exit_when_uncaught()


def _end_stuck(limit_s: float) -> None:
    print(f"error: {_lost_peer_message('not all processes have met', limit_s)}", file=sys.stderr, flush=True)
    os._exit(LostProcessError.exit_code)


def _exit_when_uncaught() -> None:
    """Have an exception that nobody catches shown as before, and then end the process at once: the others see it."""
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            shown(kind, error, trace)
        finally:
            exit_now(1)

    sys.excepthook = show


def exit_now(code: int) -> None:
    """End this command with that exit code (0: return), but at once in a process that formed a group.

    For torch keeps gloo's threads after the group. One that still waits for another process keeps the interpreter from
    ending; one that lets go of a tensor while the interpreter ends aborts the process (SIGABRT) after all its work.
    """
    if _formed_a_group:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any longer
                stream.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def is_lost_peer(error: BaseException) -> bool:
    """Whether torch raised this because another process is gone or does not answer."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and not isinstance(error, FastddpmError) and bool(_LOST.search(_reason(error)))
    )


@contextlib.contextmanager
def _report_lost_peer(timeout_s: float | None) -> Iterator[None]:
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
    """The first line of what an error says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _lost_peer_message(reason: str, timeout_s: float | None) -> str:
    limit = "in time" if timeout_s is None else f"for {timeout_s:g} s"
    return (
        f"another process died or did not answer {limit} ({reason[:160]}). What was saved is whole: start again to go "
        "on from it (training: --resume, which torchrun --max-restarts does by itself)"
    )


def all_gather_object(value: T, group: ProcessGroup) -> list[T]:
    """`value` of every process, in their order, in each of them: numbers, arrays, lists and dictionaries of these."""
    if group.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[T | None] = [None] * group.world_size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def on_main(action: Callable[[], T], group: ProcessGroup) -> T:
    """What `action` returns in the first process, in each of them; a `FastddpmError` that it raises is raised in each.

    The others wait for it.
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


def assert_same(value: object, what: str, group: ProcessGroup) -> None:
    """Raise `UsageError`, in every process, unless `value`, which is `what`, is the same in all of them."""
    values = all_gather_object(value, group)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UsageError(f"the processes differ in {what}: {values[0]} in process 0, {other} in process {rank}")
