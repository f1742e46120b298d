"""Ways to decode a pack's batches ahead of training: fastddpm's workers, and the same task on maintained libraries.

All give the same pixels for a step, start anywhere, split a batch among the workers, and decode three batches ahead.
This module does not import torch, because loky's workers import it. The workers of every process-based side are in
sessions of their own, as fastddpm's are: Ctrl-C does not reach them, and a kernel that shares processor time by
session treats all sides alike.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastddpm.data.order import batch_indices
from fastddpm.data.pack.format import open_pack
from fastddpm.errors import DataError

AHEAD = 3
Part = np.ndarray | str
"""The pixels of a part of a batch, or what is wrong with one of its images."""


class Decoder(Protocol):
    """What all sides have."""

    def at(self, step: int) -> np.ndarray:
        """Return the pixels of a step, uint8 (N, C, H, W)."""

    def set_timeout(self, seconds: float) -> None:
        """Change how long a worker may take to answer."""

    def close(self) -> None:
        """End the workers."""


class Task:
    """Decodes part `part` of `parts` of a step's images in a worker."""

    def __init__(self, pack: Path, batch: int, parts: int) -> None:
        self.pack, self.batch, self.parts = pack, batch, parts
        self._images: Any = None

    def __getitem__(self, key: tuple[int, int]) -> Part:
        if self._images is None:  # opened in the worker
            self._images = open_pack(self.pack).images()
        step, part = key
        numbers = batch_indices(step, len(self._images), self.batch, 0)
        first, end = (i * len(numbers) // self.parts for i in (part, part + 1))
        try:
            images: np.ndarray = self._images[numbers[first:end]]
        except DataError as error:
            return str(error)
        return images


def joined(parts: list[Any]) -> np.ndarray:
    """Return the parts of a batch as one array. Raises DataError if one of them is a message."""
    for part in parts:
        if isinstance(part, str):
            raise DataError(part)
    return np.concatenate([np.asarray(part) for part in parts])


class Ours:
    """`fastddpm.data.Batches`."""

    def __init__(self, pack: Path, batch: int, workers: int) -> None:
        import torch

        from fastddpm.data.batches import Batches

        self._batches = Batches(open_pack(pack).dataset(), batch, 0, torch.device("cpu"), workers=workers)

    def at(self, step: int) -> np.ndarray:
        return self._batches.at(step)[0].numpy()

    def set_timeout(self, seconds: float) -> None:
        assert self._batches._workers is not None
        self._batches._workers._timeout_s = seconds

    def close(self) -> None:
        self._batches.close()


class Loader:
    """torch's DataLoader over (step, part). A step that does not follow the last one starts new workers.

    Parts come as tensors in shared memory, or with `arrays` as NumPy arrays through a pipe.
    """

    def __init__(self, pack: Path, batch: int, workers: int, context: str = "fork", arrays: bool = False) -> None:
        self._workers, self._context, self._arrays = workers, context, arrays
        self._task = Task(pack, batch, workers)
        self._next: int | None = None
        self._iterator: Any = None

    def at(self, step: int) -> np.ndarray:
        if step != self._next:
            self._start(step)
        self._next = step + 1
        return joined([next(self._iterator) for _ in range(self._workers)])

    def set_timeout(self, seconds: float) -> None:
        self._iterator._timeout = seconds

    def close(self) -> None:
        self._iterator = None

    def _start(self, step: int) -> None:
        import torch
        from torch.utils.data import DataLoader

        self._iterator = None
        loader: Any = DataLoader(
            self._task,  # type: ignore[arg-type]
            batch_size=None,
            sampler=_Keys(step, self._workers),  # type: ignore[arg-type]
            num_workers=self._workers,
            prefetch_factor=AHEAD,
            collate_fn=unchanged if self._arrays else None,
            timeout=60,
            worker_init_fn=own_session,
            multiprocessing_context=self._context,
            generator=torch.Generator(),  # without one it draws from the global generator
        )
        self._iterator = iter(loader)


class _Keys:
    """Every part of every step from `first` on."""

    def __init__(self, first: int, parts: int) -> None:
        self._first, self._parts = first, parts

    def __iter__(self) -> Iterator[tuple[int, int]]:
        step = self._first
        while True:
            yield from ((step, part) for part in range(self._parts))
            step += 1


class Futures:
    """Parts as futures of executors, one executor for each worker, so that it is known which one fails."""

    def __init__(self, pack: Path, batch: int, workers: int, executor: Callable[[], Executor]) -> None:
        self._task = Task(pack, batch, workers)
        self._executors = [executor() for _ in range(workers)]
        self._running: dict[int, list[Future[Part]]] = {}
        self._timeout_s = 60.0

    def at(self, step: int) -> np.ndarray:
        self._submit(range(step, step + AHEAD))
        parts = [future.result(self._timeout_s) for future in self._running.pop(step)]
        self._submit(range(step + 1, step + 1 + AHEAD))
        return joined(parts)

    def set_timeout(self, seconds: float) -> None:
        self._timeout_s = seconds

    def close(self) -> None:
        for executor in self._executors:
            executor.shutdown(cancel_futures=True)

    def _submit(self, wanted: range) -> None:
        self._running = {step: parts for step, parts in self._running.items() if step in wanted}
        for step in wanted:
            if step not in self._running:
                keys = [(step, part) for part in range(len(self._executors))]
                parts = [e.submit(decode, self._task, key) for e, key in zip(self._executors, keys, strict=True)]
                self._running[step] = parts


class Threads(Futures):
    """Threads of the standard library: Pillow lets go of Python's lock while it decodes."""

    def __init__(self, pack: Path, batch: int, workers: int) -> None:
        super().__init__(pack, batch, workers, lambda: ThreadPoolExecutor(1))


class Loky(Futures):
    """loky's processes, which import neither torch nor the caller's main module."""

    def __init__(self, pack: Path, batch: int, workers: int) -> None:
        from loky import ProcessPoolExecutor

        super().__init__(pack, batch, workers, lambda: ProcessPoolExecutor(1, initializer=own_session))

    def close(self) -> None:
        for executor in self._executors:
            executor.shutdown(kill_workers=True)  # type: ignore[call-arg]


def unchanged(part: Part) -> Part:
    """Return an array as it is; by default DataLoader makes tensors."""
    return part


_tasks: dict[tuple[Path, int], Task] = {}


def decode(task: Task, key: tuple[int, int]) -> Part:
    """Decode a part of a batch by the first such task that came, whose pack is open."""
    return _tasks.setdefault((task.pack, task.parts), task)[key]


def own_session(_number: int = 0) -> None:
    """Put a worker into a session of its own."""
    os.setsid()


SIDES: dict[str, Callable[[Path, int, int], Decoder]] = {
    "fastddpm": Ours,
    "DataLoader, fork": Loader,
    "DataLoader, fork, arrays": lambda *sizes: Loader(*sizes, arrays=True),
    "DataLoader, forkserver": lambda *sizes: Loader(*sizes, context="forkserver"),
    "DataLoader, spawn": lambda *sizes: Loader(*sizes, context="spawn"),
    "threads": Threads,
    "loky": Loky,
}
