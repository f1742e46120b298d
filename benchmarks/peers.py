"""Whom the benchmarks compare with: ways to evaluate, train or sample the same network, by name, with versions."""

import contextlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import DEVICE, DTYPE, ON_GPU
from onnx_session import onnx_session
from plain import PlainUNet
from torch import Tensor

import fastddpm
from fastddpm.config import EngineConfig
from fastddpm.pretrained import diffusers as interchange
from fastddpm.pretrained.model import Model
from fastddpm.sampling import export

Evaluate = Callable[[Tensor, Tensor], Tensor]

# Of one evaluation without gradients. On a GPU in bfloat16, weights and all, unless the name says otherwise.
FORWARD = (
    "fastddpm",
    "fastddpm, no switches",
    "torch eager, contiguous",
    "torch eager",
    "torch.compile",
    "torch.compile, max-autotune",
    "diffusers",
    "diffusers, layout patched",
    "diffusers, compiled",
    "diffusers, layout patched, compiled",
    "onnxruntime",
)


def unet(preset: str) -> fastddpm.UNet:
    """The preset's network with numbers in every weight: at initialization most branches are zero."""
    torch.manual_seed(0)
    network = fastddpm.UNet(fastddpm.preset(preset).unet).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise / 10 if parameter.ndim == 1 else noise / parameter[0].numel() ** 0.5 / 2)
    return network.to(DEVICE)


def evaluation(peer: str, preset: str) -> tuple[Evaluate, dict[str, str]]:
    """`evaluate(x_t, t)` of `peer` on the preset's network, and versions; skips, by name, where it is not installed."""
    network = unet(preset)
    if peer.startswith("fastddpm"):
        return _ours(network, preset, peer), {}
    if peer.startswith("torch"):
        return _torch(network, peer), {}
    if peer == "onnxruntime":
        return _onnxruntime(network, preset), {"onnxruntime": version("onnxruntime")}
    return _diffusers(network, preset, peer), {"diffusers": version("diffusers")}


def version(library: str) -> str:
    """Skips where it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{library} is not installed")


def _labels(network: fastddpm.UNet, x: Tensor) -> Tensor | None:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device) if network.config.num_classes else None


def _ours(network: fastddpm.UNet, preset: str, peer: str) -> Evaluate:
    engine = EngineConfig()
    if peer == "fastddpm, no switches":
        engine = EngineConfig(native=False, time_table=False, fused_qkv=False, phase_convolutions=False,
                              accumulate=False)  # fmt: skip
    denoiser = fastddpm.Denoiser(network, engine)
    held = contextlib.ExitStack()  # as long as `evaluate`: the weights stay as they are
    held.enter_context(denoiser.unchanging())

    def evaluate(x: Tensor, t: Tensor, held: contextlib.ExitStack = held) -> Tensor:
        return denoiser(x, t) if (labels := _labels(network, x)) is None else denoiser(x, t, labels)

    return evaluate


def _onnxruntime(network: fastddpm.UNet, preset: str) -> Evaluate:
    """Our network, exported as `python -m fastddpm.export` does; float32 on the CPU, on torch's number of threads."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        version(library)
    if ON_GPU:
        pytest.skip("onnxruntime is compared on the CPU")
    config = fastddpm.preset(preset)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "denoiser.onnx"
        export.write(export.denoiser(Model(network, fastddpm.Diffusion(config.diffusion), config)), path, "onnx")
        session = onnx_session(path)

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        label = _labels(network, x)
        inputs = {"x_t": x.numpy(), "t": t.numpy()} | ({} if label is None else {"label": label.numpy()})
        return torch.from_numpy(session.run(None, inputs)[0])

    return evaluate


def _torch(network: fastddpm.UNet, peer: str) -> Evaluate:
    layout = torch.contiguous_format if "contiguous" in peer else torch.channels_last
    plain: Any = PlainUNet(network.to(DTYPE).to(memory_format=layout))  # type: ignore[call-overload]
    if peer.startswith("torch.compile"):
        plain = torch.compile(plain, mode="max-autotune" if "max-autotune" in peer else None, dynamic=False)

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return plain(x.to(DTYPE).contiguous(memory_format=layout), t, _labels(network, x))

    return evaluate


def diffusers_unet(network: fastddpm.UNet, preset: str) -> Any:
    """diffusers' UNet2DModel with the same weights, in channels_last."""
    version("diffusers")
    from diffusers import UNet2DModel

    with tempfile.TemporaryDirectory() as folder:
        pipeline = Path(folder) / "pipeline"
        config = fastddpm.preset(preset)
        interchange.save(Model(network, fastddpm.Diffusion(config.diffusion), config), pipeline)
        theirs = UNet2DModel.from_pretrained(pipeline / "unet", low_cpu_mem_usage=False).eval()
    return theirs.to(DEVICE).to(memory_format=torch.channels_last)


def _diffusers(network: fastddpm.UNet, preset: str, peer: str) -> Evaluate:
    theirs = diffusers_unet(network, preset).to(DTYPE)
    called = torch.compile(theirs, dynamic=False) if "compiled" in peer else theirs
    patched = kept_layout if "patched" in peer else contextlib.nullcontext

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad(), patched():
            return called(x.to(DTYPE).contiguous(memory_format=torch.channels_last), t, _labels(network, x)).sample

    return evaluate


@contextlib.contextmanager
def kept_layout() -> Iterator[None]:
    """diffusers calls .contiguous() before it doubles large batches, which leaves channels_last: made to do nothing."""
    original = torch.Tensor.contiguous

    def contiguous(self: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
        return self if memory_format is None else original(self, memory_format=memory_format)

    torch.Tensor.contiguous = contiguous  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.contiguous = original  # type: ignore[method-assign]


def is_slow_to_start(peer: str) -> bool:
    """Whether a peer takes minutes before its first call on this device."""
    return ("compile" in peer or peer == "onnxruntime") and not ON_GPU
