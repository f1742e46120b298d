"""Where the compiled library writes the gradients of weights and a bias, with guard values around it."""

import ctypes

import torch

from fastddpm.kernels import interface, native

GUARD = 16  # floats on either side of an output


class GuardedGradient:
    """Memory for the gradients of weights of any strides and of a bias of `shape[0]` channels, and the call."""

    args: interface.Conv

    def __init__(self, shape: tuple[int, ...], stride: tuple[int, ...], bias: bool, threads: int) -> None:
        self.threads = threads
        span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        self.memory = torch.full((span + 2 * GUARD,), torch.nan)
        self.grad_weight = self.memory[GUARD:].as_strided(shape, stride)
        self.bias_memory = torch.full((shape[0] + 2 * GUARD,), torch.nan)
        self.grad_bias = self.bias_memory[GUARD : GUARD + shape[0]] if bias else None

    def prepare(self, args: interface.Conv) -> None:
        """Complete the arguments by the gradients' places and a workspace."""
        self.args = args
        args.grad_weight, args.grad_bias = self.grad_weight.data_ptr(), native.pointer(self.grad_bias)
        size = native.library().fastddpm_cpu_conv_weight_gradient_workspace(ctypes.byref(args), self.threads)
        self.workspace = torch.full((size + 128,), 0xFF, dtype=torch.uint8)
        args.workspace = -(-self.workspace.data_ptr() // 64) * 64
        args.workspace_bytes = size

    def run(self) -> int:
        code = native.library().fastddpm_cpu_conv_weight_gradient(ctypes.byref(self.args), self.threads)
        untouched = torch.ones(self.memory.shape, dtype=torch.bool)
        untouched[GUARD:].as_strided(self.grad_weight.shape, self.grad_weight.stride()).fill_(False)
        assert torch.isnan(self.memory[untouched]).all(), "written beside the weights' gradient"
        guards = torch.cat([self.bias_memory[:GUARD], self.bias_memory[-GUARD:]])
        assert torch.isnan(guards).all(), "written outside the bias's gradient"
        used = self.args.workspace - self.workspace.data_ptr() + self.args.workspace_bytes
        assert (self.workspace[used:] == 0xFF).all(), "written outside the workspace"
        return int(code)
