"""group_norm_silu by the compiled CPU library."""

import torch
from torch import Tensor

from .. import interface, native
from ..native import unavailable
from ..philox import STREAM_DROPOUT
from . import reference

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def unsupported(x: Tensor, **_: object) -> str | None:
    """Why these arguments are left to PyTorch, or None."""
    return native.unsupported_dtype(x)


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


class _Call:
    """The structure of one call, and the tensors that it points to."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        skip: Tensor | None,
        temb: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
        dropout: float,
        images: Tensor | None,
        seed: Tensor | None,
        step: Tensor | None,
        layer: int,
    ) -> None:
        self.memory_format = _memory_format(x)
        self.x, self.skip = self.dense(x), None if skip is None else self.dense(skip)
        parameters = {"weight": weight, "bias": bias, "temb": temb, "scale": scale, "shift": shift}
        self.parameters = {
            name: None if parameter is None else parameter.to(torch.float32).contiguous()
            for name, parameter in parameters.items()
        }
        self.images = None if images is None else images.contiguous()
        n, c1, height, width = x.shape
        self.channels = c1 + (0 if skip is None else skip.shape[1])
        self.args = interface.GroupNormSiLU(
            n=n, c1=c1, c2=self.channels - c1, height=height, width=width, groups=groups, dropout=dropout,
            dropout_stream=STREAM_DROPOUT + 256 * layer, silu=silu,
            layout=interface.NHWC if self.memory_format == torch.channels_last else interface.NCHW,
            dtype=native.dtype_code(x.dtype), param_dtype=interface.FLOAT32,
        )  # fmt: skip
        self.point(x=self.x, skip=self.skip, **self.parameters)
        if dropout > 0:
            assert self.images is not None and seed is not None and step is not None
            self.args.key = native.key(self.images, seed, step)

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self.memory_format)

    def image(self, channels: int) -> Tensor:
        """An uninitialised tensor in x's dtype and layout."""
        n, _, height, width = self.x.shape
        shape = (n, channels, height, width)
        return torch.empty(shape, dtype=self.x.dtype, device="cpu", memory_format=self.memory_format)

    def point(self, **tensors: Tensor | None) -> None:
        """Fill in pointers of the structure."""
        for name, tensor in tensors.items():
            setattr(self.args, name, native.pointer(tensor))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    skip: Tensor | None,
    temb: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    dropout: float,
    images: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, statistics in float32."""
    rest = (skip, temb, scale, shift, silu, dropout, images, seed, step, layer)
    if x.numel() == 0:
        return reference.forward(x, weight, bias, groups, eps, *rest)
    call = _Call(x, weight, bias, groups, *rest)
    y = call.image(call.channels)
    mean, rstd = (torch.empty((len(x), groups), dtype=torch.float32, device="cpu") for _ in range(2))
    call.point(y=y, mean=mean, rstd=rstd)
    call.args.eps = eps
    native.call("group_norm_silu", call.args)
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    skip: Tensor | None,
    temb: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    dropout: float,
    images: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    layer: int,
) -> tuple[Tensor, ...]:
    """As the reference; the same bits with any number of threads."""
    rest = (skip, temb, scale, shift, silu, dropout, images, seed, step, layer)
    if x.numel() == 0:
        return reference.backward(grad, x, weight, bias, mean, rstd, groups, *rest)
    call = _Call(x, weight, bias, groups, *rest)
    grad, mean, rstd = call.dense(grad.to(x.dtype)), mean.contiguous(), rstd.contiguous()
    grad_x, grad_skip = call.image(x.shape[1]), None if skip is None else call.image(skip.shape[1])
    given = {"weight": weight, "bias": bias, "temb": temb, "scale": scale, "shift": shift}
    sums = {
        name: torch.empty(like.shape, dtype=torch.float32, device="cpu")
        for name, like in given.items()
        if like is not None
    }
    call.point(grad=grad, mean=mean, rstd=rstd, grad_x=grad_x, grad_skip=grad_skip)
    call.point(**{f"grad_{name}": tensor for name, tensor in sums.items()})
    native.call("group_norm_silu_backward", call.args)
    return (
        grad_x,
        x.new_empty(0) if grad_skip is None else grad_skip,
        *(x.new_empty(0) if like is None else sums[name].to(like.dtype) for name, like in given.items()),
    )
