"""The U-Net for inference on a CPU, evaluated by the compiled library.

A plan for one batch size is a list of library calls over buffers that are allocated once. A residual block takes four
or five calls: the statistics of GroupNorm, then a convolution that applies GroupNorm and SiLU to its input as it reads
it, and adds bias, time embedding and residual as it writes. Skips are read in place, upsampling is a change of index,
and the projections of the time embedding are computed for all timesteps at once.
"""

import ctypes
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastddpm.kernels import interface, native
from fastddpm.kernels.conv3x3 import algorithm_for, bf16_algorithm_for
from fastddpm.runtime.device import one_thread
from fastddpm.unet import AttnBlock, GroupNormSiLU, Level, ResBlock, UNet

from .current import Weights


class PreparedUNet:
    """Evaluates a U-Net in evaluation mode: `PreparedUNet(unet, timesteps)(x_t, t, label)`.

    The result equals that of `unet` within float32 rounding. `precision`: with bfloat16, the factors of products are
    rounded to it where `bf16_algorithm_for` says so; sums, norms, softmax, residuals and all that is stored stay
    float32.

    `x_t`: float32 (N, C, H, W), any strides. `t`: int64 (N,); values in `timesteps` are fastest. `label`: int64 (N,) if
    the network takes labels. Returns float32 (N, C or 2C, H, W). The bits of an image's result depend neither on the
    rest of the batch nor on the number of threads. The weights of convolutions and linear layers are copied, in the
    order in which they are read; `stale` tells whether the network's have changed since. Raises RuntimeError without
    the compiled library.
    """

    def __init__(self, unet: UNet, timesteps: Sequence[int] = (), precision: torch.dtype = torch.float32) -> None:
        native.library()
        self.unet, self.precision = unet, precision
        self._weights = Weights(unet)
        self._blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
        with torch.no_grad():
            self._rows = {} if unet.label is not None or not len(timesteps) else self._rows_for(timesteps)
        self._layers: dict[int, _Layer] = {}
        self._plan: _Plan | None = None
        self._lock = threading.Lock()  # a plan's buffers serve one call at a time

    def stale(self) -> bool:
        """Whether the network's weights have been changed or replaced since this object was made."""
        return self._weights.changed()

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.unet.check(x_t, t, label)
        if not len(x_t):
            return x_t.new_empty(0, self.unet.conv_out.out_channels, *x_t.shape[2:])
        with self._lock, torch.no_grad():
            key = (len(x_t), torch.get_num_threads())
            if self._plan is None or self._plan.key != key:
                self._plan = None  # frees its memory before the next one takes some
                self._plan = _Plan(self.unet, self._blocks, self._layers, self.precision, key)
            x = x_t.to(torch.float32).contiguous(memory_format=torch.channels_last)
            return self._plan.run(x, self._projections(t, label))

    def _projections(self, t: Tensor, label: Tensor | None) -> Tensor:
        """Return the projections of the time embedding for all residual blocks side by side, (N, sum of channels).

        With labels, each (t, label) is computed alone, because the bits of a matrix product depend on its number of
        rows.
        """
        if label is None:
            values = t.tolist()
            for value in set(values) - self._rows.keys():
                self._rows |= self._rows_for([value])
            return torch.stack([self._rows[value] for value in values])
        pairs = list(zip(t.tolist(), label.tolist(), strict=True))
        rows = {}
        for pair in set(pairs):
            embedding = self.unet.embed(*(torch.tensor([value], device="cpu") for value in pair))
            rows[pair] = self._project(embedding)[0]
        return torch.stack([rows[pair] for pair in pairs])

    def _rows_for(self, timesteps: Sequence[int]) -> dict[int, Tensor]:
        """Return the projections of the time embedding at each timestep, without labels."""
        with one_thread():  # with more, a matrix product may be summed in another order
            embedding = self.unet.embed(torch.tensor([int(t) for t in timesteps], device="cpu"), None)
            return dict(zip((int(t) for t in timesteps), self._project(embedding), strict=True))

    def _project(self, activated_temb: Tensor) -> Tensor:
        return torch.cat([block.temb_proj(activated_temb) for block in self._blocks], dim=1)


