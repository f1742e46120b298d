"""Weights of convolutions in the order in which the compiled CPU library reads them, for networks that keep them."""

import ctypes

import torch
from torch import Tensor

from .. import interface, native


def pack(weight: Tensor, stride: int, pad: int, algorithm: int) -> Tensor:
    """Return the weights of a convolution, float32 (K, C, k, k), in the order in which the library reads them."""
    k, c, kernel, _ = weight.shape
    args = interface.Conv(
        weight=weight.data_ptr(), weight_stride=(ctypes.c_int64 * 4)(*weight.stride()), c1=c, k=k, kernel=kernel,
        stride=stride, pad=pad, x_stride=(ctypes.c_int64 * 4)(0, 0, 0, 1), algorithm=algorithm,
    )  # fmt: skip
    library = native.library()
    num_bytes = library.fastddpm_cpu_conv_packed_bytes(ctypes.byref(args))
    packed = torch.empty(num_bytes // 4, dtype=torch.float32, device="cpu")
    native.check("conv", library.fastddpm_cpu_conv_pack(ctypes.byref(args), ctypes.c_void_p(packed.data_ptr())))
    return packed
