"""The program of the child process that unpickles a foreign file: tensors only, within limits, to safetensors.

It is started by `unpickle.read` with the source, the file to write and the limits as arguments, and prints what it says
in one line of JSON. PyTorch's restricted unpickler (weights_only) makes no other objects than tensors, numbers, texts
and containers, whatever the file asks for.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch

try:
    import resource
except ImportError:  # Windows, where only the parent's limit on time holds
    resource = None  # type: ignore[assignment]

_FILE_BYTES = 2**24  # of what is written beyond the tensors, as names
_DEPTH = 8  # of dictionaries within dictionaries


def limit(memory_bytes: int, file_bytes: int, seconds: int) -> None:
    """Let this process map `memory_bytes` more than now, write files of `file_bytes`, and compute for `seconds`."""
    if resource is None:
        return
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _lower(resource.RLIMIT_AS, mapped + memory_bytes)
    except OSError:  # no /proc, as on macOS, where RLIMIT_AS does nothing
        pass
    _lower(resource.RLIMIT_FSIZE, file_bytes + _FILE_BYTES)
    _lower(resource.RLIMIT_CPU, seconds)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, 64)


def _lower(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def collect(value: Any) -> tuple[dict[str, torch.Tensor], dict[str, int | float | str | bool]]:
    """Return the tensors and the plain values of nested dictionaries, by the keys on the way to them joined by "/".

    Dictionaries with other keys than text, as an optimizer's state, and lists are left out. Raises ValueError for what
    holds no dictionary, tensors that are not dense, and two tensors of one name.
    """
    if not isinstance(value, dict):
        raise ValueError(f"it holds an object of {type(value).__name__}, not a dictionary of tensors")
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, int | float | str | bool] = {}
    for name, item in _items(value, "", _DEPTH):
        if isinstance(item, torch.Tensor):
            if name in tensors:
                raise ValueError(f"it holds two tensors called {name!r:.100}")
            if item.layout != torch.strided or item.is_quantized or item.device.type != "cpu":
                raise ValueError(f"{name!r:.100} is no dense tensor in memory")
            # A forged tensor can claim many elements of a small storage, as one that was expanded does.
            if item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise ValueError(f"{name!r:.100} claims {item.numel():,} elements, more than are stored")
            tensors[name] = item.detach()
        elif isinstance(item, int | float | str | bool) and len(str(item)[:200]) < 200:
            values[name] = item
    return tensors, values


def _items(value: dict[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth == 0 or not all(isinstance(key, str) for key in value):
        return
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _items(item, f"{prefix}{key}/", depth - 1)
        else:
            yield prefix + key, item


def unpickled(source: str) -> Any:
    """Return what the restricted unpickler makes of a file; both torch.save's zip format and its older one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(source, map_location="cpu", weights_only=True)


def main(source: str, target: str, *limits: str) -> None:
    """Unpickle `source`, write its tensors to `target`, and print a JSON object: its plain values, or the problem."""
    torch.set_num_threads(1)
    memory, files, seconds = (int(number) for number in limits)
    limit(memory, files, seconds)
    try:
        tensors, values = collect(unpickled(source))
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if total > files:
            raise ValueError(f"its tensors take {total:,} bytes, more than the file")
        kept = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        del tensors
        safetensors.torch.save_file(kept, target)
        said: dict[str, Any] = {"values": values}
    except BaseException as error:  # a hostile file can raise nearly anything
        said = {"problem": f"{type(error).__name__}: {error}"}
    print(json.dumps(said)[: 2**20], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
