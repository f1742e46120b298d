"""Checkpoints that survive crashes, full disks and flipped bits. Independent of the model.

    RUN/.lock                              locked by the process that trains in RUN
    RUN/checkpoints/step-00001000/         one checkpoint, renamed to this once complete
        <part>.safetensors                 tensors
        shard-*.safetensors                shards of tensors, if several processes wrote them (training/state.py)
        <document>.json                    everything else
        manifest.json, manifest.sha256     checksums of all files (manifest.py)

A name that begins with `.tmp-` is being written or removed, and is never read. If a step is saved a second time, its
first checkpoint is named `step-N.old` while the second one takes its place; it is read if there is no `step-N`.

Checksums detect damage, not tampering; the parsers (documents.py, tensors.py) are strict for that reason.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastddpm.errors import DataError, StorageError, UsageError

from . import manifest
from .documents import parse_json
from .files import alive, move_into_place, sync
from .locks import is_locked, locked
from .tensors import DTYPES, check_header, parse_tensors

FOLDER = "checkpoints"
_LOCK = ".lock"
_CHECKPOINT = re.compile(r"step-([0-9]{8,12})(\.old)?")
_TEMPORARY = re.compile(r"\.tmp-[0-9]+(?:\.old)?-([0-9]{1,9})")
_SHARD = re.compile(r"shard-[0-9]{5,}-model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that was read: the arguments of `save`, with tensors on the CPU and documents as JSON returns them.

    Tuples have become lists, and the keys of dictionaries strings.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    documents: dict[str, Any]


def save(
    run: Path,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    documents: dict[str, Any],
    keep: int | None,
    folder: str = FOLDER,
) -> Path:
    """Write the checkpoint of `step`, remove all but the `keep` newest, and return the new checkpoint's directory.

    `keep` None: keep all. `folder`: of the run, in which the checkpoints lie.

    `tensors` maps the name of a part to its tensors by name. They may be on any device and in any layout, and are saved
    bit for bit; dtypes are float16, bfloat16, float32, float64, signed integers, uint8 and bool. `documents` are JSON
    values of at most 2 MiB each. A checkpoint of the same step is replaced; those of later steps stay. At any moment,
    also after a power cut, every checkpoint in place is complete, and there is one if there was one before.

    Only one process may save in a run at a time, which `lock` ensures. Raises `StorageError` if the file system fails;
    then no temporary files are left and older checkpoints are unchanged. Raises `UsageError` or `DataError` for
    arguments that could not be loaded again.
    """
    _check_arguments(step, [*tensors], [*documents], keep)
    texts = _encode(documents)
    with begin(run, step, _size(tensors, texts), folder) as temporary:
        return _finish(temporary, step, tensors, texts, keep)


@contextlib.contextmanager
def begin(run: Path, step: int, num_bytes: int, folder: str = FOLDER) -> Iterator[Path]:
    """Yield a temporary directory for a checkpoint of `step` that several processes write; `finish` completes it.

    It is removed after the block unless `finish` was called inside. `num_bytes`: their approximate size, for an error
    message. Raises `StorageError` if the file system fails.
    """
    directory = run / folder
    temporary = _temporary(directory / f"step-{step:08d}")
    try:
        with _os_errors_as_storage_error(step, directory, num_bytes):
            _make_directory(directory)
            _remove_stale(directory)
            os.mkdir(temporary)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish(
    temporary: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], documents: dict[str, Any], keep: int
) -> Path:
    """Complete the checkpoint that `begin` started, with the shards in `temporary`; otherwise as `save`."""
    _check_arguments(step, [*tensors], [*documents], keep)
    return _finish(temporary, step, tensors, _encode(documents), keep)


def load(path: Path, parts: Collection[str] | None = None) -> Checkpoint:
    """Read the checkpoint in `path`, or the newest one if `path` is a run directory.

    `parts`: names of the tensor files to read. Default: all of them; shards are then verified, too. The manifest and
    the documents are always read. All bytes are verified before any are parsed, and the verified bytes are those that
    are parsed.

    Raises `UsageError` if there is no checkpoint or no such part, and `DataError` if a file is damaged; the message
    names the file and the previous checkpoint, if there is one.
    """
    given = path = Path(path)
    if not os.path.isdir(path):
        problem = "is a file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"{path} {problem}; expected the directory of a run or of a checkpoint")
    if not _CHECKPOINT.fullmatch(path.name) and not any(os.path.exists(path / name) for name in manifest.NAMES):
        # List twice: a listing made while a run saves may miss both the newest checkpoint and its predecessor.
        found = _checkpoints(path / "checkpoints") or _checkpoints(path / "checkpoints")
        if not found:
            raise UsageError(f"{path} holds no checkpoint: neither checkpoints/step-*/ of a run nor manifest.json")
        path = found[-1]
    identity = _identity(path)
    try:
        return _load(path, parts)
    except DataError as error:
        if path != given and (identity is None or _identity(path) != identity):  # it was removed or replaced meanwhile
            return load(given, parts)
        raise DataError(f"{error}; {_advice(path)}") from error


def load_newest(run: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Read the newest undamaged checkpoint of a run; None if it has no checkpoint at all.

    `report` is called with one message for each damaged checkpoint that is skipped. Raises `DataError` if all are
    damaged, so that no run starts again from the beginning over them.
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
    """Create `run` if missing, and lock it against training by other processes until the block or the process ends.

    Raises `UsageError`, naming the process that holds the lock, if it is taken, and `StorageError` if the lock file
    cannot be written. On systems without flock (Windows, some network file systems) nothing is locked.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot lock {run}: {error.strerror or error}") from error

    def taken(who: str) -> str:
        return f"{run} is in use by {who}; stop it first, or choose another directory"

    with locked(run / _LOCK, taken):
        yield


