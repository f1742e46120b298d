"""Loggers of a run beside log.jsonl: TensorBoard if it is installed, Weights & Biases on request."""

import importlib
import importlib.util
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fastddpm.config import Preset
from fastddpm.errors import UsageError
from fastddpm.runtime.progress import log
from fastddpm.storage.documents import to_dict
from fastddpm.storage.files import set_aside, write_text
from fastddpm.storage.reading import read_bytes


class Logger(Protocol):
    """A destination for the numbers of each logged step, and for pictures."""

    name: str

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write finite numbers, by name."""

    def image(self, step: int, name: str, path: Path) -> None:
        """Write the picture in the file `path`."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoard:
    """TensorBoard event files in `directory`. On resume, the viewer hides what was written after `resume_step`."""

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
    """A Weights & Biases run named after the directory `run`; a resumed run continues the same one.

    The library's own settings apply: WANDB_MODE=offline keeps everything in `run`/wandb. Numbers, pictures and the
    configuration are sent; source code and terminal output are not.
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
    """Return the run id at Weights & Biases, kept in `run`/wandb-id, so that a resumed run finds it again."""
    path = run / "wandb-id"
    try:
        found = read_bytes(path, 1024).strip()
        if re.fullmatch(rb"[\w-]{1,128}", found):
            return found.decode()
        raise ValueError("not the id of a run")
    except FileNotFoundError:
        pass
    except ValueError as error:
        log(f"{path}: {error}; a new run begins at Weights & Biases, and the file is {set_aside(path).name} beside it")
    identity = secrets.token_hex(4)
    write_text(path, identity + "\n")
    return identity


class Loggers:
    """Several loggers as one. A logger that fails is reported and dropped, because logging must not stop a run."""

    def __init__(self, loggers: Sequence[Logger], report: Callable[[str], None] = log) -> None:
        self._loggers, self._report = list(loggers), report

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Write the finite numbers of a record to every logger."""
        numbers = {name: value for name, value in record.items() if _is_number(value) and name != "step"}
        self._each(lambda logger: logger.write(step, numbers))

    def image(self, step: int, name: str, path: Path) -> None:
        """Write a picture to every logger."""
        self._each(lambda logger: logger.image(step, name, path))

    def close(self) -> None:
        """Close every logger."""
        self._each(lambda logger: logger.close())
        self._loggers.clear()

    def _each(self, action: Callable[[Logger], None]) -> None:
        for logger in list(self._loggers):
            try:
                action(logger)
            except Exception as error:
                self._report(f"{logger.name} failed and is left out from here on: {_first_line(error)}")
                self._loggers.remove(logger)


def open_loggers(
    run: Path,
    preset: Preset,
    *,
    resume_step: int | None = None,
    wandb: str | None,
    report: Callable[[str], None] = log,
) -> Loggers:
    """Open TensorBoard in `run`/tensorboard if it is installed, and Weights & Biases project `wandb` if one is given.

    Raises `UsageError` if Weights & Biases is asked for and is not installed or does not start. Without `wandb`
    nothing is sent over the network.
    """
    loggers: list[Logger] = []
    if wandb is not None:
        loggers.append(_open_wandb(wandb, run, preset))
    if _installed("tensorboard"):
        try:
            loggers.append(TensorBoard(run / "tensorboard", resume_step))
        except Exception as error:
            report(
                f"note: TensorBoard is installed but does not start, so nothing is written to it: {_first_line(error)}"
            )
    return Loggers(loggers, report)


def check_wandb(project: str | None) -> None:
    """Raise `UsageError` if Weights & Biases is asked for without a name, or is not installed. None: not asked for."""
    if project == "":
        raise UsageError("--wandb takes the name of a project; got an empty one")
    if project is not None and not _installed("wandb"):
        raise UsageError("--wandb needs the library: pip install 'fastddpm[wandb]', or leave the option out")


def _open_wandb(project: str, run: Path, preset: Preset) -> Logger:
    check_wandb(project)
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
