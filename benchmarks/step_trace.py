"""Traces the GPU kernels of a step on meta tensors: what each reads, writes and multiplies. Needs no GPU."""

import contextlib
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from resources import replaced
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastddpm import diffusion as diffusion_module
from fastddpm.config import EngineConfig, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.kernels import triton_launch
from fastddpm.kernels.reverse_step import COLUMNS
from fastddpm.ops import registry
from fastddpm.ops.noise import NoiseKey
from fastddpm.presets import PRESETS
from fastddpm.sampling.chain import ChainTables, ReverseChain
from fastddpm.sampling.engine import PRECISIONS, fused
from fastddpm.unet import UNet, meta_network, network_with

aten = torch.ops.aten
DEVICE = torch.device("meta")
# Operators that launch nothing: they make or rename memory.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view",
         "lift_fresh", "_reshape_alias", "set_", "resize_"}  # fmt: skip
_COPIES = {"clone", "_to_copy", "copy_", "cat", "flip", "index_select", "constant_pad_nd"}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
_FLOAT64_A_NORMAL = 29  # as in limits.py
_CAST = (nn.Conv2d, nn.Linear)
# Those whose Triton implementations launch kernels themselves.
_OPERATIONS = ("group_norm_silu", "attention", "add_product", "add_bias", "channel_sums", "convert_image",
               "conv3x3_fp8", "conv3x3_in", "q_sample", "reverse_step", "random_normal")  # fmt: skip
# Tables of which a kernel reads one row.
_TABLES = ("table", "timesteps")


@dataclass(frozen=True)
class Launch:
    """One kernel. `elements`: of a norm's output. `rows`, `channels`: of a convolution, its
    output's pixels (0: as many as it takes) and its channels, in and out.
    """

    kind: str
    name: str
    num_bytes: int
    flop: int = 0
    float64_flop: int = 0
    elements: int = 0
    rows: int = 0
    channels: tuple[int, int] = (8, 8)


def size(*values: Any) -> int:
    """Return the bytes that tensors in `values` occupy; elements that an expanded tensor repeats count once."""
    total = 0
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor):
            total += tensor.element_size() * _distinct(tensor)
    return total


def _distinct(tensor: Tensor) -> int:
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride or not length else 1
    return count