def _empty(*shape: int) -> Tensor:
    """Return an uninitialised float32 tensor on the CPU, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class _Layer:
    """The weights of a convolution or linear layer, as the library reads them."""

    packed: Tensor
    bias: Tensor
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    pad: int
    algorithm: int
    precision: int


def _layer(module: nn.Module, height: int, width: int, doubled: bool, precision: torch.dtype) -> _Layer:
    """Pack the weights of a convolution or linear layer, or of q, k and v of an attention block as one layer.

    `height`, `width`: size of the output, on which the choice of the algorithm depends. `doubled`: its input is.
    """
    if isinstance(module, AttnBlock):
        weights, biases = zip(*((layer.weight, layer.bias) for layer in (module.q, module.k, module.v)), strict=True)
        weight, bias = torch.cat(weights), torch.cat(biases)
    else:
        weight, bias = cast(Tensor, module.weight), cast(Tensor, module.bias)
    stride, pad = (module.stride[0], int(module.padding[0])) if isinstance(module, nn.Conv2d) else (1, 0)
    if weight.ndim == 2:
        weight = weight[:, :, None, None]
    k, c, kernel, _ = weight.shape
    low = None
    if precision == torch.bfloat16:
        low = bf16_algorithm_for("inference", kernel, stride, c, k, height, width, doubled)
    algorithm = algorithm_for(kernel, stride, c, height, width) if low is None else low
    factors = native.dtype_code(torch.float32 if low is None else precision)
    packed = _packed(weight, stride, pad, algorithm, factors)
    return _Layer(packed, bias, c, k, kernel, stride, pad, algorithm, factors)


def _packed(weight: Tensor, stride: int, pad: int, algorithm: int, precision: int) -> Tensor:
    """Return the weights of a convolution, float32 (K, C, k, k), in the order in which the library reads them."""
    k, c, kernel, _ = weight.shape
    args = interface.Conv(
        weight=weight.data_ptr(), weight_stride=(ctypes.c_int64 * 4)(*weight.stride()), c1=c, k=k, kernel=kernel,
        stride=stride, pad=pad, x_stride=(ctypes.c_int64 * 4)(0, 0, 0, 1), algorithm=algorithm, precision=precision,
    )  # fmt: skip
    library = native.library()
    num_bytes = library.fastddpm_cpu_conv_packed_bytes(ctypes.byref(args))
    packed = _empty(num_bytes // 4)
    native.check("conv", library.fastddpm_cpu_conv_pack(ctypes.byref(args), ctypes.c_void_p(packed.data_ptr())))
    return packed


class _Arena:
    """Allocates the buffers of a plan while it is built; released memory is handed out again. Holders are counted."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._owners: dict[int, tuple[Tensor, int]] = {}

    def take(self, *shape: int) -> Tensor:
        """Return an uninitialised float32 tensor, with one holder, in memory that no held tensor uses."""
        count = torch.Size(shape).numel()
        fitting = [storage for storage in self._free if storage.numel() >= count]
        if fitting:
            storage = min(fitting, key=Tensor.numel)
            self._free = [other for other in self._free if other is not storage]
        else:
            storage = _empty(count)
        self._owners[storage.data_ptr()] = (storage, 1)
        return storage[:count].view(shape)

    def hold(self, tensor: Tensor) -> None:
        """Add a holder of `tensor`."""
        storage, owners = self._owners[tensor.data_ptr()]
        self._owners[tensor.data_ptr()] = (storage, owners + 1)

    def shared(self, tensor: Tensor) -> bool:
        """Whether `tensor` has more than one holder, and so must not be overwritten."""
        return self._owners[tensor.data_ptr()][1] > 1

    def release(self, *tensors: Tensor) -> None:
        """Remove a holder of each tensor; the memory of one without holders is free again."""
        for tensor in tensors:
            storage, owners = self._owners.pop(tensor.data_ptr())
            if owners > 1:
                self._owners[tensor.data_ptr()] = (storage, owners - 1)
            else:
                self._free.append(storage)


