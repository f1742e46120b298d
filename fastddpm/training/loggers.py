"""Where the numbers of a run go besides its log: TensorBoard where it is installed, Weights & Biases on request."""

import contextlib
import importlib
import importlib.util
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fastddpm.config import Preset
from fastddpm.errors import StorageError, UsageError
from fastddpm.storage.documents import to_dict
from fastddpm.storage.files import write_text


class Logger(Protocol):
    """Takes the numbers of a step, and pictures."""

    name: str

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Finite numbers by name."""

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture that lies at `path`."""

    def close(self) -> None:
        """Write out what is held back."""


class TensorBoard:
    """Event files in `directory`; on resume, what is behind `resume_step` is hidden from the viewer."""

    name = "TensorBoard"

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=30)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases called as the directory `run`; resumed, the same one goes on.

    The library's own settings hold: WANDB_MODE=offline keeps everything in `run`/wandb. It is given the numbers,
    pictures and configuration of the run, and neither code nor the screen's text.
    """

    name = "Weights & Biases"

    def __init__(self, project: str, run: Path, preset: Preset) -> None:
        self._library: Any = importlib.import_module("wandb")
        settings = self._library.Settings(disable_git=True, disable_code=True, save_code=False, console="off")
        self._run = self._library.init(
            project=project, name=run.resolve().name, id=_identity(run), resume="allow", dir=str(run),
            config=to_dict(preset), settings=settings,
        )  # fmt: skip

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._library.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _identity(run: Path) -> str:
    """The name by which Weights & Biases knows the run again."""
    path = run / "wandb-id"
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


class Loggers:
    """Several sinks as one. One that fails is told of by `say` and left out from then on: the run is worth more."""

    def __init__(self, loggers: Sequence[Logger], say: Callable[[str], None]) -> None:
        self._loggers, self._say = list(loggers), say

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Give each logger the finite numbers of a record."""
        numbers = {name: value for name, value in record.items() if _is_number(value) and name != "step"}
        self._each(lambda logger: logger.write(step, numbers))

    def image(self, step: int, name: str, path: Path) -> None:
        """Give each logger a picture."""
        self._each(lambda logger: logger.image(step, name, path))

    def close(self) -> None:
        """Close each logger."""
        self._each(lambda logger: logger.close())
        self._loggers.clear()

    def _each(self, action: Callable[[Logger], None]) -> None:
        for logger in list(self._loggers):
            try:
                action(logger)
            except Exception as error:
                self._say(f"{logger.name} failed and is left out from here on: {_first_line(error)}")
                self._loggers.remove(logger)


def open_loggers(
    run: Path, preset: Preset, *, resume_step: int | None = None, wandb: str | None, say: Callable[[str], None]
) -> Loggers:
    """TensorBoard in `run`/tensorboard where the library is installed, and with `wandb` that project.

    Raises `UsageError` for a `wandb` that cannot be had. No network is touched without it.
    """
    loggers: list[Logger] = []
    if wandb is not None:
        loggers.append(_open_wandb(wandb, run, preset))
    if _installed("tensorboard"):
        try:
            loggers.append(TensorBoard(run / "tensorboard", resume_step))
        except Exception as error:
            say(f"note: no TensorBoard, since it is installed but does not start: {_first_line(error)}")
    return Loggers(loggers, say)


def _open_wandb(project: str, run: Path, preset: Preset) -> Logger:
    if not project:
        raise UsageError("--wandb takes the name of a project; got an empty one")
    if not _installed("wandb"):
        raise UsageError("--wandb needs the library: pip install 'fastddpm[wandb]', or leave the option out")
    try:
        return WeightsAndBiases(project, run, preset)
    except Exception as error:
        reason = _first_line(error).rstrip(".")
        raise UsageError(
            f"--wandb {project}: {reason}. Log in first, set WANDB_MODE=offline, or leave the option out"
        ) from error


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class JsonLines:
    """An append-only log.jsonl; on resume, lines behind the checkpoint's step are dropped first."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self.path = path
        if resume_step is not None and path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= resume_step]
            write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and hand it to the operating system at once. Raises `StorageError`."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every record was flushed; what is left is what could not be written
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, in order; a line that is only half written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if math.isfinite(_step(line))]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line, from a run that was killed