class Trace(TorchDispatchMode):
    """Records the kernels that operators launch on a GPU, those of this package by their Triton implementations."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastddpm":
            return self._own(func.__name__.partition(".")[0], args)
        name = func.overloadpacket.__name__
        if func is aten.convolution.default:
            return self._convolution(func, args)
        if func is aten.convolution_backward.default:
            return self._convolution_backward(func, args)
        with self:  # inside a kernel's caller, operators such as contiguous arrive before they are taken apart
            apart = func.decompose(*args, **kwargs)
        if apart is not NotImplemented:
            return apart
        out = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view and name not in _FREE:
            self._add(func, name, args, kwargs, out)
        return out

    def _add(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not tensors or not any(tensor.numel() for tensor in tensors):
            return
        label = f"{name} {_shape(tensors[0])}"
        if name in _PRODUCTS:
            shape = (*args[-2].shape, args[-1].shape[-1])
            label = f"{name.removesuffix('_')} {'x'.join(map(str, shape))}"
            self.launches.append(Launch("product", label, size(args, out), 2 * math.prod(shape)))
        elif name == "constant_pad_nd":
            self.launches += [Launch("copy", f"pad, fill {_shape(out)}", size(out)),
                              Launch("copy", f"pad, copy {_shape(args[0])}", 2 * size(args[0]))]  # fmt: skip
        else:
            read = [*args, kwargs]
            if name in ("copy_", "fill_", "zero_"):
                read = read[1:]
            if name == "index_select":
                read = [out, args[2]]
            kind = "copy" if name in _COPIES and size(out) > 2**20 else "elementwise"
            self.launches.append(Launch(kind, label, size(read, out)))

    def _convolution(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        """cuDNN's convolution keeps channels_last of either operand; ATen adds the bias by a kernel of its own."""
        x, weight, bias, transposed = args[0], args[1], args[2], args[6]
        out = _laid_out(func(x, weight, None, *args[3:]), x, weight)
        flop = flop_registry[aten.convolution](*args, out_val=out)
        label = f"{'transposed ' if transposed else ''}{_shape(x)} -> {_shape(out)}, {_shape(weight[0, 0])}"
        rows = (x if transposed else out).numel() // (x if transposed else out).shape[1]
        self.launches.append(Launch(
            "convolution", label, size(x, weight, out), flop, rows=rows, channels=(x.shape[1], out.shape[1])
        ))  # fmt: skip
        if bias is not None:
            self.launches.append(Launch("elementwise", f"bias {_shape(out)}", size(out, out, bias)))
        return out

    def _convolution_backward(self, func: Any, args: tuple[Any, ...]) -> Any:
        grad, x, weight, wanted = args[0], args[1], args[2], args[-1]
        flop = 2 * grad.numel() * weight[0].numel()
        rows, inputs, outputs = x.numel() // x.shape[1], x.shape[1], grad.shape[1]
        found = func(*args)
        label = f"{_shape(grad)} -> {_shape(x)}, {_shape(weight[0, 0])}"
        if wanted[0]:
            self.launches.append(Launch("convolution", f"input gradient {label}", size(grad, weight, x), flop,
                                        rows=rows, channels=(outputs, inputs)))  # fmt: skip
        if wanted[1]:
            # The pixels are what is summed over, in as many parts as fill the chip.
            self.launches.append(Launch("convolution", f"weight gradient {label}", size(grad, weight, x), flop,
                                        channels=(inputs, outputs)))  # fmt: skip
        if wanted[2]:
            self.launches.append(Launch("elementwise", f"bias gradient {_shape(grad)}", size(grad)))
        return tuple(_laid_out(one, x, weight) if one is not None and one.ndim == 4 else one for one in found)

    def _own(self, name: str, args: tuple[Any, ...]) -> Any:
        operation = name.removesuffix("_backward")
        schema = getattr(torch.ops.fastddpm, name).default._schema
        named = dict(zip([argument.name for argument in schema.arguments], args, strict=True))
        module = importlib.import_module(f"fastddpm.kernels.{operation}.triton")
        if module.unsupported(**named) is not None:
            slower = "sdpa" if "attention" in operation else "reference"
            module = importlib.import_module(f"fastddpm.kernels.{operation}.{slower}")
        first = len(self.launches)
        with self:
            out = registry.call(module, name, args)
        flop = _attention_flop(name, args)
        if flop:
            # Each of the backward kernels computes the scores, and half of the rest.
            mine = [i for i in range(first, len(self.launches)) if self.launches[i].kind == "attention"]
            for i in mine:
                self.launches[i] = replace(self.launches[i], flop=flop // len(mine))
        return out

    def launched(self, kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
        """Record a launch of a Triton kernel."""
        name = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
        args = tuple(getattr(value, "base", value) for value in args)  # a descriptor's tensor
        named = dict(zip(kernel.arg_names, args, strict=False))
        tensors = {key: value for key, value in named.items() if isinstance(value, Tensor) and key not in _TABLES}
        num_bytes, elements, flop, normals = size(list(tensors.values())), 0, 0, 0
        kind = "elementwise"
        label = next(_shape(value) for value in tensors.values())
        if "norm" in name:
            kind = "norm"
            shown = [_shape(tensors[key]) for key in ("x", "skip") if key in tensors]
            label = " + ".join(shown) or label
            elements = sum(tensors[key].numel() for key in ("x", "skip") if key in tensors)
        elif "attention" in name:
            kind = "attention"
        elif "conv3x3" in name:
            kind = "convolution"
            flop = 2 * tensors["out"].numel() * tensors["weight"][0].numel()
            flop //= 2 if "fp8" in name else 1  # 8-bit products take half the time
        elif name in ("reverse_step", "q_sample", "random_normal"):
            written = "x" if name == "reverse_step" else "x_t" if name == "q_sample" else "out"
            normals = tensors[written].numel()
            num_bytes += size(tensors[written]) if name == "reverse_step" else 0
        elif "product" in name:
            kind, flop = "product", self._product_flop(tensors)
        self.launches.append(Launch(
            kind, f"{name} {label}", num_bytes, flop, _FLOAT64_A_NORMAL * normals, elements,
            tensors["out"].numel() // tensors["out"].shape[1] if "conv3x3_fp8" in name else 0,
            (tensors["x"].shape[1], tensors["out"].shape[1]) if "conv3x3_fp8" in name else (8, 8),
        ))  # fmt: skip

    @staticmethod
    def _product_flop(tensors: dict[str, Tensor]) -> int:
        return 2 * tensors["out"].numel() * tensors["weight"].shape[1]


def _attention_flop(name: str, args: tuple[Any, ...]) -> int:
    if name not in ("attention", "add_attention", "attention_backward"):
        return 0
    n, tokens, channels = args[0].shape
    return 2 * n * tokens**2 * channels * (7 if name.endswith("backward") else 2)


def _laid_out(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    formats = [suggest_memory_format(tensor) for tensor in (x, weight)]
    last = torch.channels_last in formats
    return out.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "1"


@contextlib.contextmanager
def tracing(chip: str = "sm_90") -> Iterator[Trace]:
    """In the block, a trace of what operators would launch on a GPU of type `chip`."""
    trace = Trace()
    with contextlib.ExitStack() as stack:
        for operation in _OPERATIONS:
            module = importlib.import_module(f"fastddpm.kernels.{operation}.triton")
            stack.enter_context(replaced(module, "launch", trace.launched))
            if hasattr(module, "chip"):
                stack.enter_context(replaced(module, "chip", lambda device: chip))
        stack.enter_context(replaced(triton_launch, "interpreted", lambda: False))
        yield trace


class _Unread:
    """In place of a digest of the weights, which meta tensors do not have."""

    def __init__(self, network: UNet) -> None:
        pass


def network_without_memory(config: UNetConfig) -> UNet:
    """Return a network of float32 parameters without memory, in channels_last and evaluation mode."""
    weights = {}
    for name, weight in meta_network(config).state_dict().items():
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        weights[name] = torch.empty(weight.shape, device=DEVICE, memory_format=layout)
    return network_with(config, weights)


def sampling_step(preset: str, batch: int, engine: EngineConfig) -> list[Launch]:
    """Return the kernels of one step of the reverse chain of `batch` images, as a CUDA graph holds them."""
    config = PRESETS[preset]
    shape = (config.unet.image_channels, config.unet.image_size, config.unet.image_size)
    with tracing() as trace, replaced(fused, "Weights", _Unread), torch.device(DEVICE), torch.no_grad():
        unet = network_without_memory(config.unet)
        dtype = PRECISIONS.get(engine.precision, torch.bfloat16)
        network = fused.FusedUNet(unet, config.diffusion.timesteps, engine, dtype)
        rows, seed = torch.empty(config.diffusion.timesteps, COLUMNS), torch.empty((), dtype=torch.int64)
        tables = ChainTables(rows, torch.empty(len(rows), dtype=torch.int64), len(rows), seed, shape, 1.0, "fixed")
        chain = ReverseChain(network, tables, batch, labels=config.unet.num_classes > 0)
        with trace:
            chain.step(False)
    return trace.launches


def training_step(preset: str, batch: int, dtype: torch.dtype) -> list[Launch]:
    """Return the kernels of a training step of `batch` images, launched one by one.

    The convolutions' and the linear layers' weights are float32 and cast to `dtype`, and their gradients are cast back.
    """
    config = PRESETS[preset].unet
    with tracing() as trace, torch.device(DEVICE):
        unet = network_without_memory(config).train().requires_grad_()
        cast = [unet.get_submodule(name) for name, module in unet.named_modules() if isinstance(module, _CAST)]
        for module in cast:
            module.weight = nn.Parameter(module.weight.to(dtype))
        for module in (unet.time1, unet.time2):
            module.to(dtype)
        images = torch.empty(batch, dtype=torch.int64)
        x0 = torch.empty(batch, config.image_channels, config.image_size, config.image_size, dtype=torch.uint8)
        label = images if config.num_classes else None
        key = NoiseKey(torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64), images)
        diffusion = Diffusion(PRESETS[preset].diffusion)

        def network(x_t: Tensor, t: Tensor, *label: Tensor, noise_key: NoiseKey) -> Tensor:
            return unet(x_t.to(dtype), t, *label, noise_key=noise_key)

        network.takes_noise_key = True  # type: ignore[attr-defined]
        without_values = replaced(diffusion_module, "refuse_levels", lambda x0, seen: seen)
        with without_values, replaced(diffusion_module, "evaluate", _evaluate), trace:
            losses, _ = diffusion.loss(network, x0, key, label=label, flip=True)
            (losses.sum() / batch).backward()
    weights = sum(module.weight.numel() for module in cast if dtype != torch.float32)
    return [
        *[one for one in [Launch("copy", "weights cast", 6 * weights)] if weights],
        *trace.launches,
        *[one for one in [Launch("copy", "gradients cast", 6 * weights)] if weights],
        *_optimizer(sum(p.numel() for p in unet.parameters()), len(PRESETS[preset].train.decays)),
    ]  # fmt: skip


def state_bytes(preset: str, dtype: torch.dtype) -> int:
    """Return what training holds beside the cast weights and their gradients: float32 weights and gradients, where
    those are cast, Adam's moments, and the averages.
    """
    count = sum(p.numel() for p in network_without_memory(PRESETS[preset].unet).parameters())
    return 4 * count * (2 * (dtype != torch.float32) + 2 + len(PRESETS[preset].train.decays))


def _evaluate(network: Any, x_t: Tensor, t: Tensor, label: Tensor | None, *, key: NoiseKey, **_: object) -> Tensor:
    """As `runtime.network.evaluate`, without its checks, which read values."""
    out: Tensor = network(x_t, t, *([] if label is None else [label]), noise_key=key)
    return out


def _optimizer(parameters: int, averages: int) -> list[Launch]:
    """Return the passes over all parameters, of 4 bytes each: `training/optimizer.py`."""
    passes = {"gradient norm": 1, "clip": 2, "Adam": 7}
    for i in range(averages):
        passes |= {f"average {i}, difference": 3, f"average {i}, update": 3}
    return [Launch("elementwise", f"optimizer, {name}", 4 * parameters * count) for name, count in passes.items()]