def in_use(run: Path) -> bool:
    """Return whether a process, this one included, holds the `lock` of `run`; False if the system cannot tell."""
    return is_locked(run / _LOCK)


def steps_in(directory: Path) -> dict[int, Path]:
    """Return the checkpoints in a directory, damaged or not, by their steps, in order. Raises `DataError`."""
    return {_order(path)[0]: path for path in _checkpoints(directory)}


def remove_after(directory: Path, step: int) -> None:
    """Remove the checkpoints of steps after `step` from a directory. Raises `StorageError`."""
    for found, path in steps_in(directory).items():
        if found > step:
            try:
                _discard(path)
            except OSError as error:
                raise StorageError(f"cannot remove {path}: {error.strerror or error}") from error


def newest_step(run: Path) -> int | None:
    """Return the step of the newest checkpoint of `run`, damaged or not; None if there is none or it is unreadable."""
    try:
        found = _checkpoints(run / "checkpoints")
    except DataError:
        return None
    return _order(found[-1])[0] if found else None


# Writing


def _check_arguments(step: int, parts: list[str], documents: list[str], keep: int | None) -> None:
    if not 0 <= step < 10**12:
        raise UsageError(f"step must be in 0..10^12 - 1; got {step}")
    if keep is not None and keep < 1:
        raise UsageError(f"keep must be at least 1 checkpoint; got {keep}")
    for name in parts + documents:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"names of parts and documents must be 1 to 64 characters of A-Z a-z 0-9 _ . -; got {name!r}"
            )
    if "manifest" in documents:
        raise UsageError(
            "a document cannot be named 'manifest', because manifest.json holds the checksums; choose another name"
        )


def _finish(
    temporary: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, bytes], keep: int | None
) -> Path:
    directory = temporary.parent
    final = directory / f"step-{step:08d}"
    with _os_errors_as_storage_error(step, directory, _size(tensors, texts)):
        _write_all(temporary, step, tensors, texts)
        aside = final.with_name(f"{final.name}.old")
        if final.exists() and aside.exists():
            _discard(aside)
        move_into_place(temporary, final, aside)
        sync(directory)
    _prune(directory, step, keep)
    return final


def _encode(documents: dict[str, Any]) -> dict[str, bytes]:
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
        sync(directory.parent)


@contextlib.contextmanager
def _os_errors_as_storage_error(step: int, directory: Path, num_bytes: int) -> Iterator[None]:
    """Turn an `OSError` inside the block into `StorageError` with the space needed and available."""
    try:
        yield
    except OSError as error:
        free = ""
        with contextlib.suppress(OSError):
            free = f" and {shutil.disk_usage(directory).free:,} are free"
        raise StorageError(
            f"cannot save step {step} in {directory}: {error.strerror or error}; it needs {num_bytes:,} bytes{free}. "
            "Free some space or repair the disk; older checkpoints are unchanged"
        ) from error


# Removing


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name.removeprefix('step-')}-{os.getpid()}")


def _discard(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that no half-removed checkpoint bears its name."""
    temporary = _temporary(path)
    os.rename(path, temporary)
    if temporary.is_symlink():
        os.unlink(temporary)
    else:
        shutil.rmtree(temporary)


def _prune(directory: Path, step: int, keep: int | None) -> None:
    # Later steps stay: a run that was started again by mistake must not remove the checkpoints of the first one.
    standing = [path for path in _checkpoints(directory) if _order(path)[0] <= step]
    replaced = [path for path in standing if path.suffix == ".old" and path.with_suffix("") in standing]
    standing = [path for path in standing if path not in replaced]
    for path in replaced + ([] if keep is None else standing[:-keep]):
        try:
            _discard(path)
        except OSError as error:
            raise StorageError(
                f"step {step} is saved, but the old checkpoint {path} cannot be removed: {error.strerror or error}"
            ) from error


def _remove_stale(directory: Path) -> None:
    """Remove temporary directories of killed processes, and of this process id, which a container may reuse."""
    for path in list(directory.iterdir()):
        match = _TEMPORARY.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


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
    """Return the checkpoints in a directory, oldest first."""
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
    stored = [
        name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors") and name not in shards
    ]
    for part in parts or ():
        if part not in stored:
            raise UsageError(f"{path} has no part {part!r}; it has {', '.join(stored)}")
    chosen = [f"{part}.safetensors" for part in (stored if parts is None else dict.fromkeys(parts))]
    texts = [name for name in files if name.endswith(".json")]
    for name in shards if parts is None else ():
        manifest.check(path / name, files[name])
    contents = {name: manifest.read_file(path / name, files[name]) for name in texts + chosen}
    documents = {name.removesuffix(".json"): parse_json(contents.pop(name), path / name) for name in texts}
    # popped one by one, so that the bytes of a part are freed once its tensors are made
    tensors = {name.removesuffix(".safetensors"): parse_tensors(contents.pop(name), path / name) for name in chosen}
    return Checkpoint(path, step, tensors, documents)
