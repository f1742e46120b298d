"""environment.json of a run: command, versions, device and data of each session (each start of the run)."""

import hashlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastddpm.kernels
from fastddpm.errors import DataError
from fastddpm.ops import status
from fastddpm.ops.backend import chosen_backend
from fastddpm.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from fastddpm.runtime.progress import log
from fastddpm.storage.documents import read_object, to_dict
from fastddpm.storage.files import set_aside, write_json

from .initial import Origin

LIBRARIES = ("torch", "numpy", "pillow", "safetensors", "triton")
_HIDDEN = "***"
_SECRET = re.compile(r"token|secret|password|passwd|credential|api[-_]?key|access[-_]?key", re.IGNORECASE)
_USER_IN_ADDRESS = re.compile(r"(\w+://)[^/@\s]+@")
# Prefixes of Hugging Face, GitHub, OpenAI, AWS and W&B tokens; older W&B tokens are 40 hexadecimal digits.
_TOKEN = re.compile(r"\b(hf_|gh[a-z]_|github_pat_|sk-|AKIA)[A-Za-z0-9_-]{8,}|\b[0-9a-f]{40}\b|wandb_v1_[\w-]{8,}")
_SHOWN_LINES, _SHOWN_CHARACTERS = 20, 200  # of the changes at a start of the run
_SHORTEST_SECRET = 6  # characters of a variable's value; shorter values also occur in harmless words


def record_session(
    run: Path,
    command: Sequence[str],
    device: torch.device,
    data: Mapping[str, Any],
    *,
    step: int = 0,
    changed: Sequence[str] = (),
    origin: Origin | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Path:
    """Append a session that starts at `step` to `run`/environment.json and return the file's path.

    `data`: name, checksum and source of the images. `changed`: the options that --override changed, as in
    "lr: 0.002 -> 0.001". `origin`: the model that the run began with (--init), if any. No environment variable is
    written, and anything in `command` that looks like a secret is replaced by ***. Raises `StorageError` if the file
    cannot be written.
    """
    path = run / "environment.json"
    session = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "command": without_secrets(command, os.environ),
        "changed": list(changed),
        "processes": group.world_size,
        "data": dict(data),
        **({} if origin is None else {"origin": to_dict(origin)}),
        **_system(device),
    }
    write_json(path, {"sessions": [*_earlier(path), session]})
    return path


def without_secrets(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return `command` with secrets replaced by ***.

    Secrets are values of options with a name like token or password, texts that look like a token, user names and
    passwords in URLs, and the values of variables in `environment` with a name like token, password or key.
    """
    known = [
        value
        for name, value in environment.items()
        if (_SECRET.search(name) or name.upper().endswith("KEY")) and len(value) >= _SHORTEST_SECRET
    ]
    shown, hide_next = [], False
    for argument in command:
        option, equals, _ = argument.partition("=")
        secret_option = option.startswith("-") and _SECRET.search(option) is not None
        if hide_next and not argument.startswith("-"):
            argument = _HIDDEN
        elif secret_option and equals:
            argument = option + equals + _HIDDEN
        for value in known:
            argument = argument.replace(value, _HIDDEN)
        shown.append(_TOKEN.sub(_HIDDEN, _USER_IN_ADDRESS.sub(rf"\1{_HIDDEN}@", argument)))
        hide_next = secret_option and not equals
    return shown


def _earlier(path: Path) -> list[Any]:
    """Return the sessions already in the file; none, after a line to stderr, if it is damaged and set aside."""
    try:
        sessions = read_object(path).get("sessions")
        if not isinstance(sessions, list):
            raise DataError(f"{path} lists no sessions")
        return sessions
    except FileNotFoundError:
        if not path.is_symlink():
            return []
        problem = f"{path} is a broken link"
    except DataError as error:
        problem = str(error)
    log(f"{problem}; a new one begins, and the old one is {set_aside(path).name} beside it")
    return []


def changes(run: Path) -> list[tuple[int, str]]:
    """Return the steps at which --override changed options of `run`, each with the changes as text.

    Sessions that are damaged are left out.
    """
    try:
        sessions = read_object(run / "environment.json").get("sessions")
    except (FileNotFoundError, DataError):  # it is told when the run goes on
        return []
    listed = sessions if isinstance(sessions, list) else []
    pairs = [(session.get("step"), session.get("changed")) for session in listed if isinstance(session, dict)]
    return [
        (step, "\n".join(line[:_SHOWN_CHARACTERS] for line in lines[:_SHOWN_LINES]))
        for step, lines in pairs
        if type(step) is int and isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines)
    ]


def _system(device: torch.device) -> dict[str, Any]:
    """Return versions, device, threads, and the implementation that each operation uses."""
    found: dict[str, Any] = {
        "fastddpm": fastddpm.__version__,
        "source_sha256": _source_checksum(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "system": platform.platform(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "backend": chosen_backend(),
        "operations": status(device.type),
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version()}
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors"


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_checksum() -> str:
    """Return the sha256 of the package's Python files, which changes with every edit, unlike the version."""
    digest = hashlib.sha256()
    package = Path(sys.modules["fastddpm"].__path__[0])
    for root in (package, Path(fastddpm.kernels.__path__[0])):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
