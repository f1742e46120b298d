"""Weights of convolutions in the order in which the compiled CPU library reads them, packed once and kept.

A weight is packed again when it has changed. Its address and PyTorch's version counter tell of most changes; not of
those through `.data`, as averages and merged adapters are copied. So each call also compares digests of the memory: of
64 bytes of each filter, the weights of one output channel, and of a further 1/16 of the memory in turn. A change of
whole filters is noticed at once, and any other in 16 calls. A weight of up to 256 KiB is read as a whole.
"""

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import interface, native

_TURNS = 16
_WHOLE_BYTES = 2**18
_LINE = 64
_MOST_STRUCTURES = 16  # sizes of x


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


class Packed:
    """The packed weights of one convolution, float32 in `packed`, and the structures of its calls."""

    def __init__(self, weight: Tensor, stride: int, pad: int, algorithm: int) -> None:
        self._k, _, self._kernel, _ = weight.shape
        self.key = (stride, pad, algorithm)
        self.packed = pack(weight, stride, pad, algorithm)
        self._place = _place(weight)
        self._turns = _turns(weight)
        self._digests = [_digest(turn) for turn in self._turns]
        self._turn = 0
        self._structures: dict[tuple[int, int, int, bool, int], interface.Conv] = {}

    def structure(self, x: Tensor, doubled: bool) -> interface.Conv:
        """Return a new structure for a call with `x`, channels_last, in which only pointers and `silu` are missing."""
        n, c, height, width = x.shape
        key = (n, height, width, doubled, torch.get_num_threads())
        known = self._structures.get(key)
        if known is None:
            stride, pad, algorithm = self.key
            known = interface.Conv(
                packed=self.packed.data_ptr(), n=n, height=height, width=width, c1=c, k=self._k, temb_stride=self._k,
                x_stride=(ctypes.c_int64 * 4)(height * width * c, width * c, c, 1), kernel=self._kernel, stride=stride,
                pad=pad, doubled=doubled, algorithm=algorithm,
            )  # fmt: skip
            known.workspace_bytes = native.library().fastddpm_cpu_conv_workspace(ctypes.byref(known), key[4])
            if len(self._structures) == _MOST_STRUCTURES:
                self._structures.clear()
            self._structures[key] = known
        return interface.Conv.from_buffer_copy(known)  # another thread may make the same call

    def is_of(self, weight: Tensor, key: tuple[int, int, int]) -> bool:
        """Whether these are the present values of `weight`, as far as this call looks."""
        if key != self.key or _place(weight) != self._place:
            return False
        self._turn = (self._turn + 1) % len(self._turns)
        return _digest(self._turns[self._turn]) == self._digests[self._turn]


_kept: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def of(weight: Tensor, stride: int, pad: int, algorithm: int) -> Packed:
    """Return what is kept of `weight`, float32 (K, C, k, k): packed now, if need be."""
    found: Packed | None = _kept.get(weight)
    if found is None or not found.is_of(weight, (stride, pad, algorithm)):
        found = _kept[weight] = Packed(weight, stride, pad, algorithm)
    return found


def forget(weights: Iterable[Tensor]) -> None:
    """Free what is kept of `weights`."""
    for weight in weights:
        _kept.pop(weight, None)


def _place(weight: Tensor) -> tuple[int, tuple[int, ...], int]:
    return weight.data_ptr(), weight.stride(), 0 if weight.is_inference() else weight._version


def _turns(weight: Tensor) -> list[interface.Digest]:
    """Return, for each turn, the parts of the memory that a call in this turn reads."""
    start, size = weight.data_ptr(), weight.numel() * weight.element_size()
    if size <= _WHOLE_BYTES:
        return [_parts([(start, size)])]
    filter_bytes = size // weight.shape[0]
    lines = [(place, min(_LINE, filter_bytes)) for place in range(start, start + size, filter_bytes)]
    step = -(-size // _TURNS)
    return [
        _parts([*lines, (start + turn * step, min(step, size - turn * step))])
        for turn in range(_TURNS)
        if turn * step < size
    ]


def _parts(parts: list[tuple[int, int]]) -> interface.Digest:
    addresses = (ctypes.c_void_p * len(parts))(*(address for address, _ in parts))
    sizes = (ctypes.c_int64 * len(parts))(*(size for _, size in parts))
    out = ctypes.c_uint64()
    args = interface.Digest(
        parts=ctypes.addressof(addresses), bytes=ctypes.addressof(sizes), out=ctypes.addressof(out), num=len(parts)
    )
    args.memory = addresses, sizes, out  # keeps what it points to
    return args


def _digest(args: interface.Digest) -> int:
    native.call("digest", args)
    value: int = args.memory[2].value
    return value
