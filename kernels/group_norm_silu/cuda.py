"""group_norm_silu by the compiled CUDA library."""

import torch
from torch import Tensor

from .. import interface, native_cuda
from ..native_cuda import unavailable
from ..philox import STREAM_DROPOUT
from . import reference

__all__ = ["backward", "forward", "unavailable", "unsupported"]

# A slab of the image holds whole groups, and its sums must fit in the shared memory of every chip.
_CHANNELS_OF_A_GROUP = 1024


def unsupported(x: Tensor, groups: int, skip: Tensor | None, **rest: object) -> str | None:
    """Why arguments of forward or backward, by name, are left to another backend, or None."""
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if channels * x.shape[2] * x.shape[3] >= 2**31 - 1:
        return f"the CUDA kernels take images of fewer than 2^31 - 1 elements, not {channels}x{x.shape[2]}x{x.shape[3]}"
    if channels > groups * _CHANNELS_OF_A_GROUP:
        return f"the CUDA kernels take up to {_CHANNELS_OF_A_GROUP} channels to a group, not {channels // groups}"
    return native_cuda.unsupported(x=x, skip=skip, **rest)


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _parameter_dtype(*parameters: Tensor | None) -> torch.dtype:
    """What the kernel reads all of them as: their own dtype, or float32 where they differ."""
    dtypes = {parameter.dtype for parameter in parameters if parameter is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


class _Call:
    """The structure of one call, and the dense tensors that it points to."""

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
        native_cuda.on_one_device(
            "group_norm_silu", x, weight, bias, skip, temb, scale, shift, *((images, seed, step) if dropout > 0 else ())
        )
        self.memory_format = _memory_format(x)
        self.x, self.skip = self.dense(x), self.dense(skip)
        dtype = _parameter_dtype(weight, bias, temb, scale, shift)
        parameters = {"weight": weight, "bias": bias, "temb": temb, "scale": scale, "shift": shift}
        self.parameters = {k: None if v is None else v.to(dtype).contiguous() for k, v in parameters.items()}
        self.images = None if images is None else images.contiguous()
        n, c1, height, width = x.shape
        self.channels = c1 + (0 if skip is None else skip.shape[1])
        pointer = native_cuda.pointer
        self.args = interface.GroupNormSiLU(
            x=pointer(self.x), skip=pointer(self.skip), **{k: pointer(v) for k, v in self.parameters.items()},
            n=n, c1=c1, c2=self.channels - c1, height=height, width=width, groups=groups,
            dropout=round(dropout * 65536) / 65536, # of which float32 loses no bit
            dropout_stream=STREAM_DROPOUT + 256 * layer, silu=silu,
            layout=interface.NHWC if self.memory_format == torch.channels_last else interface.NCHW,
            dtype=native_cuda.dtype_code(x.dtype), param_dtype=native_cuda.dtype_code(dtype),
        )  # fmt: skip
        if dropout > 0:
            assert self.images is not None and seed is not None and step is not None
            self.args.key = native_cuda.key(self.images, seed, step)

    def dense(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous(memory_format=self.memory_format)

    def image(self, channels: int) -> Tensor:
        """An uninitialised tensor in x's dtype and layout."""
        assert self.x is not None
        n, _, height, width = self.x.shape
        return torch.empty(
            (n, channels, height, width), dtype=self.x.dtype, device=self.x.device, memory_format=self.memory_format
        )

    def point(self, **tensors: Tensor | None) -> None:
        """Fill in further pointers of the structure."""
        for name, tensor in tensors.items():
            setattr(self.args, name, native_cuda.pointer(tensor))

    def run(self, operation: str) -> None:
        tensors = [tensor for tensor in (self.x, self.skip) if tensor is not None]
        workspace = native_cuda.workspace(self.args, operation.endswith("backward"), tensors)
        native_cuda.call(operation, self.args, tensors, native_cuda.pointer(workspace), workspace.numel())


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
    mean, rstd = (torch.empty((len(x), groups), dtype=torch.float32, device=x.device) for _ in range(2))
    call.point(y=y, mean=mean, rstd=rstd)
    call.args.eps = eps
    call.run("group_norm_silu")
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
    """As the reference; the same bits on every run."""
    rest = (skip, temb, scale, shift, silu, dropout, images, seed, step, layer)
    if x.numel() == 0:
        return reference.backward(grad, x, weight, bias, mean, rstd, groups, *rest)
    native_cuda.on_one_device("group_norm_silu_backward", grad, x, mean, rstd)
    call = _Call(x, weight, bias, groups, *rest)
    grad, mean, rstd = call.dense(grad.to(x.dtype)), mean.contiguous(), rstd.contiguous()  # type: ignore[assignment]
    grad_x, grad_skip = call.image(x.shape[1]), None if skip is None else call.image(skip.shape[1])
    sums = {
        name: None if tensor is None else torch.empty(tensor.shape, dtype=torch.float32, device=x.device)
        for name, tensor in {"weight": weight, "bias": bias, "temb": temb, "scale": scale, "shift": shift}.items()
    }
    call.point(grad=grad, mean=mean, rstd=rstd, grad_x=grad_x, grad_skip=grad_skip)
    call.point(**{f"grad_{name}": tensor for name, tensor in sums.items()})
    call.run("group_norm_silu_backward")

    def given(name: str, like: Tensor | None) -> Tensor:
        gradient = sums[name]
        return x.new_empty(0) if gradient is None or like is None else gradient.to(like.dtype)

    return (
        grad_x, x.new_empty(0) if grad_skip is None else grad_skip, given("weight", weight), given("bias", bias),
        given("temb", temb), given("scale", scale), given("shift", shift),
    )  # fmt: skip
