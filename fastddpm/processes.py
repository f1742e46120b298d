"""Several processes at one piece of work, as torchrun starts them: who this one is, and what all of them found."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from fastddpm.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """This process's number, 0..count-1, and how many there are."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what all of them share."""
        return self.rank == 0


def place() -> Place:
    """This process as RANK and WORLD_SIZE say; alone without them. Raises `UsageError` for what torchrun never sets."""
    try:
        rank, count = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    except ValueError:
        raise UsageError("RANK and WORLD_SIZE in the environment must be numbers, as torchrun sets them") from None
    if not 0 <= rank < count:
        raise UsageError(f"RANK must be in 0..WORLD_SIZE-1; got {rank} of {count}")
    return Place(rank, count)


def local_rank() -> int:
    """This process's number on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextlib.contextmanager
def together(where: Place) -> Iterator[None]:
    """A group of all processes, over the CPU (gloo), for `gathered` inside the block; nothing for one alone."""
    if where.count == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=where.rank, world_size=where.count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gathered(value: T, where: Place) -> list[T]:
    """`value` of every process, in their order, in each of them: numbers, arrays, lists and dictionaries of these."""
    if where.count == 1:
        return [value]
    import torch.distributed as dist

    values: list[T | None] = [None] * where.count
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]
