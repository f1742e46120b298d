"""Evaluations of a network captured as CUDA graphs, one for each shape of the arguments."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cuda_graph import Replay, capture, failure

_KEPT = 4  # graphs, each with the memory of an evaluation


class CapturedNetwork:
    """Evaluates `network(*arguments)` on a GPU, and replays a CUDA graph of it from the second call of a shape on.

    The host needs longer to launch the kernels of small batches one by one than the GPU to run them. `network` returns
    one tensor, and reads nothing that may change but its arguments. The last four shapes are kept. Calls from several
    threads or streams follow one another: they share the memory of the graph. If a shape cannot be captured, a warning
    gives the reason and all are launched one by one.
    """

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self._network = network
        self._graphs: OrderedDict[tuple[object, ...], _Graph | None] = OrderedDict()
        self._captures = True

    def __call__(self, arguments: Sequence[Tensor]) -> Tensor:
        """Return the network's output, which later calls do not write to."""
        key = tuple((a.shape, a.ndim > 0 and a.stride(0) == 0, a.dtype, a.device) for a in arguments)
        graph = self._graphs.get(key)
        if not self._captures or (graph is None and key not in self._graphs):  # the first of a shape may be the last
            self._keep(key, None)
            return self._network(*arguments)
        if graph is None:
            try:
                graph = _Graph(self._network, arguments)
            except RuntimeError as error:
                warnings.warn(
                    f"evaluating without a CUDA graph, since it could not be captured: {failure(error)}", stacklevel=3
                )
                self._captures = False
                return self._network(*arguments)
        self._keep(key, graph)
        return graph(arguments)

    def _keep(self, key: tuple[object, ...], graph: "_Graph | None") -> None:
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        if len(self._graphs) > _KEPT:
            self._graphs.popitem(last=False)


class _Graph:
    """One captured evaluation, with the tensors that it reads."""

    def __init__(self, network: Callable[..., Tensor], arguments: Sequence[Tensor]) -> None:
        # A tensor expanded from one row stays one: the network computes it once.
        self._rows = [a[:1].clone() if a.ndim and a.stride(0) == 0 else a.clone() for a in arguments]
        inputs = [row.expand(a.shape) for row, a in zip(self._rows, arguments, strict=True)]
        self._out = inputs[0]

        def evaluate() -> None:
            self._out = network(*inputs)

        device = arguments[0].device
        self._replay: Replay = capture(evaluate, lambda: None, device)
        self._read = torch.cuda.current_stream(device).record_event()

    def __call__(self, arguments: Sequence[Tensor]) -> Tensor:
        stream = torch.cuda.current_stream(arguments[0].device)
        stream.wait_event(self._read)
        for row, given in zip(self._rows, arguments, strict=True):
            row.copy_(given[: len(row)] if given.ndim else given)
        self._replay()
        out = self._out.clone()
        self._read = stream.record_event()
        return out
