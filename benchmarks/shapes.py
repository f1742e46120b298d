"""The calls of `fastddpm.ops` that a training step and a sampling step of each preset make, without computing them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.kernels.reverse_step import COLUMNS, FIXED
from fastddpm.presets import PRESETS
from fastddpm.unet import GroupNormSiLU, UNet


@dataclass(frozen=True)
class Call:
    """One call of torch.ops.fastddpm.`name`; its tensors are on the meta device: shapes, dtypes and strides only."""

    name: str
    args: tuple[Any, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that do the same work."""
        return self.name, *(
            (value.dtype, tuple(value.shape), value.stride()) if isinstance(value, Tensor) else str(value)
            for name, value in named(self).items()
            if name != "layer"
        )


def named(call: Call) -> dict[str, Any]:
    """The arguments of a call by name."""
    schema = getattr(torch.ops.fastddpm, call.name).default._schema
    return dict(zip([argument.name for argument in schema.arguments], call.args, strict=True))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastddpm":
            # A convolution of meta tensors does not say that a GPU's gives channels_last for weights in channels_last.
            laid_out = tuple(
                arg.contiguous(memory_format=torch.channels_last) if isinstance(arg, Tensor) and arg.ndim == 4 else arg
                for arg in args
            )
            self.calls.append(Call(func.__name__.partition(".")[0], laid_out))
        return func(*args, **(kwargs or {}))


def network_calls(preset: str, batch: int, dtype: torch.dtype, *, training: bool) -> list[Call]:
    """What the U-Net calls, in order, in channels_last, with norms' weights in float32 as autocast leaves them."""
    config = PRESETS[preset].unet
    with torch.device("meta"):
        unet = UNet(config).to(dtype).channels_last().train(training)
        for module in unet.modules():
            if isinstance(module, GroupNormSiLU):
                module.to(torch.float32)
        size = (batch, config.image_channels, config.image_size, config.image_size)
        x = torch.empty(size, dtype=dtype).to(memory_format=torch.channels_last)
        t = torch.empty(batch, dtype=torch.int64)
        label = torch.empty(batch, dtype=torch.int64) if config.num_classes else None
    with _Recorder() as recorder, torch.set_grad_enabled(training):
        out = unet(x, t, label)
        if training:
            out.sum().backward()
    return recorder.calls


def step_calls(preset: str, batch: int, dtype: torch.dtype) -> list[Call]:
    """The operations around the network: x_T, q_sample of bytes with and without flips, and a reverse step."""
    config = PRESETS[preset].unet
    shape = (config.image_channels, config.image_size, config.image_size)

    def meta(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    images, seed, step, t = meta(batch), meta(), meta(), meta(batch)
    x0, table = meta(batch, *shape, dtype=torch.uint8), meta(1000, 2, dtype=torch.float32)
    x, out = meta(batch, *shape, dtype=torch.float32), meta(batch, *shape, dtype=dtype)
    rows, timesteps = meta(1000, COLUMNS, dtype=torch.float32), meta(1000)
    return [
        Call("random_normal", (list(shape), images, seed, step, 0)),
        Call("q_sample", (x0, t, table, None, None, images, seed, step)),
        Call("q_sample", (x0, t, table, meta(batch, dtype=torch.bool), None, images, seed, step)),
        Call("reverse_step", (x, out.to(memory_format=torch.channels_last), rows, timesteps, step, images, seed, 1.0,
                              FIXED, None, None)),
    ]  # fmt: skip


def engine_calls(preset: str, batch: int, dtype: torch.dtype) -> list[Call]:
    """What only the network prepared for a GPU calls: attention with its residual, shortcuts, sums, and both ends."""
    config, calls = PRESETS[preset].unet, []

    def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        made = torch.empty(size, dtype=dtype, device="meta")
        return made.to(memory_format=torch.channels_last) if len(size) == 4 else made

    levels = [(c, config.image_size // 2**i) for i, c in enumerate(config.level_channels)]
    shapes = {level for level, attends in zip(levels, config.attends, strict=True) if attends} | {levels[-1]}
    for c, size in sorted(shapes):
        rows = meta(batch, size * size, c)
        calls.append(Call("add_attention", (rows, rows, rows, rows, c**-0.5)))
    for c, size in levels:
        x, norm = meta(batch, c, size, size), meta(c, dtype=torch.float32)
        added = meta(1, c).expand(batch, -1)
        rest = (None, added, None, None, True, dtype)
        calls.append(Call("inference_norm", (x, x, norm, norm, config.groups, 1e-6, *rest)))
    for (c, size), inputs in itertools.product(sorted(shapes), (2, 1)):  # a shortcut over h and a skip, or h alone
        x, image = meta(batch, c, size, size), meta(batch, 2 * c // inputs, size, size)
        skip = x if inputs == 2 else None
        weight = meta(image.shape[1], inputs * c)
        calls.append(Call("add_product", (image, x, skip, weight, meta(image.shape[1]))))
    ends, size = config.image_channels, (config.image_size, config.image_size)
    x, out = torch.empty(batch, ends, *size, device="meta"), meta(batch, 8, *size)
    calls.append(Call("conv3x3_in", (x, meta(config.width, ends, 3, 3), True)))
    calls.append(Call("convert_image", (out, None, meta(ends), ends, True, dtype, True)))
    wide = meta(batch, config.width, *size)
    calls.append(Call("convert_image", (wide, wide, meta(config.width), config.width, False, dtype, True)))
    return calls


def distinct(calls: list[Call]) -> Iterator[tuple[Call, int]]:
    """Each kind of call once, and how often it is made."""
    counts: dict[tuple[Any, ...], int] = {}
    for call in calls:
        counts[call.key] = counts.get(call.key, 0) + 1
    seen = set()
    for call in calls:
        if call.key not in seen:
            seen.add(call.key)
            yield call, counts[call.key]


def describe(call: Call) -> str:
    """The operation with the shapes that tell its calls apart."""
    tensors = [arg for arg in call.args if isinstance(arg, Tensor) and arg.ndim >= 2]
    return " ".join(["x".join(map(str, tensor.shape)) for tensor in tensors[:1]])
