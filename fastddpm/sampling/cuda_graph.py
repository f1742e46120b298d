"""TODO"""

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable

import torch

Replay = Callable[[], None]


_LARGEST_STEP = 64  # between two sizes of batches that are captured


# cuBLAS keeps a workspace (32 MiB on an H100) for each stream that it was called on, whose address a graph captured
# there holds, and torch may free it when any graph captured there is deleted. So each graph has a stream of its own
# while it lives, and streams are used again: these are the ones of graphs that have been deleted.
_streams_without_graph: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def capture(step: Replay, restore: Replay, device: torch.device) -> Replay:
    """`step` as a CUDA graph of `device`, after runs on another stream, in which kernels are compiled and choose their
    algorithms. `restore` undoes a run: behind the last step of a chain there is none. What other threads do on the GPU
    meanwhile does no harm.

    Raises RuntimeError where something in it cannot be captured.
    """
    with torch.cuda.device(device):
        here, warming, free = torch.cuda.current_stream(), _warming_stream(device), _streams_without_graph[device]
        warming.wait_stream(here)
        try:
            with torch.cuda.stream(warming):
                for _ in range(3):
                    step()
                    restore()
        finally:
            here.wait_stream(warming)
        graph, stream = torch.cuda.CUDAGraph(), free.pop() if free else torch.cuda.Stream(device)
        # `here` once more: a capture that fails leaves its stream the current one.
        with torch.cuda.stream(here), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    weakref.finalize(graph, free.append, stream)
    return graph.replay


@functools.cache
def _warming_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def padded(batch: int) -> int:
    """The size of the batch that is captured for `batch` images: a power of two up to 64, then a multiple of 64."""
    if batch >= _LARGEST_STEP:
        return -(-batch // _LARGEST_STEP) * _LARGEST_STEP
    return 1 << max(batch - 1, 0).bit_length()