class _Plan:
    """The library calls that evaluate the network for a batch of `key[0]` images with `key[1]` threads."""

    def __init__(
        self, unet: UNet, blocks: list[ResBlock], layers: dict[int, _Layer], precision: torch.dtype,
        key: tuple[int, int],
    ) -> None:  # fmt: skip
        self.key, self._precision = key, precision
        self._batch, self._threads = key
        self._library, self._layers = native.library(), layers
        self._arena = _Arena()
        self._calls: list[tuple[str, ctypes.Structure]] = []
        self._workspace_bytes = 0
        widths = [block.temb_proj.out_features for block in blocks]
        self._temb = _empty(self._batch, sum(widths))
        self._temb_at = {id(block): sum(widths[:i]) for i, block in enumerate(blocks)}
        widest = max(max(m.weight.numel() for m in unet.modules() if isinstance(m, GroupNormSiLU)), 1)
        self._gain, self._offset = _empty(self._batch, widest), _empty(self._batch, widest)

        _, height, width = unet.image_shape
        self._output_shape = (self._batch, height, width, unet.conv_out.out_channels)
        self._input, self._output = self._build(unet)
        # One page of 4096 bytes more, so that the workspace can begin at a page. The structures hold addresses only;
        # the attribute keeps the memory alive.
        self._workspace = _empty(self._workspace_bytes // 4 + 1024)
        address = -(-self._workspace.data_ptr() // 4096) * 4096
        for _, args in self._calls:
            if hasattr(args, "workspace"):
                args.workspace = address
        self._functions = [
            (getattr(self._library, f"fastddpm_cpu_{name}"), ctypes.byref(args), name) for name, args in self._calls
        ]

    def run(self, x_t: Tensor, projections: Tensor) -> Tensor:
        """Evaluate the network for `x_t`, float32 in channels_last, and the projections of the time embedding."""
        self._temb.copy_(projections)
        out = _empty(*self._output_shape)
        self._input.x, self._output.out = x_t.data_ptr(), out.data_ptr()
        self._input.x_stride[:] = [x_t.stride(i) for i in (0, 2, 3, 1)]
        for function, args, name in self._functions:
            code = function(args, self._threads)
            if code:
                native.check(name, code)
        return out.permute(0, 3, 1, 2)

    def _build(self, unet: UNet) -> tuple[interface.Conv, interface.Conv]:
        """Append all calls of the network, in order; return the structures that hold its input and its output."""
        arena = self._arena
        channels, height, width = unet.image_shape
        x_t = _empty(self._batch, height, width, channels)  # only its shape counts; `run` gets the data
        h = self._conv(unet.conv_in, x_t)
        entry = cast(interface.Conv, self._calls[-1][1])
        skips = [h]
        for level in cast(Iterable[Level], unet.down):
            for i, block in enumerate(level.blocks):
                arena.hold(h)
                h = self._attend(level, i, self._res_block(cast(ResBlock, block), h, None))
                skips.append(h)
            if isinstance(level.resample, ResBlock):
                arena.hold(h)
                h = self._resampling_block(level.resample, h)
                skips.append(h)
            elif level.resample is not None:
                h = self._conv(level.resample.conv, h)
                skips.append(h)
        arena.hold(h)
        h = self._res_block(unet.mid.block1, h, None)
        h = h if unet.mid.attention is None else self._attention(unet.mid.attention, h)
        h = self._res_block(unet.mid.block2, h, None)
        for level in cast(Iterable[Level], unet.up):
            for i, block in enumerate(level.blocks):
                h = self._attend(level, i, self._res_block(cast(ResBlock, block), h, skips.pop()))
            if isinstance(level.resample, ResBlock):
                h = self._resampling_block(level.resample, h)
            elif level.resample is not None:
                low = h
                h = self._conv(level.resample.conv, low, doubled=True)
                arena.release(low)
        self._conv(unet.conv_out, h, norm=unet.norm_out, out=_empty(*self._output_shape))
        return entry, cast(interface.Conv, self._calls[-1][1])

    def _res_block(self, block: ResBlock, h: Tensor, skip: Tensor | None) -> Tensor:
        """Append the calls of a residual block and return its output. Releases `h` and `skip`."""
        before, after = self._temb_columns(block)
        residual = self._conv(block.conv1, h, skip=skip, norm=block.norm1, temb=before)
        if block.shortcut is not None:
            out = self._conv(block.shortcut, h, skip=skip)
            self._arena.release(h)
        elif self._arena.shared(h):
            out = self._conv(block.conv2, residual, norm=block.norm2, scale_shift=after, residual=h)
            self._arena.release(h, residual)
            return out
        else:
            out = h
        self._conv(block.conv2, residual, norm=block.norm2, scale_shift=after, residual=out, out=out)
        self._arena.release(residual, *([] if skip is None else [skip]))
        return out

    def _resampling_block(self, block: ResBlock, h: Tensor) -> Tensor:
        """Append the calls of a residual block that resamples and return its output. Releases `h`."""
        assert block.shortcut is None  # as many channels come out as go in
        before, after = self._temb_columns(block)
        if block.resample == "up":
            residual = self._conv(block.conv1, h, norm=block.norm1, temb=before, doubled=True)
        else:
            low = self._resample(h, norm=block.norm1)
            residual = self._conv(block.conv1, low, temb=before)
            self._arena.release(low)
        out = self._resample(h, doubled=block.resample == "up")
        self._arena.release(h)
        self._conv(block.conv2, residual, norm=block.norm2, scale_shift=after, residual=out, out=out)
        self._arena.release(residual)
        return out

    def _temb_columns(self, block: ResBlock) -> tuple[int | None, int | None]:
        """Return the block's first column of the projections, if they are added before the second norm, or after it."""
        first = self._temb_at[id(block)]
        return (None, first) if block.scale_shift else (first, None)

    def _attend(self, level: Level, index: int, h: Tensor) -> Tensor:
        return self._attention(cast(AttnBlock, level.attentions[index]), h) if len(level.attentions) else h

    def _attention(self, block: AttnBlock, h: Tensor) -> Tensor:
        n, height, width, c = h.shape
        tokens, out = height * width, self._arena.take(n, height, width, c)
        qkv = self._conv(block, h, norm=block.norm)
        triple, single = (ctypes.c_int64 * 2)(tokens * 3 * c, 3 * c), (ctypes.c_int64 * 2)(tokens * c, c)
        start = qkv.data_ptr()
        args = interface.Attention(
            q=start, k=start + 4 * c, v=start + 8 * c, out=out.data_ptr(),
            n=n * block.heads, l=tokens, c=c // block.heads, heads=block.heads, scale=(c // block.heads) ** -0.5,
            q_stride=triple, k_stride=triple, v_stride=triple, out_stride=single, dtype=interface.FLOAT32,
            precision=native.dtype_code(self._precision),
        )  # fmt: skip
        self._calls.append(("attention", args))
        self._arena.release(qkv)
        self._conv(block.proj, out, residual=h, out=h)
        self._arena.release(out)
        return h

    def _conv(
        self, module: nn.Module, h: Tensor, *, skip: Tensor | None = None, norm: GroupNormSiLU | None = None,
        temb: int | None = None, scale_shift: int | None = None, residual: Tensor | None = None,
        out: Tensor | None = None, doubled: bool = False,
    ) -> Tensor:  # fmt: skip
        """Append the calls for conv(silu(norm(concat(h, skip)))) + bias + temb + residual; return the output.

        `temb`: the block's first column of the projections. `scale_shift`: that of those which scale and shift the
        norm's output. `out`: where to write. Default: a buffer from the arena. `doubled`: upsample h by 2 first, by the
        nearest neighbour.
        """
        stride = module.stride[0] if isinstance(module, nn.Conv2d) else 1
        factor = 2 if doubled else 1
        out_height, out_width = h.shape[1] * factor // stride, h.shape[2] * factor // stride
        layer = self._layers.get(id(module))
        if layer is None:
            layer = self._layers[id(module)] = _layer(module, out_height, out_width, doubled, self._precision)
        n, height, width, c1 = h.shape
        c2 = 0 if skip is None else skip.shape[3]
        if norm is not None:
            self._norm(norm, h, skip, scale_shift)
        if out is None:
            out = self._arena.take(n, out_height, out_width, layer.out_channels)
        args = interface.Conv(
            x=h.data_ptr(), skip=native.pointer(skip), packed=layer.packed.data_ptr(),
            bias=layer.bias.data_ptr(),
            gain=None if norm is None else self._gain.data_ptr(),
            offset=None if norm is None else self._offset.data_ptr(),
            temb=self._column(temb), temb_stride=self._temb.shape[1],
            residual=native.pointer(residual), out=out.data_ptr(),
            n=n, height=height, width=width, c1=c1, c2=c2, k=layer.out_channels,
            x_stride=(ctypes.c_int64 * 4)(*h.stride()), kernel=layer.kernel, stride=layer.stride,
            pad=layer.pad, doubled=doubled, silu=norm is not None and norm.silu,
            algorithm=layer.algorithm, precision=layer.precision,
        )  # fmt: skip
        args.workspace_bytes = self._library.fastddpm_cpu_conv_workspace(ctypes.byref(args), self._threads)
        self._workspace_bytes = max(self._workspace_bytes, args.workspace_bytes)
        self._calls.append(("conv", args))
        return out

    def _column(self, index: int | None) -> int | None:
        """Return the address of a column of the projections, None without one."""
        return None if index is None else self._temb.data_ptr() + 4 * index

    def _resample(self, h: Tensor, *, norm: GroupNormSiLU | None = None, doubled: bool = False) -> Tensor:
        """Append the calls that average 2x2 pixels of h, or with `norm` of silu(norm(h)), or double those of h."""
        n, height, width, c = h.shape
        if norm is not None:
            self._norm(norm, h, None, None)
        shape = (2 * height, 2 * width) if doubled else (height // 2, width // 2)
        out = self._arena.take(n, *shape, c)
        args = interface.Resample(
            x=h.data_ptr(), gain=None if norm is None else self._gain.data_ptr(),
            offset=None if norm is None else self._offset.data_ptr(), out=out.data_ptr(),
            n=n, height=height, width=width, c=c, doubled=doubled,
        )  # fmt: skip
        self._calls.append(("resample", args))
        return out

    def _norm(self, norm: GroupNormSiLU, h: Tensor, skip: Tensor | None, scale_shift: int | None) -> None:
        shift = None if scale_shift is None else scale_shift + norm.weight.numel()
        args = interface.NormAffine(
            x=h.data_ptr(), skip=native.pointer(skip), weight=norm.weight.data_ptr(), bias=norm.bias.data_ptr(),
            scale=self._column(scale_shift), shift=self._column(shift), scale_stride=self._temb.shape[1],
            gain=self._gain.data_ptr(), offset=self._offset.data_ptr(), n=len(h), pixels=h.shape[1] * h.shape[2],
            c1=h.shape[3], c2=0 if skip is None else skip.shape[3], groups=norm.groups, eps=norm.eps,
        )  # fmt: skip
        args.workspace_bytes = self._library.fastddpm_cpu_norm_affine_workspace(ctypes.byref(args))
        self._workspace_bytes = max(self._workspace_bytes, args.workspace_bytes)
        self._calls.append(("norm_affine", args))
