"""A training step captured as a CUDA graph: one launch in place of more than a thousand."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm.sampling.cuda_graph import Replay, capture, failure

WARM_UP = 3  # steps launched one by one, in which kernels are compiled and choose their algorithms

Step = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, ...]]


def _nothing() -> None:
    pass


class CapturedStep:
    """Calls `step(images, labels, number)`, from the fourth call on by replaying its CUDA graph.

    `step` may read the arguments, which are on `device` and have the same shapes in every call, and tensors that stay
    where they are; what it takes from the host is part of the graph. Its results are 0-d tensors. If it cannot be
    captured, a warning gives the reason and it is called as it is.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device, self._left = step, device, WARM_UP
        self._inputs: tuple[Tensor | None, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._replay: Replay | None = None

    def __call__(self, images: Tensor, labels: Tensor | None, number: Tensor) -> tuple[Tensor, ...]:
        if self._left:
            self._left -= 1
            return self._step(images, labels, number)
        given = (images, labels, number)
        if self._replay is None:
            self._inputs = tuple(None if tensor is None else tensor.clone() for tensor in given)
            self._replay = self._captured()
        for held, tensor in zip(self._inputs, given, strict=True):
            if held is not None and tensor is not None:
                held.copy_(tensor)
        self._replay()
        return tuple(tensor.clone() for tensor in self._outputs)  # the next replay writes over them

    def _captured(self) -> Replay:
        images, labels, number = self._inputs
        assert images is not None and number is not None

        def step() -> None:
            self._outputs = self._step(images, labels, number)

        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what the steps before took: a graph has memory of its own
        try:
            return capture(step, _nothing, self._device, warm_up=0)
        except RuntimeError as error:
            warnings.warn(
                f"training without a CUDA graph, since a step could not be captured: {failure(error)}", stacklevel=4
            )
            return step
