"""Tensors from files of torch.save, which are pickles: read in a child process with limits, by explicit command only.

PyTorch's restricted unpickler refuses every object but tensors and plain values. The child is the second line, should
that have a hole: it has limits on memory, computing and file size, and ends after a time. What comes back is
safetensors, parsed as from a stranger.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastddpm.errors import DataError, UsageError
from fastddpm.storage.documents import parse_json
from fastddpm.storage.reading import check_size, open_regular, read_bytes, readable
from fastddpm.storage.tensors import parse_tensors

from .refused import REFUSED

_MOST_BYTES = 2**34
_MEMORY_BYTES = 2**30  # that the child may take, and twice the file's bytes
_SECONDS = 60  # that the child may compute, and a second for each 20 MB
_BYTES_A_SECOND = 20 * 2**20
_WAIT = 4  # times as long as it may compute, for a slow disk or a busy machine
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
from fastddpm.pretrained.foreign.unpickle_child import main
main(*sys.argv[1:])
"""


@dataclass(frozen=True)
class Unpickled:
    """Tensors and plain values of a file, by the keys on the way to them, joined by "/"."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, object]


def read(source: Path) -> Unpickled:
    """Unpickle `source`, a file of torch.save in its zip format or the older one, in a child process with limits.

    Raises `UsageError` if there is no file, and `DataError`, in one line, if it is no such file, damaged, asks for
    other objects than tensors and plain values, or exceeds the limits.
    """
    try:
        with readable(source), open_regular(source) as file:
            size = check_size(file, _MOST_BYTES)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {source}") from error
    seconds = _SECONDS + size // _BYTES_A_SECOND
    with tempfile.TemporaryDirectory(prefix="fastddpm-") as directory:
        target = Path(directory, "tensors.safetensors")
        limits = [_MEMORY_BYTES + 3 * size, size, seconds]
        path = json.dumps([entry or "." for entry in sys.path])
        command = [sys.executable, "-c", _PROGRAM, path, str(source.absolute()), str(target), *map(str, limits)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_WAIT * seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"{source} was not read within {_WAIT * seconds:,} s") from error
        said = _said(done, source)
        with readable(target):
            tensors = parse_tensors(read_bytes(target, size + 2**24), source)
    return Unpickled(tensors, said)


def _said(done: "subprocess.CompletedProcess[bytes]", source: Path) -> Mapping[str, object]:
    """Return the plain values that the child printed. Raises `DataError` with its problem."""
    try:
        said = parse_json(done.stdout, source)
    except DataError:
        said = None
    if not isinstance(said, dict):
        end = f"by signal {-done.returncode}" if done.returncode < 0 else f"with exit code {done.returncode}"
        raise DataError(f"{source} cannot be read: the process that read it ended {end}, at one of its limits")
    if "problem" in said:
        raise DataError(f"{source} cannot be read: {_explained(str(said['problem']))}")
    values = said.get("values")
    return values if isinstance(values, dict) else {}


def _explained(problem: str) -> str:
    """Return the child's problem in one line, in our words if it is a common one."""
    if "torch_utils.persistence" in problem:
        return f"{REFUSED['EDM'].reason}; {REFUSED['EDM'].way_round}"
    asked = re.search(r"GLOBAL (\S{1,100})", problem)
    if asked:
        return (
            f"it asks for {asked[1]}, which is neither tensor nor plain value and could run code; in the environment "
            "that wrote it, save only the state_dict with torch.save"
        )
    if problem.startswith("MemoryError") or "allocate memory" in problem:
        return "it takes more memory than a file of its size may"
    kind, _, text = problem.partition(": ")
    if kind == "ValueError":  # the child's own
        return " ".join(text.split())[:300]
    return f"it is damaged, or no file of torch.save ({kind}: {' '.join(text.split()).partition('. ')[0][:120]})"
