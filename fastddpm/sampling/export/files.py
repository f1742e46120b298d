"""Exported programs written to files, each read back and compared with the network before it gets its name."""

import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.errors import FastddpmError, UsageError
from fastddpm.storage.files import write_whole

from .exported import Exported
from .quiet import quiet

FORMATS = ("onnx", "pt2", "aoti")
TOLERANCE = 1e-4  # of the largest value of an output: float32 rounding is 1e-6, a wrong program is far from it
_MAX_ONNX_BYTES = 2**31 - 2**20  # a protobuf holds less than 2 GiB, and there is more in it than the weights
_ABOUT = "fastddpm.json"


def missing(kind: str) -> str | None:
    """Return why a file of `kind`, one of FORMATS, cannot be written here, or None."""
    if kind == "onnx":
        absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if absent:
            return f"ONNX needs {' and '.join(absent)}, not installed here: pip install 'fastddpm[onnx]'"
    if kind == "aoti":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return (
                f"an AOTInductor package is compiled, and there is no C++ compiler {compiler} here; install one, or "
                "set CXX to yours"
            )
    return None


def write(exported: Exported, path: Path, kind: str) -> float | None:
    """Write a program as `kind`, one of FORMATS, to `path`, and return the error of the file, read back and run.

    The error is the largest difference to the network's own output over the largest value; None for an ONNX file
    without onnxruntime to run it. onnx: one file, with the weights, and `about` in its metadata. pt2: what
    `torch.export.load` reads. aoti: what `torch._inductor.aoti_load_package` and C++ load, compiled for this processor.
    `about` is the file fastddpm.json in a pt2, and the metadata of an aoti. Raises `UsageError` if `missing(kind)`
    gives a reason, or a file would be too large for ONNX, `StorageError` if it cannot be written, and `FastddpmError`
    if the error is above 1e-4.
    """
    problem = _problem(exported, kind)
    if problem is not None:
        raise UsageError(problem)
    writer, runner = {"onnx": (_onnx, _run_onnx), "pt2": (_pt2, _run_pt2), "aoti": (_aoti, _run_aoti)}[kind]
    errors: list[float | None] = []

    def write_and_compare(temporary: Path) -> None:
        writer(exported, temporary)
        outputs = runner(exported, temporary)
        errors.append(None if outputs is None else _error(outputs, exported.expected))
        if errors[0] is not None and not errors[0] <= TOLERANCE:
            raise FastddpmError(
                f"the {kind} file computes something else than the network: error {errors[0]:.1e}, more than "
                f"{TOLERANCE:g}; nothing was written"
            )

    write_whole(path, write_and_compare, durable=True)
    return errors[0]


def _problem(exported: Exported, kind: str) -> str | None:
    if kind not in FORMATS:
        return f"a program is written as one of {', '.join(FORMATS)}; got {kind!r}"
    if reason := missing(kind):
        return reason
    if kind != "onnx":
        return None
    if exported.kept:
        return "an ONNX file holds no operations of fastddpm; leave keep_operations out"
    size = sum(tensor.nbytes for tensor in exported.program.state_dict.values())
    if size > _MAX_ONNX_BYTES:
        return f"the weights have {size / 2**30:.1f} GiB, and an ONNX file holds up to 2; write a pt2"
    return None


def _error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(outputs, expected, strict=True)
    return max(float((ours.cpu() - right.cpu()).abs().max() / right.abs().max()) for ours, right in pairs)


def _onnx(exported: Exported, path: Path) -> None:
    with quiet():
        program = torch.onnx.export(
            exported.program, dynamo=True, input_names=list(exported.inputs), output_names=exported.outputs,
            dynamic_shapes=exported.dynamic, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update(exported.about)
    program.save(path)


def _run_onnx(exported: Exported, path: Path) -> list[Tensor] | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arrays = {name: tensor.cpu().numpy() for name, tensor in exported.inputs.items()}
    return [torch.from_numpy(output) for output in session.run(list(exported.outputs), arrays)]


def _pt2(exported: Exported, path: Path) -> None:
    with quiet(), path.open("wb") as file:
        torch.export.save(exported.program, file, extra_files={_ABOUT: json.dumps(exported.about, indent=1)})


def _run_pt2(exported: Exported, path: Path) -> tuple[Tensor, ...]:
    with path.open("rb") as file, torch.no_grad():
        outputs = torch.export.load(file).module()(**exported.inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _aoti(exported: Exported, path: Path) -> None:
    named = path.with_name(f"{path.name}.pt2")  # PyTorch insists on this suffix
    try:
        with quiet():
            torch._inductor.aoti_compile_and_package(
                exported.program,
                package_path=str(named),
                inductor_configs={"aot_inductor.metadata": exported.about},
            )
        os.replace(named, path)
    finally:
        named.unlink(missing_ok=True)


def _run_aoti(exported: Exported, path: Path) -> tuple[Tensor, ...]:
    with torch.no_grad(), path.open("rb") as file:
        outputs = torch._inductor.aoti_load_package(file)(**exported.inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)
