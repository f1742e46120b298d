"""The error of training in bfloat16 on a CPU: of a network's output and of the gradient of its loss, to float64.

python benchmarks/training_errors.py [--preset mnist cifar10] [--batch 4] [--out FILE.json]

Sides: fastddpm, and plain PyTorch (plain.py), both under torch.autocast in bfloat16, each against its own network in
float64 with the same weights, images and noise. The gradient is that of all parameters as one vector; errors are
relative, of the 2-norm. Weights: as the paper initializes them, and random ones of variance 1 / fan in. No dropout.
"""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastddpm

sys.path.insert(0, str(Path(__file__).parent))
import machine
from plain import PlainUNet


def network(preset: str, weights: str) -> fastddpm.UNet:
    torch.manual_seed(0)
    unet = fastddpm.UNet(fastddpm.preset(preset).unet).channels_last().eval()
    if weights == "random":
        with torch.no_grad():
            for parameter in unet.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return unet


def output_and_gradient(model: nn.Module, arguments: Sequence[Tensor], eps: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient: of the mean square of output - eps, by all parameters, float64."""
    with torch.autocast("cpu", torch.bfloat16, enabled=eps.dtype == torch.float32):
        out = model(*arguments)
    gradients = torch.autograd.grad(F.mse_loss(out.to(eps.dtype), eps), list(model.parameters()))
    return out.detach().double(), torch.cat([gradient.double().flatten() for gradient in gradients])


def errors(model: nn.Module, batch: int, unet: fastddpm.UNet) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    x, eps = (torch.randn(batch, *unet.image_shape, generator=generator) for _ in range(2))
    others = [torch.randint(1000, (batch,), generator=generator)]
    if unet.num_classes:
        others.append(torch.randint(unet.num_classes, (batch,), generator=generator))
    exact = output_and_gradient(copy.deepcopy(model).double(), [x.double(), *others], eps.double())
    found = output_and_gradient(model, [x, *others], eps)
    relative = [float((ours - right).norm() / right.norm()) for ours, right in zip(found, exact, strict=True)]
    return dict(zip(("output", "gradient"), relative, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.set_defaults(batch=[4], rounds=1)
    parser.add_argument("--preset", choices=("mnist", "cifar10"), nargs="+", default=["mnist", "cifar10"])
    options = machine.parse(parser, arguments)
    rows: list[dict[str, Any]] = []
    for preset in options.preset:
        for batch in options.batch:
            for weights in ("initial", "random"):
                unet = network(preset, weights)
                sides = {"fastddpm": unet, "plain PyTorch": PlainUNet(unet).eval()}
                row = {side: errors(model, batch, unet) for side, model in sides.items()}
                rows.append({"preset": preset, "batch": batch, "weights": weights, "error": row})
                for side, one in row.items():
                    print(f"{preset} {weights:8} {side:14} output {one['output']:.2e}  gradient {one['gradient']:.2e}")
                machine.write(options, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
