"""The structures of csrc/fastddpm.h for ctypes, field by field."""

import ctypes
from typing import Any

_POINTER, _INT64, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

FLOAT32, BFLOAT16, FLOAT16, UINT8 = range(4)
NCHW, NHWC = range(2)
PATCHES, WINOGRAD_4X4, WINOGRAD_2X2, WINOGRAD_2X4 = range(4)


def _all(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Key(ctypes.Structure):
    _fields_ = _all(_POINTER, "images seed step")


class RandomNormal(ctypes.Structure):
    _fields_ = [*_all(_POINTER, "out"), *_all(_INT64, "n num stream_id"), ("key", Key)]


class GroupNormSiLU(ctypes.Structure):
    _fields_ = [
        *_all(_POINTER, "x skip weight bias temb scale shift y mean rstd"),
        ("key", Key),
        *_all(_INT64, "n c1 c2 height width groups dropout_stream temb_stride"),
        *_all(_FLOAT, "eps dropout"),
        *_all(_INT32, "silu layout dtype param_dtype"),
        *_all(_POINTER, "grad grad_x grad_skip grad_weight grad_bias grad_temb grad_scale grad_shift"),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        *_all(_POINTER, "q k v out lse"),
        *_all(_INT64, "n l c heads"),
        *_all(_INT64 * 2, "q_stride k_stride v_stride out_stride"),
        *_all(_FLOAT, "scale"),
        *_all(_INT32, "dtype precision"),
        *_all(_POINTER, "grad grad_q grad_k grad_v"),
    ]


class QSample(ctypes.Structure):
    _fields_ = [
        *_all(_POINTER, "x0 t table flip noise x_t eps"),
        ("key", Key),
        *_all(_INT64, "n c height width timesteps"),
        *_all(_INT64 * 4, "x0_stride"),
        *_all(_INT32, "dtype"),
    ]


class ReverseStep(ctypes.Structure):
    _fields_ = [
        *_all(_POINTER, "x out table timesteps index noise x0"),
        ("key", Key),
        *_all(_INT64, "n c height width steps"),
        *_all(_INT64 * 4, "x_stride out_stride"),
        *_all(_FLOAT, "clip"),
        *_all(_INT32, "variance dtype"),
    ]


class Conv(ctypes.Structure):
    _fields_ = [
        *_all(_POINTER, "x skip gain offset weight packed bias temb residual out workspace"),
        *_all(_INT64, "workspace_bytes n height width c1 c2 k"),
        *_all(_INT64 * 4, "x_stride weight_stride"),
        *_all(_INT64, "temb_stride"),
        *_all(_INT32, "kernel stride pad doubled silu algorithm precision"),
        *_all(_POINTER, "grad grad_weight grad_bias"),
    ]


class NormAffine(ctypes.Structure):
    _fields_ = [
        *_all(_POINTER, "x skip weight bias scale shift gain offset workspace"),
        *_all(_INT64, "workspace_bytes n pixels c1 c2 groups scale_stride"),
        *_all(_FLOAT, "eps"),
    ]


class Resample(ctypes.Structure):
    _fields_ = [
        *_all(_POINTER, "x gain offset out"),
        *_all(_INT64, "n height width c"),
        *_all(_INT32, "doubled"),
    ]


class Digest(ctypes.Structure):
    _fields_ = [*_all(_POINTER, "parts bytes out"), *_all(_INT64, "num")]


class Crc32c(ctypes.Structure):
    _fields_ = [*_all(_POINTER, "data out"), *_all(_INT64, "bytes")]
