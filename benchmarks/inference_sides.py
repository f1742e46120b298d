"""The sides of benchmarks/inference.py: a network with its weights, and who evaluates it, by name, in which precision.

"prepared" and "prepared bf16" are `fastddpm.Denoiser`; "module" is the plain `UNet` under torch.inference_mode.
"eager", "compiled" (torch.compile with freezing) and their bf16 kinds are diffusers' UNet2DModel with the same weights
in channels_last: converted to bfloat16, or in float32 under torch.autocast. "onnxruntime" runs what
`python -m fastddpm.export` writes, and "onnxruntime fp16" the same file by onnxruntime's own converter to float16: its
CPU provider has no bfloat16 convolution or product ("Could not find an implementation for Gemm").
"""

import contextlib
import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from onnx_session import onnx_session
from torch import Tensor

import fastddpm
from fastddpm.config import EngineConfig, UNetConfig
from fastddpm.pretrained import diffusers as interchange
from fastddpm.pretrained.model import Model
from fastddpm.sampling import export

T = 500
SIDES = {
    "fp32": ("prepared", "module", "eager", "compiled", "onnxruntime"),
    "bf16": ("prepared bf16", "eager bf16", "autocast bf16", "compiled bf16", "compiled autocast bf16",
             "onnxruntime fp16"),
}  # fmt: skip
PREPARED = {"fp32": "prepared", "bf16": "prepared bf16"}
OURS = ("prepared", "module", "prepared bf16")
BF16_WEIGHTS = ("eager bf16", "compiled bf16")
ONNX_FILES = {"onnxruntime": "denoiser.onnx", "onnxruntime fp16": "denoiser16.onnx"}
Side = Callable[[Tensor], Tensor]


def random_weights(preset: str = "cifar10", seed: int = 0) -> fastddpm.UNet:
    """The network at initialization has zeros in the last layer of every block, and an output of zero."""
    torch.manual_seed(seed)
    unet = fastddpm.UNet(fastddpm.preset(preset).unet).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise / 10 if parameter.ndim == 1 else noise / parameter[0].numel() ** 0.5 / 2)
    return unet.channels_last()


def initial_weights(preset: str = "cifar10", seed: int = 0) -> fastddpm.UNet:
    """Each layer as PyTorch initializes it, which is what diffusers' networks begin with."""
    torch.manual_seed(seed)
    unet = fastddpm.UNet(fastddpm.preset(preset).unet).eval()
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.reset_parameters()
    return unet.channels_last()


def _model(unet: fastddpm.UNet) -> Model:
    preset = replace(fastddpm.preset("cifar10"), unet=unet.config)
    return Model(unet, fastddpm.Diffusion(preset.diffusion), preset)


def save_for_diffusers(unet: fastddpm.UNet, folder: Path) -> Path:
    """The folder from which diffusers reads the network."""
    interchange.save(_model(unet), folder / "pipeline")
    return folder / "pipeline" / "unet"


def save_for_onnxruntime(unet: fastddpm.UNet, folder: Path, names: list[str]) -> None:
    """The files of the sides `names` that `side` reads; `folder` as from `save_for_diffusers`."""
    path = folder / ONNX_FILES["onnxruntime"]
    export.write(export.denoiser(_model(unet)), path, "onnx")
    if "onnxruntime fp16" in names:
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        half = convert_float_to_float16(onnx.load(path), keep_io_types=True)
        onnx.save(half, folder / ONNX_FILES["onnxruntime fp16"])


def without_onnx() -> list[str]:
    """The libraries that onnxruntime as a side needs and that are not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


def inputs(x: Tensor, config: UNetConfig) -> tuple[Tensor, ...]:
    """x_t, t, and if the network has classes, labels."""
    labels = (torch.arange(len(x)) % config.num_classes,) if config.num_classes else ()
    return x, torch.full((len(x),), T), *labels


def in_float64(unet: fastddpm.UNet, x: Tensor) -> Tensor:
    with torch.no_grad(), fastddpm.ops.use_backend("reference"):
        return copy.deepcopy(unet).double()(*inputs(x.double(), unet.config))


def side(name: str, network: torch.nn.Module | None, config: UNetConfig, folder: Path) -> Side:
    """One call of `network`: ours for the sides in `OURS`, otherwise diffusers'; onnxruntime reads its own.

    For the sides in `BF16_WEIGHTS` the network itself is converted.
    """
    if name in ONNX_FILES:
        return _onnxruntime(folder / ONNX_FILES[name], config)
    assert network is not None
    if name in PREPARED.values():
        denoiser = fastddpm.Denoiser(network, EngineConfig(precision="bf16" if name == PREPARED["bf16"] else "auto"))
        held = contextlib.ExitStack()  # as in a chain of the sampler, the weights stay as they are
        held.enter_context(denoiser.unchanging())
        return lambda x, held=held: denoiser(*inputs(x, config))  # type: ignore[misc]
    if name == "module":

        def run_module(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return network(*inputs(x.contiguous(memory_format=torch.channels_last), config))

        return run_module
    return _diffusers(name, network, config)


def _diffusers(name: str, network: Any, config: UNetConfig) -> Side:
    dtype = torch.bfloat16 if name in BF16_WEIGHTS else torch.float32
    if name in BF16_WEIGHTS:
        network = network.to(dtype)
    if "compiled" in name:
        from torch._inductor import config as inductor

        inductor.freezing = True
        network = torch.compile(network, dynamic=False)
    cast = "autocast" in name

    def run(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if cast else contextlib.nullcontext():
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)
            return network(*inputs(x, config)).sample

    return run


def _onnxruntime(path: Path, config: UNetConfig) -> Side:
    session = onnx_session(path)

    def run(x: Tensor) -> Tensor:
        names = (given.name for given in session.get_inputs())
        values = (value.numpy() for value in inputs(x, config))
        (out,) = session.run(None, dict(zip(names, values, strict=True)))
        return torch.from_numpy(out)

    return run
