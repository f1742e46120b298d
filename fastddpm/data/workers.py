"""Worker processes that decode a pack ahead of training.

Each worker decodes its part of every batch into shared memory. Workers are separate programs (`worker.py`): a fork
would hold the training process's files, locks and GPU, and multiprocessing's spawned processes import the caller's main
module, and with it torch. docs/measurements/data-libraries.md tells why torch's DataLoader is not used: with it, a
worker that hangs keeps the training process from going on and from ending.
"""

import dataclasses
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import NoReturn

import numpy as np

from fastddpm.errors import DataError, StorageError

from .pack.format import PackedImages, damaged
from .worker import DONE, PLACE, TASK, num_bytes, views

_PROGRAM = """
import json, sys
options = json.loads(sys.argv[1])
sys.path[:] = options.pop("sys_path")
from fastddpm.data.worker import main
main(**options)
"""


def default_workers(processes: int = 1) -> int:
    """Return the number of workers for each of `processes` training processes on this machine.

    One for each processor that this process may use, divided by `processes`; at least 1, at most 8.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, available // processes))


@dataclass
class _Slot:
    """A place for one batch in the shared memory.

    `step`: the step that it holds. `numbers`: its images. `waiting`: the workers that are still decoding their parts.
    `problem`: the message about a damaged image, or "".
    """

    step: int | None = None
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    waiting: set[int] = field(default_factory=set)
    problem: str = ""


@dataclass(frozen=True)
class _Worker:
    process: "subprocess.Popen[bytes]"
    connection: Connection

    def stop(self) -> None:
        """Close the connection, which ends a worker that answers; kill one that does not end within a second."""
        self.connection.close()
        try:
            self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):  # a process that waits for a dead disk ends when the disk answers
                self.process.wait(5.0)


class Workers:
    """Decode batches of up to `rows` images of a pack with `num_workers` processes, `slots` batches at a time.

    `submit` hands over the images of a step, `take` returns their pixels, which do not depend on the number of workers.
    If a worker is killed, or does not answer for `timeout_s` seconds, `take` or `submit` raises DataError that names
    it. Shared memory: slots x rows x (C H W + 16) bytes.
    """

    def __init__(self, images: PackedImages, rows: int, *, num_workers: int, slots: int, timeout_s: float) -> None:
        self._images, self._timeout_s = images, timeout_s
        shape = images.preprocessing.shape
        self._slots = [_Slot() for _ in range(slots)]
        descriptor = _memory(num_bytes(slots, rows, shape))
        self._workers: list[_Worker] = []
        self.close = weakref.finalize(self, _stop, self._workers)
        try:
            self._tasks, self._pixels = views(mmap.mmap(descriptor, num_bytes(slots, rows, shape)), slots, rows, shape)
            for _ in range(num_workers):
                self._workers.append(self._start(descriptor, slots, rows))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(descriptor)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def processes(self) -> list[int]:
        """The process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def has(self, step: int) -> bool:
        """Return whether the step was submitted and not yet taken."""
        return any(slot.step == step for slot in self._slots)

    def submit(self, step: int, numbers: np.ndarray, wanted: range) -> None:
        """Start decoding the images `numbers`, int64 (n,), of `step`, in the slot of a step that is not in `wanted`."""
        index, slot = next((i, slot) for i, slot in enumerate(self._slots) if slot.step not in wanted)
        self._finish(slot)  # its step was submitted and never taken
        slot.step, slot.numbers, slot.problem = step, numbers, ""
        self._tasks[index, : len(numbers)] = self._images.index[numbers]
        count = len(self._workers)
        for i, worker in enumerate(self._workers):
            first, end = (part * len(numbers) // count for part in (i, i + 1))
            if first < end:
                slot.waiting.add(i)
                try:
                    worker.connection.send_bytes(TASK.pack(index, first, end))
                except OSError:
                    self._fail(i)

    def take(self, step: int) -> np.ndarray:
        """Return a copy of the pixels of a step, uint8 (n, C, H, W), and free its slot.

        Raises DataError if one of the images is damaged.
        """
        index, slot = next((i, slot) for i, slot in enumerate(self._slots) if slot.step == step)
        self._finish(slot)
        slot.step = None
        if slot.problem:
            raise DataError(slot.problem)
        pixels: np.ndarray = self._pixels[index, : len(slot.numbers)].copy()
        return pixels

    def _finish(self, slot: _Slot) -> None:
        """Wait until all workers have decoded their parts of a slot."""
        if not self.close.alive:
            raise DataError(f"the data workers of {self._images.path} were stopped")
        deadline = time.monotonic() + self._timeout_s
        while slot.waiting:
            connections = {self._workers[i].connection: i for i in slot.waiting}
            ready = wait(list(connections), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(min(slot.waiting), hangs=True)
            for connection in ready:
                self._receive(connections[connection])  # type: ignore[index]

    def _receive(self, number: int) -> None:
        try:
            answer = self._workers[number].connection.recv_bytes()
        except (EOFError, OSError):
            self._fail(number)
        slot = self._slots[DONE.unpack_from(answer)[0]]
        slot.waiting.discard(number)
        if len(answer) > DONE.size and not slot.problem:
            place = PLACE.unpack_from(answer, DONE.size)[0]
            reason = answer[DONE.size + PLACE.size :].decode(errors="replace")
            slot.problem = damaged(self._images.path, int(slot.numbers[place]), reason)

    def _fail(self, number: int, *, hangs: bool = False) -> NoReturn:
        process = self._workers[number].process
        if hangs:
            what = f"has not answered for {self._timeout_s:g} s and was stopped; the disk may hang"
        else:
            what = _ended(process)
        self.close()
        raise DataError(
            f"data worker {number} of {len(self._workers)} (process {process.pid}) {what}; "
            f"it was decoding {self._images.path}"
        )

    def _start(self, memory: int, slots: int, rows: int) -> _Worker:
        ours, theirs = Pipe()
        options = {
            "sys_path": sys.path,
            "path": str(self._images.path.absolute()),
            "connection": theirs.fileno(),
            "memory": memory,
            "slots": slots,
            "rows": rows,
            "preprocessing": dataclasses.asdict(self._images.preprocessing),
        }
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(options)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), memory],
                start_new_session=True,  # after Ctrl-C the training process saves, and still needs its workers
            )
        return _Worker(process, ours)


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        worker.stop()


def _ended(process: "subprocess.Popen[bytes]") -> str:
    """Return a description of how a process ended whose connection is closed."""
    try:
        code = process.wait(5.0)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (", perhaps because memory ran out" if name == "SIGKILL" else "")
    return f"ended with exit code {code}; its own message is above"


def _memory(size: int) -> int:
    """Return a descriptor of memory that has no name, so that nothing remains when the processes end."""
    try:
        if hasattr(os, "memfd_create"):  # not limited by the size of /dev/shm, which is 64 MiB in Docker
            descriptor = os.memfd_create("fastddpm-batches")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
    except OSError as error:
        raise StorageError(
            f"shared memory of {size:,} bytes for decoded batches cannot be made: {error.strerror}"
        ) from error
    return descriptor
