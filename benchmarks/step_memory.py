"""The memory that a step takes on a GPU, counted on tensors without memory, and the batch that fits into a chip's."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CHIPS = {"80 GB": 80e9, "141 GB": 141e9}
# The rest is for the context, the kernels' code, workspaces of convolutions, and gaps between blocks: an assumption.
USABLE = 0.9
_BLOCK = 512  # bytes that PyTorch's allocator rounds up to


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that are made in the block and not freed; `peak` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        num_bytes = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, functools.partial(self._free, num_bytes))

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


def peak_of(step: Callable[[], object]) -> int:
    """Return the most bytes that `step` holds at any time, with all that it makes before."""
    with Memory() as memory:
        step()
    return memory.peak


def fitting(peak: Callable[[int], int], batch: int) -> tuple[int, dict[str, int]]:
    """Return the peak at `batch`, and the largest batch that fits into each chip of `CHIPS`.

    Memory is a constant and a part proportional to the batch, found from `batch` and twice as many, or from larger ones
    while what is made before the step, which needs more, hides it.
    """
    one, size = peak(batch), batch
    while peak(2 * size) <= one:
        size *= 2
    size = size if size == batch else 2 * size
    each = (peak(2 * size) - peak(size)) / size
    constant = peak(size) - each * size
    return one, {name: max(0, int((USABLE * memory - constant) // each)) for name, memory in CHIPS.items()}
