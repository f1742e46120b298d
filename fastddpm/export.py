"""python -m fastddpm.export CHECKPOINT --to FORMAT: write a model for other runtimes."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastddpm.errors import StorageError, all_problems, refuse
from fastddpm.runtime import cli
from fastddpm.runtime.options import Checkpoint, Device, check_checkpoint
from fastddpm.runtime.progress import announced
from fastddpm.sampling.options import StepOptions
from fastddpm.storage.files import check_out

PROGRAM = "fastddpm.export"
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".aoti.pt2", "diffusers": ""}


@dataclass(frozen=True)
class Command:
    """Write a model for other runtimes: its network, or with --whole-step a reverse step, from which images are drawn.

    The batch may have any size in 1..1024. Every file is read back, run, and compared with the network.
    """

    checkpoint: Checkpoint
    to: Annotated[Literal["onnx", "pt2", "aoti", "diffusers"], tyro.conf.arg(metavar="FORMAT")] = "onnx"
    """onnx: for onnxruntime and others. pt2: a program for torch.export.load. aoti: a package compiled for this device,
    for C++ and for torch._inductor.aoti_load_package. diffusers: a DDPMPipeline directory."""
    whole_step: bool = False
    """Write a reverse step: x_t, the number of the step, noise, label and guidance in; x_{t-1} and x_0 out."""
    step: Annotated[StepOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=StepOptions)
    keep_operations: bool = False
    """Keep fastddpm's operations in a pt2 or aoti, which then runs faster, and only where fastddpm is imported.
    Default: PyTorch's alone."""
    out: Path | None = None
    """File to write, or directory of a pipeline. Default: denoiser, step or pipeline in the run directory."""
    overwrite: bool = False
    """Replace what is there."""
    device: Device = "cpu"


def _problems(command: Command) -> Iterator[str]:
    to = command.to
    if command.whole_step and to == "diffusers":
        yield "--whole-step writes a program, and a pipeline of diffusers is none; leave it out, or take another --to"
    if command.keep_operations and to not in ("pt2", "aoti"):
        yield f"--keep-operations is for pt2 and aoti; {to} has no operations of fastddpm"
    given = [field.name for field in dataclasses.fields(StepOptions) if getattr(command.step, field.name) is not None]
    if given and not command.whole_step:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        yield f"{named} need --whole-step: without it the network alone is written"


def main(arguments: Sequence[str]) -> None:
    """Run the command on `arguments`, as `cli.run` passes them."""
    with all_problems():
        command = cli.parse(Command, arguments, program=PROGRAM)
        check_checkpoint(command.checkpoint)
        refuse(_problems(command))
    name = "pipeline" if command.to == "diffusers" else "step" if command.whole_step else "denoiser"
    out = command.out or cli.run_of(command.checkpoint) / f"{name}{SUFFIXES[command.to]}"
    check_out(out.parent)
    if out.is_dir() and command.to != "diffusers":
        refuse([f"{out} is a directory; name the file to write, such as {out / name}{SUFFIXES[command.to]}"])
    if out.exists() and not command.overwrite:
        refuse([f"{out} exists; choose another --out, or add --overwrite"])
    with announced("loading PyTorch"):
        from fastddpm.pretrained import load
        from fastddpm.runtime.device import choose_device
        from fastddpm.sampling import export
    if command.to != "diffusers":
        refuse(filter(None, [export.missing(command.to)]))
    model = load(command.checkpoint, choose_device(command.device))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {out.parent}: {error.strerror}") from error
    if command.to == "diffusers":
        model.save_pretrained(out, overwrite=command.overwrite)
        print(out)
        return
    with announced("tracing the network"):
        if command.whole_step:
            exported = export.reverse_step(command.step.sampler(model), keep_operations=command.keep_operations)
        else:
            exported = export.denoiser(model, keep_operations=command.keep_operations)
    with announced(f"writing {out}"):
        off = export.write(exported, out, command.to)
    checked = "not run: onnxruntime is not installed" if off is None else f"run, error {off:.1e}"
    print(
        f"{out}: {out.stat().st_size:,} bytes; {', '.join(exported.inputs)} -> {', '.join(exported.outputs)}; {checked}"
    )


if __name__ == "__main__":
    cli.run(main)
