"""The operations of a diffusion model's hot paths, each with several implementations behind one interface.

`group_norm_silu`, `inference_norm`, `attention`, `add_attention`, `add_product`, `add_bias`, `channel_sums`,
`convert_image`, `conv3x3`, `conv3x3_in`, `conv3x3_fp8`, `linear_bf16`, `q_sample`, `reverse_step` and `random_normal`
are also registered as `torch.ops.fastddpm.*`. The reference implementation, `fastddpm/kernels/<op>/reference.py`, is
the specification. By default the fastest implementation runs; FASTDDPM_BACKEND or `use_backend` chooses another, and
`status` tells which one runs.
"""

from .add_attention import add_attention
from .add_bias import add_bias
from .add_product import add_product
from .attention import attention
from .backend import status, use_backend
from .channel_sums import channel_sums
from .conv3x3 import conv3x3
from .conv3x3_fp8 import conv3x3_fp8
from .conv3x3_in import conv3x3_in
from .convert_image import convert_image
from .group_norm_silu import group_norm_silu
from .inference_norm import inference_norm
from .linear_bf16 import linear_bf16
from .q_sample import q_sample
from .random_normal import random_normal
from .reverse_step import reverse_step

__all__ = [
    "add_attention",
    "add_bias",
    "add_product",
    "attention",
    "channel_sums",
    "conv3x3",
    "conv3x3_fp8",
    "conv3x3_in",
    "convert_image",
    "group_norm_silu",
    "inference_norm",
    "linear_bf16",
    "q_sample",
    "random_normal",
    "reverse_step",
    "status",
    "use_backend",
]
