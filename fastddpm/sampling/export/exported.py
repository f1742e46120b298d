"""Programs of a model by torch.export: the denoiser, and a reverse step, with what a reader must know of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm import __version__
from fastddpm.errors import UsageError
from fastddpm.ops.decompositions import decompositions
from fastddpm.pretrained.model import Model
from fastddpm.runtime.network import device_of, precision_of_weights
from fastddpm.sampling.isolation import evaluating
from fastddpm.sampling.sampler import Sampler

from .quiet import quiet
from .step import ReverseStep

MAX_BATCH = 1024
_BATCH_OF_EXAMPLE = 2  # torch.export would take a batch of 1 for a constant


@dataclass(frozen=True)
class Exported:
    """A program, a call of it, and a description for its readers.

    `program`: takes the tensors of `inputs` in their order, of any batch size in 1..1024, and returns `outputs` in
    PyTorch's own operators, or with fastddpm's kept. `expected`: what the module returned for `inputs`. `about`: texts.
    """

    program: torch.export.ExportedProgram
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    expected: tuple[Tensor, ...]
    about: dict[str, str]
    kept: bool = False

    @property
    def dynamic(self) -> dict[str, dict[int, Any]]:
        """The batch dimension of each input that has one, as `torch.export` takes it."""
        return _dynamic(self.inputs)


def denoiser(model: Model, *, keep_operations: bool = False) -> Exported:
    """Export one evaluation of the model's network: x_t, t and, with classes, label in; the prediction out.

    x_t: float32 (N, C, H, W). t: int64 (N,) in 0..T-1. label: int64 (N,). The prediction is (N, C, H, W), or
    (N, 2C, H, W) with a learned variance. `keep_operations`: keep fastddpm's operations, for a process that imports
    fastddpm. Raises `UsageError` for weights that are not float32.
    """
    unet, diffusion = model.unet, model.diffusion.config
    (x_t,) = _images(unet, unet.image_shape, 1)
    inputs = {"x_t": x_t, "t": torch.tensor([diffusion.timesteps // 2, 0], device=x_t.device)}
    if unet.num_classes:
        inputs["label"] = torch.tensor([0, unet.num_classes - 1], device=x_t.device)
    about = {"exported": "denoiser", "prediction": diffusion.prediction, "T": str(diffusion.timesteps)}
    return _export(unet, inputs, ("prediction",), about, keep_operations)


def reverse_step(sampler: Sampler, *, keep_operations: bool = False) -> Exported:
    """Export a step of the sampler's chain: `ReverseStep` says what goes in and comes out.

    The seed, the engine and the noise of the sampler are not part of it. `keep_operations` and errors are those of
    `denoiser`; also raises `UsageError` for a sampler with `cond_fn`.
    """
    module, interface = ReverseStep(sampler), sampler.interface
    x_t, noise = _images(sampler.network, interface.shape, 2)
    device = x_t.device
    inputs = {"x_t": x_t, "step": torch.tensor(sampler.steps // 2, device=device), "noise": noise}
    if sampler.multistep:
        inputs["previous_x0"] = _normals(interface.shape, 2, device).clamp(-1, 1)
    about = {
        "exported": "reverse step", "method": sampler.method, "steps": str(sampler.steps),
        "timesteps": " ".join(map(str, sampler.timesteps.tolist())),
    }  # fmt: skip
    if interface.num_classes:
        inputs["label"] = torch.tensor([0, interface.num_classes - 1], device=device)
        about["classes"] = str(interface.num_classes)
    if interface.null_label is not None:
        inputs["guidance"] = torch.tensor(float(sampler.guidance), device=device)
        about |= {"guidance": f"{sampler.guidance:g}", "null_label": str(interface.null_label)}
    return _export(module, inputs, ("x_next", "x0"), about, keep_operations)


def _dynamic(inputs: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    return {name: {0: batch} if tensor.ndim else {} for name, tensor in inputs.items()}


def _normals(shape: tuple[int, int, int], number: int, device: torch.device) -> Tensor:
    return torch.randn(_BATCH_OF_EXAMPLE, *shape, generator=torch.Generator().manual_seed(number)).to(device)


def _images(network: nn.Module, shape: tuple[int, int, int], count: int) -> list[Tensor]:
    """Return `count` batches of random images on the network's device."""
    dtype = precision_of_weights(network)
    if dtype != torch.float32:
        raise UsageError(f"only float32 weights are exported, and these are {dtype}; convert with network.float()")
    return [_normals(shape, number, device_of(network)) for number in range(count)]


def _export(
    module: nn.Module, inputs: dict[str, Tensor], outputs: tuple[str, ...], about: dict[str, str], keep: bool
) -> Exported:
    with evaluating(module), torch.no_grad(), quiet():
        program = torch.export.export(module, (), kwargs=inputs, dynamic_shapes=_dynamic(inputs))
        expected = module(**inputs)
        if not keep:
            program = program.run_decompositions(decompositions())
    about = {"fastddpm": __version__, **about, "images": "float32 (N, C, H, W) in [-1, 1]"}
    return Exported(program, inputs, outputs, expected if isinstance(expected, tuple) else (expected,), about, keep)
