"""python -m fastddpm.doctor: which implementations run here, their errors and speeds, and why no faster one runs.

On a CPU also which precision of the network is the faster one here.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastddpm import __version__
from fastddpm.runtime import cli
from fastddpm.runtime.options import Device, check_positive
from fastddpm.runtime.progress import announced, log

if TYPE_CHECKING:
    import torch

    from fastddpm.sampling.precision_trial import Timed

PROGRAM = "fastddpm.doctor"
LIBRARIES = ("torch", "triton", "numpy", "pillow", "safetensors")
CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")  # in CPUINFO: of x86, of ARM
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
        from fastddpm.sampling import precision_trial
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
    precisions = []
    if not on_gpu:
        log(f"timing the CIFAR-10 network on {batch} images in float32 and bfloat16 ..")
        precisions = precision_trial.run(batch)
    failed = [finding.operation for finding in findings if not finding.passed]
    if command.json:
        report = {**system(device), "precision": _name(dtype), "batch": batch}
        report["backends"] = status(device.type)
        report["precisions"] = [asdict(timed) for timed in precisions]
        print(json.dumps(report | {"trials": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(table(findings))
        if precisions:
            print("\n".join(_precision_lines(precisions, batch)))
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


def _precision_lines(found: Sequence["Timed"], batch: int) -> list[str]:
    """Return the times of the precisions as text, a line each, and which is the fastest."""
    first, fastest = found[0], min(found, key=lambda timed: timed.milliseconds)
    lines = ["", f"the CIFAR-10 network by precision, {batch} image{'s' if batch > 1 else ''}"]
    for timed in found:
        line = f"  {timed.precision:16} {timed.milliseconds:8.1f} ms"
        if timed is not first:
            speed = first.milliseconds / timed.milliseconds
            line += (
                f"   {speed:.2f} times as fast as {first.precision}, from which it differs by {timed.difference:.1e}"
            )
        lines.append(line)
    if len(found) == 1:
        return [*lines, "  bf16 is computed in fp32 here, as the processor has no instructions for it"]
    return [*lines, f"  {fastest.precision} is the faster one here; the default on a CPU is fp32"]


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
        found["bf16 instructions"] = bf16_instructions()
    found["FASTDDPM_BACKEND"] = os.environ.get("FASTDDPM_BACKEND", "not set")
    found["optional"] = {name: version(name) for name in EXTRAS}
    return found


def version(library: str) -> str:
    """Return the installed version of `library`, or "not installed"."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def bf16_instructions() -> str:
    """Return the processor's instructions for products of bfloat16 by Linux's names, "none", or "unknown"."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return ", ".join(flag for flag in BF16_FLAGS if flag in flags) or "none"


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
