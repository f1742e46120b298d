"""Checkpoints that survive crashes, full disks and flipped bits; knows nothing of the model.

    RUN/.lock                              held by the process that trains in RUN
    RUN/checkpoints/step-00001000/         one checkpoint, moved here whole
        <part>.safetensors                 tensors
        shard-*.safetensors                parts of tensors, if several processes wrote them (sharded.py)
        <document>.json                    everything else
        manifest.json, manifest.sha256     checksums of all files (manifest.py)

A name that begins with `.tmp-` is being written or removed, and is never read. `step-N.old` is the earlier checkpoint
of a step saved twice, from the moment it makes way until its successor stands; it is read if there is no `step-N`.

Checksums tell damage, not forgery. The parsers (untrusted.py) are strict besides.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import safetensors.torch
import torch

from fastddpm.errors import DataError, StorageError, UsageError

from . import manifest
from .documents import parse_json
from .tensors import DTYPES, check_header, parse_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CHECKPOINT = re.compile(r"step-([0-9]{8,12})(\.old)?")
_TEMPORARY = re.compile(r"\.tmp-[0-9]+(?:\.old)?-([0-9]{1,9})")
_SHARD = re.compile(r"shard-[0-9]{5,}-model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What `save` was given, on the CPU; JSON has turned tuples into lists, and dictionaries' keys into strings."""

    path: Path
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    documents: dict[str, Any]


