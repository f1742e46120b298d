"""The 3x3 convolutions of a preset on the CPU: the compiled library against PyTorch, shape by shape.

python benchmarks/convolution.py [--preset cifar10] [--batch 1 8] [--rounds 15] [--out FILE.json]

Columns are milliseconds: PyTorch's convolution in channels_last; Winograd as the operator `conv3x3` calls it, which
transforms and reads the weights anew; both algorithms with packed weights, as the prepared network calls them; and the
gradients, of the input and of weights and bias, by PyTorch and by Winograd. A ratio above 1 is the library's gain over
PyTorch; the errors, of the prepared network's convolution and of the weights' gradient, are of the 2-norm against
float64. The rules of kernels/conv3x3 follow from these tables.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastddpm
from fastddpm.kernels import interface, native
from fastddpm.kernels.conv3x3 import PATCHES, WINOGRAD_4X4, algorithm_for, weight_gradient_wins, winograd_wins
from fastddpm.kernels.conv3x3.cpu import winograd, winograd_input_gradient, winograd_weight_gradient

sys.path.insert(0, str(Path(__file__).parent))
import machine

ALGORITHMS = {"patches": PATCHES, "winograd": WINOGRAD_4X4}


@dataclass(frozen=True, order=True)
class Shape:
    """Height and width of the input, before any doubling; how many of the network's convolutions have this shape."""

    size: int
    channels: int
    out_channels: int
    doubled: bool
    count: int = 1


def shapes_of(preset: str) -> list[Shape]:
    """The 3x3 convolutions with stride 1 of a preset's network."""
    config = fastddpm.preset(preset).unet
    unet = fastddpm.UNet(config).eval()
    found: dict[Shape, int] = {}

    def note(module: torch.nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        if module.stride == (1, 1) and module.kernel_size == (3, 3):
            doubled = bool(getattr(module, "doubled", False))
            shape = Shape(args[0].shape[2], module.in_channels, module.out_channels, doubled)
            found[shape] = found.get(shape, 0) + 1

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    x = torch.zeros(1, config.image_channels, config.image_size, config.image_size)
    label = torch.zeros(1, dtype=torch.int64) if config.num_classes else None
    with torch.no_grad(), fastddpm.ops.use_backend("reference"):
        unet(x, torch.zeros(1, dtype=torch.int64), label)
    return sorted((Shape(**{**asdict(shape), "count": count}) for shape, count in found.items()), reverse=True)


def packed_call(
    x: Tensor, weight: Tensor, bias: Tensor, doubled: bool, algorithm: int
) -> tuple[Callable[[], None], Tensor]:
    """The prepared network's call for x in channels_last, and the tensor (N, H, W, K) that it writes."""
    n, channels, height, width = x.shape
    factor = 2 if doubled else 1
    out = torch.empty(n, factor * height, factor * width, len(weight))
    args = interface.Conv(
        x=x.data_ptr(), weight=weight.data_ptr(), bias=bias.data_ptr(), out=out.data_ptr(), n=n, height=height,
        width=width, c1=channels, k=len(weight), kernel=3, stride=1, pad=1, doubled=doubled, algorithm=algorithm,
        x_stride=(ctypes.c_int64 * 4)(height * width * channels, width * channels, channels, 1),
        weight_stride=(ctypes.c_int64 * 4)(*weight.stride()),
    )  # fmt: skip
    library, threads, reference = native.library(), torch.get_num_threads(), ctypes.byref(args)
    packed = torch.empty(library.fastddpm_cpu_conv_packed_bytes(reference) // 4)
    native.check("conv", library.fastddpm_cpu_conv_pack(reference, ctypes.c_void_p(packed.data_ptr())))
    args.packed = packed.data_ptr()
    args.workspace_bytes = library.fastddpm_cpu_conv_workspace(reference, threads)
    workspace = torch.empty(args.workspace_bytes, dtype=torch.uint8)
    args.workspace = workspace.data_ptr()
    held = (x, weight, bias, packed, workspace)

    def run() -> None:
        assert held
        native.check("conv", library.fastddpm_cpu_conv(reference, threads))

    return run, out


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected).norm() / expected.norm())


def pytorch(x: Tensor, weight: Tensor, bias: Tensor, doubled: bool) -> Tensor:
    return F.conv2d(doubled_image(x) if doubled else x, weight, bias, padding=1)


