"""Calls of group_norm_silu to a compiled library, for cpu.py and cuda.py."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import interface
from ..philox import STREAM_DROPOUT
from . import Arguments


class NativeCall:
    """One call: the library's structure `args`, and the dense tensors that it points to.

    `parameter_dtype`: the dtype in which the library reads weight, bias, temb, scale and shift. A subclass names the
    `library` (kernels/native.py or native_cuda.py) and runs its operations.
    """

    library: ModuleType

    def __init__(self, a: Arguments, parameter_dtype: torch.dtype) -> None:
        self.a, self.given, self.memory_format = a, a.parameters, a.memory_format
        self.x, self.skip = self.dense(a.x), None if a.skip is None else self.dense(a.skip)
        self.images = None if a.images is None else a.images.contiguous()
        self.parameters = {
            name: None if parameter is None else parameter.to(parameter_dtype) for name, parameter in self.given.items()
        }
        # Rows of temb may be one row, repeated: its channels alone must be adjacent.
        for name, parameter in self.parameters.items():
            if parameter is not None and not (name == "temb" and parameter.stride(1) == 1):
                self.parameters[name] = parameter.contiguous()
        temb = self.parameters["temb"]
        n, c1, height, width = a.x.shape
        self.args = interface.GroupNormSiLU(
            n=n, c1=c1, c2=a.channels - c1, height=height, width=width, groups=a.groups, eps=a.eps, silu=a.silu,
            dropout=round(a.dropout * 65536) / 65536,  # float32 holds it exactly
            dropout_stream=STREAM_DROPOUT + 256 * a.layer, temb_stride=0 if temb is None else temb.stride(0),
            layout=interface.NHWC if self.memory_format == torch.channels_last else interface.NCHW,
            dtype=self.library.dtype_code(a.x.dtype), param_dtype=self.library.dtype_code(parameter_dtype),
        )  # fmt: skip
        self.point(x=self.x, skip=self.skip, **self.parameters)
        if a.dropout > 0:
            self.args.key = self.library.key(self.images, a.seed, a.step)

    def run(self, operation: str) -> None:
        """Run `operation` of the library on `args`."""
        raise NotImplementedError

    def dense(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self.memory_format)

    def image(self, channels: int) -> Tensor:
        """Return an uninitialised image tensor in x's dtype, in the output's layout."""
        n, _, height, width = self.x.shape
        return torch.empty(
            (n, channels, height, width), dtype=self.x.dtype, device=self.x.device, memory_format=self.memory_format
        )

    def numbers(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def point(self, **tensors: Tensor | None) -> None:
        """Fill in pointers of the structure."""
        pointer = self.library.pointer
        for name, tensor in tensors.items():
            setattr(self.args, name, pointer(tensor))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the same as the reference, statistics in float32."""
        statistics = (self.a.x.shape[0], self.a.groups)
        y, mean, rstd = self.image(self.a.channels), self.numbers(statistics), self.numbers(statistics)
        self.point(y=y, mean=mean, rstd=rstd)
        self.run("group_norm_silu")
        return y, mean, rstd

    def backward(
        self, grad: Tensor, mean: Tensor, rstd: Tensor, added_x: Tensor | None, added_skip: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Compute the same as the reference. Sums are float32 and in a fixed order: the same bits on every run."""
        a, given = self.a, self.given
        grad, mean, rstd = self.dense(grad.to(a.x.dtype)), mean.contiguous(), rstd.contiguous()
        grad_x, grad_skip = self.image(a.x.shape[1]), None if a.skip is None else self.image(a.skip.shape[1])
        sums = {name: self.numbers(like.shape) for name, like in given.items() if like is not None}
        self.point(grad=grad, mean=mean, rstd=rstd, grad_x=grad_x, grad_skip=grad_skip)
        self.point(**{f"grad_{name}": tensor for name, tensor in sums.items()})
        self.run("group_norm_silu_backward")
        for gradient, added in ((grad_x, added_x), (grad_skip, added_skip)):
            if gradient is not None and added is not None:
                gradient.add_(added)
        return (
            grad_x,
            a.x.new_empty(0) if grad_skip is None else grad_skip,
            *(a.x.new_empty(0) if like is None else sums[name].to(like.dtype) for name, like in given.items()),
        )
