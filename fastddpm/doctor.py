"""python -m fastddpm.doctor: which implementations run here, their errors and speeds, and why no faster one runs."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastddpm import __version__
from fastddpm.runtime import cli
from fastddpm.runtime.options import Device, check_positive
from fastddpm.runtime.progress import announced, log

if TYPE_CHECKING:
    import torch

PROGRAM = "fastddpm.doctor"
LIBRARIES = ("torch", "triton", "numpy", "pillow", "safetensors")
EXTRAS = ("datasets", "diffusers", "lmdb", "matplotlib", "pyarrow", "scipy", "tensorboard", "torch-fidelity")


@dataclass(frozen=True)
class Command:
    """Check this installation: versions, device, and the implementation, error and speed of each operation.

    Exits with 1 if the error of an operation, against float64, is above its tolerance.
    """

    device: Device = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the trials. auto: the default of the sampler, bf16 on a GPU and fp32 on a CPU."""
    batch: int | None = None
    """Images of each trial. Default: 8 on a CPU, 128 on a GPU."""
    json: bool = False
    """Print JSON instead of text, for a bug report."""


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    command = cli.parse(Command, arguments, program=PROGRAM)
    check_positive(batch=command.batch)

    with announced("loading PyTorch"):
        import torch

        from fastddpm.ops import selftest, status
        from fastddpm.ops.backend import implementations
        from fastddpm.runtime.device import choose_device
        from fastddpm.sampling.engine import PRECISIONS

    device = choose_device(command.device)
    on_gpu = device.type == "cuda"
    default = torch.bfloat16 if on_gpu else torch.float32
    dtype = default if command.precision == "auto" else PRECISIONS[command.precision]
    batch = command.batch or (128 if on_gpu else 8)
    if not command.json:
        print("\n".join(_lines(system(device))))
        if busy():
            print("note: other programs keep this machine busy, so the speeds below are unreliable")
        print(flush=True)  # the lines above come before those of standard error below
    log(f"trying each operation on {batch} images in {_name(dtype)} ..")
    findings = selftest.run(device, dtype, batch)
    failed = [finding.operation for finding in findings if not finding.passed]
    if command.json:
        report = {**system(device), "precision": _name(dtype), "batch": batch}
        report["backends"] = status(device.type)
        print(json.dumps(report | {"trials": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(table(findings))
        print("\n".join(_implementation_lines(implementations(device.type))))
    if failed:
        log(f"error against float64 above the tolerance: {', '.join(failed)}")
        sys.exit(1)


def table(findings: Sequence[Any]) -> str:
    """Return the findings of the trials (`selftest.Finding`) as text, one per line."""
    lines = [f"  {'operation':28} {'error':>8} {'at most':>8}   against PyTorch's operators"]
    for found in findings:
        speed = f"{found.speed:.2f} times as fast" + ("" if found.passed else "   FAILED")
        lines.append(f"  {found.operation:28} {found.error:8.1e} {found.tolerance:8.0e}   {speed}")
    return "\n".join(lines)


def _implementation_lines(found: Mapping[str, tuple[str, Sequence[str]]]) -> list[str]:
    """Return the implementation of each operation, a line each, and below them each note with its operations."""
    lines = ["", "the implementation of each operation"]
    lines += [f"  {operation:16} {running}" for operation, (running, _) in found.items()]
    notes: dict[str, list[str]] = {}
    for operation, (_, own) in found.items():
        for note in own:
            notes.setdefault(note, []).append(operation)
    if notes:
        lines += ["", "their limits, and why no faster one runs"]
    for note, operations in notes.items():
        who = "every operation" if len(operations) == len(found) else ", ".join(operations)
        lines += [f"  {who}:", f"    {note}"]
    return lines


def system(device: "torch.device") -> dict[str, Any]:
    """Return versions, the device, and the settings of the environment that change results or speed."""
    import torch

    from fastddpm.kernels import native, native_cuda

    found: dict[str, Any] = {"fastddpm": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in LIBRARIES}
    found["torch"] = torch.__version__  # with its build, +cu130 for one, which the metadata of the package may lack
    found |= {"system": platform.platform(), "device": _device_name(device)}
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda or torch.version.hip}
        found["cuda library"] = native_cuda.unavailable() or "built"
    else:
        found["threads"] = torch.get_num_threads()
        reason = native.unavailable()
        found["cpu library"] = reason or f"built, running its {native.isa()} code"
    found["FASTDDPM_BACKEND"] = os.environ.get("FASTDDPM_BACKEND", "not set")
    found["optional"] = {name: version(name) for name in EXTRAS}
    return found


def version(library: str) -> str:
    """Return the installed version of `library`, or "not installed"."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def busy() -> bool:
    """Whether more programs are ready to run than there are cores; False if the system does not tell."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return False


def _device_name(device: "torch.device") -> str:
    import torch

    if device.type != "cuda":
        return device.type
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB"


def _lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in found.items():
        text = ", ".join(f"{key} {entry}" for key, entry in value.items()) if isinstance(value, dict) else value
        lines.append(f"{name:17} {text}")
    return lines


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    cli.run(main)
