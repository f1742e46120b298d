"""A model as one file for other runtimes: ONNX, a `torch.export` program, or an AOTInductor package.

Two things are exported, each with a batch of any size: the denoiser, which is one evaluation of the network, and a
whole reverse step, with which another program draws images by calling it once for each step.

    write(denoiser(model), Path("denoiser.onnx"), "onnx")
    write(reverse_step(sampler), Path("step.onnx"), "onnx")
"""

from .exported import Exported, denoiser, reverse_step
from .files import FORMATS, missing, write

__all__ = ["FORMATS", "Exported", "denoiser", "missing", "reverse_step", "write"]