def doubled_image(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def pytorch_gradients(grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Of x as it enters the convolution, of the weights and of the bias."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )


def measure(shape: Shape, batch: int, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    x = torch.randn(batch, shape.channels, shape.size, shape.size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape.out_channels, shape.channels, 3, 3).contiguous(memory_format=torch.channels_last)
    bias, doubled = torch.randn(shape.out_channels), shape.doubled
    large = doubled_image(x) if doubled else x
    expected = pytorch(x.double(), weight.double(), bias.double(), doubled)
    height = expected.shape[2]
    grad = torch.randn(expected.shape).contiguous(memory_format=torch.channels_last)
    of_weight = [False, True, True]
    expected_gradient = pytorch_gradients(grad.double(), large.double(), weight.double(), of_weight)[1]

    def input_gradient() -> Tensor:
        grad_x = pytorch_gradients(grad, large, weight, [True, False, False])[0]
        return F.avg_pool2d(grad_x, 2, divisor_override=1) if doubled else grad_x

    prepared = {name: packed_call(x, weight, bias, doubled, a) for name, a in ALGORITHMS.items()}
    sides: dict[str, Callable[[], object]] = {
        "pytorch": lambda: pytorch(x, weight, bias, doubled),
        "winograd": lambda: winograd(x, weight, bias, doubled),
        **{f"packed_{name}": run for name, (run, _) in prepared.items()},
        "gradient_pytorch": input_gradient,
        "gradient_winograd": lambda: winograd_input_gradient(grad, weight, doubled),
        "weights_pytorch": lambda: pytorch_gradients(grad, large, weight, of_weight),
        "weights_winograd": lambda: winograd_weight_gradient(grad, x, weight, doubled, True),
    }
    seconds = machine.medians(list(sides.values()), rounds)
    times = {name: 1e3 * value for name, value in zip(sides, seconds, strict=True)}
    chosen = "winograd" if algorithm_for(3, 1, shape.channels, height, height) == WINOGRAD_4X4 else "patches"
    wins = winograd_wins(batch, shape.channels, shape.out_channels, height, height)
    weights_win = weight_gradient_wins(batch, shape.channels, height, height)
    gradient = winograd_weight_gradient(grad, x, weight, doubled, True)[0]
    return {
        **asdict(shape), "batch": batch, "ms": times,
        "operator_uses": "winograd" if wins else "pytorch",
        "prepared_uses": chosen,
        "weights_use": "winograd" if weights_win else "pytorch",
        "operator_ratio": times["pytorch"] / times["winograd"],
        "prepared_ratio": times["pytorch"] / times[f"packed_{chosen}"],
        "gradient_ratio": times["gradient_pytorch"] / times["gradient_winograd"],
        "weights_ratio": times["weights_pytorch"] / times["weights_winograd"],
        "error": relative_error(prepared[chosen][1].permute(0, 3, 1, 2), expected),
        "error_pytorch": relative_error(pytorch(x, weight, bias, doubled), expected),
        "weights_error": relative_error(gradient, expected_gradient),
        "weights_error_pytorch": relative_error(
            pytorch_gradients(grad, large, weight, of_weight)[1], expected_gradient
        ),
    }  # fmt: skip


HEADINGS = (
    "batch size    C ->   K  x | PyTorch winograd ratio | patches winograd  uses  ratio | "
    "gradient winograd ratio | weights' winograd ratio | error | weights' error"
)


def line(row: dict[str, Any]) -> str:
    ms = row["ms"]
    size = f"{row['size']}{'*2' if row['doubled'] else ''}"
    return (
        f"{row['batch']:5} {size:>5} {row['channels']:4} -> {row['out_channels']:3} {row['count']:2} | "
        f"{ms['pytorch']:7.3f} {ms['winograd']:8.3f} {row['operator_ratio']:5.2f} | "
        f"{ms['packed_patches']:7.3f} {ms['packed_winograd']:8.3f} {row['prepared_uses'][:5]:>5} "
        f"{row['prepared_ratio']:6.2f} | "
        f"{ms['gradient_pytorch']:8.3f} {ms['gradient_winograd']:8.3f} {row['gradient_ratio']:5.2f} | "
        f"{ms['weights_pytorch']:8.3f} {ms['weights_winograd']:8.3f} {row['weights_ratio']:5.2f} | "
        f"{row['error']:.1e} (PyTorch {row['error_pytorch']:.1e}) | "
        f"{row['weights_error']:.1e} (PyTorch {row['weights_error_pytorch']:.1e})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("--preset", default="cifar10")
    options = machine.parse(parser, arguments)
    rows = []
    print(HEADINGS)
    for batch in options.batch:
        for shape in shapes_of(options.preset):
            rows.append(measure(shape, batch, options.rounds))
            print(line(rows[-1]), flush=True)
    machine.write(options, preset=options.preset, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
