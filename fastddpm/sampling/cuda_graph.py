"""Capture of a step as a CUDA graph, and the batch sizes for which a sampling step is captured."""

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable

import torch

Replay = Callable[[], None]

_SIZE_STEP = 64  # captured batch sizes above 64 are multiples of this

# cuBLAS keeps a workspace (32 MiB on an H100) for each stream that it was called on. A graph captured on a stream holds
# the workspace's address, and torch may free the workspace when any graph captured on that stream is deleted. Each
# graph therefore has a stream of its own as long as it exists. These are the streams of deleted graphs, to be reused.
_streams_without_graph: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def capture(step: Replay, restore: Replay, device: torch.device, *, warm_up: int = 3) -> Replay:
    """Capture `step` as a CUDA graph on `device`; return its replay.

    `warm_up` runs on another stream come first, in which kernels are compiled and choose their algorithms. `restore`
    undoes each of them: in sampling, no row of the step table may follow the one at hand. Other threads may use the GPU
    meanwhile.
    Raises RuntimeError if something in `step` cannot be captured.
    """
    with torch.cuda.device(device):
        here, warming, free = torch.cuda.current_stream(), _warming_stream(device), _streams_without_graph[device]
        warming.wait_stream(here)
        try:
            with torch.cuda.stream(warming):
                for _ in range(warm_up):
                    step()
                    restore()
        finally:
            here.wait_stream(warming)
        graph, stream = torch.cuda.CUDAGraph(), free.pop() if free else torch.cuda.Stream(device)
        # Entering `here` restores it at the end: a capture that fails leaves its own stream the current one.
        with torch.cuda.stream(here), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    weakref.finalize(graph, free.append, stream)
    return graph.replay


def failure(error: RuntimeError) -> str:
    """Return in one line why `capture` raised `error`.

    If the step raises, ending the capture raises as well, with the step's error as its context.
    """
    return str(error.__context__ or error).partition("\n")[0]


@functools.cache
def _warming_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def padded(batch: int) -> int:
    """Return the captured batch size for `batch` images: the next power of two up to 64, then the next multiple of 64.

    Few sizes mean few captures.
    """
    if batch >= _SIZE_STEP:
        return -(-batch // _SIZE_STEP) * _SIZE_STEP
    return 1 << max(batch - 1, 0).bit_length()