def save(
    run: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], documents: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step`, then remove all but the `keep` newest; the new checkpoint's directory.

    `tensors` maps each part to its tensors by name, of any device and layout, saved bit for bit; dtypes are float16,
    bfloat16, float32, float64, signed integers, uint8 and bool. `documents` are JSON values, at most 2 MiB each.
    A checkpoint of the same step is replaced, those of later steps stay. At every moment, after a power cut too, each
    checkpoint in place is complete, and there is one if there was one before.

    One process saves in a run at a time; `lock` sees to that. Raises `StorageError` if the disk refuses, with nothing
    temporary left and older checkpoints as they were, and `UsageError` for arguments that could not be loaded again.
    """
    _check_arguments(step, [*tensors], [*documents], keep)
    texts = _texts(documents)
    with begun(run, step, _size(tensors, texts)) as temporary:
        return _finish(temporary, step, tensors, texts, keep)


@contextlib.contextmanager
def begun(run: Path, step: int, needed: int) -> Iterator[Path]:
    """A directory for files of `step` that others write, about `needed` bytes of them; inside the block `finish` makes
    it a checkpoint. Without that it is gone after the block. Raises `StorageError` if the disk refuses."""
    directory = run / "checkpoints"
    temporary = _temporary(directory / f"step-{step:08d}")
    try:
        with _refusals(step, directory, needed):
            _make_directory(directory)
            _remove_stale(directory)
            os.mkdir(temporary)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish(
    temporary: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], documents: dict[str, Any], keep: int
) -> Path:
    """As `save`, of the directory that `begun` gave and the shards that are in it."""
    _check_arguments(step, [*tensors], [*documents], keep)
    return _finish(temporary, step, tensors, _texts(documents), keep)


def load(path: Path, parts: Collection[str] | None = None) -> Checkpoint:
    """The checkpoint in `path`, or the newest one if `path` is a run directory.

    With `parts` only those tensor files are read and verified, beside the manifest and the documents; without, all are,
    and shards verified. What is read is verified before any of it is parsed, and parsed from the very bytes that were
    verified.

    Raises `UsageError` if there is no checkpoint or no such part, and `DataError` for a damaged one: it names the file
    and the previous checkpoint, if there is one.
    """
    given = path = Path(path)
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"{path} {what}; expected the directory of a run or of a checkpoint")
    if not _CHECKPOINT.fullmatch(path.name) and not any(os.path.exists(path / name) for name in manifest.NAMES):
        # A listing is no snapshot: while a run goes on, one alone may miss both the newest and its predecessor.
        found = _checkpoints(path / "checkpoints") or _checkpoints(path / "checkpoints")
        if not found:
            raise UsageError(f"{path} holds no checkpoint: neither checkpoints/step-*/ of a run nor manifest.json")
        path = found[-1]
    identity = _identity(path)
    try:
        return _load(path, parts)
    except DataError as error:
        if path != given and (identity is None or _identity(path) != identity):  # removed or replaced meanwhile
            return load(given, parts)
        raise DataError(f"{error}; {_advice(path)}") from error


def load_newest(run: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint of a run, or None if it has no checkpoint at all.

    `report` is called with one message for each damaged checkpoint passed over. If all are damaged, raises `DataError`
    rather than let a run begin anew over them.
    """
    found = _checkpoints(Path(run) / "checkpoints")
    for path in reversed(found):
        try:
            return load(path)
        except DataError as error:
            report(str(error))
    if found:
        raise DataError(f"every checkpoint in {found[0].parent} is damaged; restore one, or start in another directory")
    return None


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Keep other processes from training in `run`, which is made if missing, until the block or the process ends.

    Raises `UsageError` naming the process that holds the lock. Where the system has no flock (Windows, some network
    disks) nothing is locked.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / ".lock", "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
    except OSError as error:
        raise StorageError(f"cannot lock {run}: {error.strerror or error}") from error
    with file:
        _acquire(file, run)
        yield


# Writing


def _check_arguments(step: int, parts: list[str], documents: list[str], keep: int) -> None:
    if not 0 <= step < 10**12:
        raise UsageError(f"step must be in 0..10^12 - 1; got {step}")
    if keep < 1:
        raise UsageError(f"keep must be at least 1 checkpoint; got {keep}")
    for name in parts + documents:
        if not _NAME.fullmatch(name):
            raise UsageError(f"a part or document is named with 1 to 64 of A-Z a-z 0-9 _ . -; got {name!r}")
    if "manifest" in documents:
        raise UsageError("no document may be called 'manifest'; the checkpoint's own is")


def _finish(
    temporary: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, bytes], keep: int
) -> Path:
    directory = temporary.parent
    final = directory / f"step-{step:08d}"
    with _refusals(step, directory, _size(tensors, texts)):
        _write_all(temporary, step, tensors, texts)
        _move_into_place(temporary, final)
    _prune(directory, step, keep)
    return final


def _texts(documents: dict[str, Any]) -> dict[str, bytes]:
    return {f"{name}.json": _to_json(name, value) for name, value in documents.items()}


def _size(tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, bytes]) -> int:
    return sum(t.nbytes for part in tensors.values() for t in part.values()) + sum(map(len, texts.values()))


def _to_json(name: str, value: Any) -> bytes:
    data = json.dumps(value, indent=1).encode()
    parse_json(data, f"document {name!r}")
    return data


def _to_safetensors(part: dict[str, torch.Tensor], where: Path) -> bytes:
    storages: set[int] = set()
    prepared = {}
    for name, tensor in part.items():
        if tensor.dtype not in DTYPES.values() or name == "__metadata__":
            raise UsageError(f"{where}: cannot save tensor {name!r} of dtype {tensor.dtype}")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that overlap in memory, as tied weights do
        prepared[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    data = safetensors.torch.save(prepared)
    check_header(data, where)
    return data


def _write_all(
    directory: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, bytes]
) -> None:
    files = {path.name: manifest.entry_of(path) for path in sorted(directory.iterdir())}
    for part, content in tensors.items():
        path = directory / f"{part}.safetensors"
        files[path.name] = manifest.write_file(path, _to_safetensors(content, path))
    for name, data in texts.items():
        files[name] = manifest.write_file(directory / name, data)
    manifest.seal(directory, step, files)


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(parents=True)
        manifest.sync(directory.parent)


def _move_into_place(temporary: Path, final: Path) -> None:
    aside = final.with_name(f"{final.name}.old")
    if final.exists():
        if aside.exists():
            _discard(aside)
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    manifest.sync(final.parent)


@contextlib.contextmanager
def _refusals(step: int, directory: Path, needed: int) -> Iterator[None]:
    """Turns the disk's refusals inside the block into `StorageError`."""
    try:
        yield
    except OSError as error:
        free = ""
        with contextlib.suppress(OSError):
            free = f" and {shutil.disk_usage(directory).free:,} are free"
        raise StorageError(
            f"cannot save step {step} in {directory}: {error.strerror or error}; it needs {needed:,} bytes{free}. "
            "Make room or mend the disk; older checkpoints are as they were"
        ) from error


# Removing


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name.removeprefix('step-')}-{os.getpid()}")


def _discard(path: Path) -> None:
    """Remove a checkpoint, which at no moment stands half removed under its name."""
    temporary = _temporary(path)
    os.rename(path, temporary)
    if temporary.is_symlink():
        os.unlink(temporary)
    else:
        shutil.rmtree(temporary)


def _prune(directory: Path, step: int, keep: int) -> None:
    # Later steps are left alone: a run begun anew by mistake must not remove what the first one reached.
    standing = [path for path in _checkpoints(directory) if _order(path)[0] <= step]
    replaced = [path for path in standing if path.suffix == ".old" and path.with_suffix("") in standing]
    standing = [path for path in standing if path not in replaced]
    for path in replaced + standing[:-keep]:
        try:
            _discard(path)
        except OSError as error:
            raise StorageError(
                f"step {step} is saved, but the old checkpoint {path} cannot be removed: {error.strerror or error}"
            ) from error


def _remove_stale(directory: Path) -> None:
    """Remove what killed processes left behind; of this process too, whose number a container may give again."""
    for path in list(directory.iterdir()):
        match = _TEMPORARY.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# Reading


def _advice(path: Path) -> str:
    if _CHECKPOINT.fullmatch(path.name):
        older = [other for other in _checkpoints(path.parent) if _order(other) < _order(path)]
        if older:
            return f"use the previous checkpoint, {older[-1]}"
    return "restore it from a copy, as there is no earlier checkpoint beside it"


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _order(path: Path) -> tuple[int, bool]:
    match = _CHECKPOINT.fullmatch(path.name)
    assert match
    return int(match[1]), match[2] is None


def _checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    try:
        return sorted((p for p in directory.iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir()), key=_order)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{directory} cannot be read: {error.strerror or error}") from error


def _load(path: Path, parts: Collection[str] | None) -> Checkpoint:
    step, files = manifest.read(path)
    if _CHECKPOINT.fullmatch(path.name) and _order(path)[0] != step:
        raise DataError(f"{path} holds step {step}, not the step that it is named after")
    shards = [name for name in files if _SHARD.fullmatch(name)]
    held = [name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors") and name not in shards]
    for part in parts or ():
        if part not in held:
            raise UsageError(f"{path} has no part {part!r}; it has {', '.join(held)}")
    chosen = [f"{part}.safetensors" for part in (held if parts is None else dict.fromkeys(parts))]
    texts = [name for name in files if name.endswith(".json")]
    for name in shards if parts is None else ():
        manifest.check(path / name, files[name])
    contents = {name: manifest.read_file(path / name, files[name]) for name in texts + chosen}
    documents = {name.removesuffix(".json"): parse_json(contents.pop(name), path / name) for name in texts}
    # popped one by one: the bytes of a part are dropped when its tensors stand
    tensors = {name.removesuffix(".safetensors"): parse_tensors(contents.pop(name), path / name) for name in chosen}
    return Checkpoint(path, step, tensors, documents)


# Locking


def _acquire(file: TextIO, run: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = re.fullmatch(r"([0-9]{1,9}) ([\w.-]{1,255})\n", file.read(300))
        who = f"process {holder[1]} on {holder[2]}" if holder else "another process"
        raise UsageError(f"{run} is in use by {who}; stop it first, or choose another directory") from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return
        raise StorageError(f"cannot lock {run}: {error.strerror or error}") from error
    try:  # past the file's buffer, which would be written once more as it is closed
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"{os.getpid()} {socket.gethostname()}\n".encode())
    except OSError as error:
        raise StorageError(f"cannot write into {run}: {error.strerror or error}") from error
