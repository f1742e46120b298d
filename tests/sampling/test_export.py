"""Export: a chain of exported reverse steps draws the sampler's images, in PyTorch, onnxruntime and AOTInductor."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.marks import slow
from helpers.networks import SMALLEST, random_model
from torch import Tensor

import fastddpm
from fastddpm import export as command
from fastddpm.config import DiffusionConfig, UNetConfig
from fastddpm.errors import FastddpmError, UsageError
from fastddpm.kernels.philox import STREAM_INITIAL, STREAM_REVERSE
from fastddpm.ops import random_normal
from fastddpm.ops.decompositions import decompositions
from fastddpm.sampling import export
from fastddpm.sampling.export import files
from fastddpm.sampling.export.step import ReverseStep
from fastddpm.sampling.sampler import Sampler

Step = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
WITH_CLASSES = UNetConfig(**{**vars(SMALLEST), "num_classes": 3, "label_dropout": 0.1})
ATTENDING = UNetConfig(**{**vars(SMALLEST), "image_size": 8, "multipliers": (1, 2), "attention_resolutions": (4,)})


def needs(*names: str) -> None:
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed: pip install 'fastddpm[onnx]'")


def normals(sampler: Sampler, seeds: list[int], step: int, stream: int) -> Tensor:
    images, key = torch.tensor(seeds), torch.tensor(sampler.seed)
    return random_normal(sampler.interface.shape, images, key, torch.tensor(step), stream)


def drawn(sampler: Sampler, step: Step, seeds: list[int], labels: list[int] | None = None) -> Tensor:
    """The chain as a program without fastddpm's sampler takes it."""
    x, x0 = normals(sampler, seeds, 0, STREAM_INITIAL), torch.zeros(len(seeds), *sampler.interface.shape)
    for i, t in enumerate(sampler.timesteps.tolist()):
        inputs = {"x_t": x, "step": torch.tensor(i), "noise": normals(sampler, seeds, t, STREAM_REVERSE)}
        if sampler.multistep:
            inputs["previous_x0"] = x0
        if labels is not None:
            inputs["label"] = torch.tensor(labels)
        if sampler.interface.null_label is not None:
            inputs["guidance"] = torch.tensor(float(sampler.guidance))
        x, x0 = step(inputs)
    return x.clamp(-1, 1)


def in_onnxruntime(path: Path) -> Step:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def step(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, x0 = session.run(["x_next", "x0"], {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(x), torch.from_numpy(x0)

    return step


CHAINS: dict[str, tuple[UNetConfig, dict[str, Any], dict[str, Any]]] = {
    "ancestral": (SMALLEST, {}, {}),
    "learned": (UNetConfig(**{**vars(SMALLEST), "learned_variance": True}), {"variance": "learned_range",
                "loss": "hybrid"}, {}),
    "ddim": (SMALLEST, {"prediction": "v"}, {"method": "ddim", "eta": 0.5}),
    "dpm2m": (SMALLEST, {"schedule": "cosine"}, {"method": "dpm2m", "spacing": "logsnr"}),
    "guided": (WITH_CLASSES, {}, {"guidance": 3.0, "guidance_interval": (200, 700), "guidance_rescale": 0.7}),
    "thresholded": (WITH_CLASSES, {}, {"guidance": 3.0, "dynamic_threshold": 0.9}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.filterwarnings("ignore:.*spacing:UserWarning")
def test_a_chain_of_steps_draws_the_sampler_s_images(name: str) -> None:
    config, diffusion, options = CHAINS[name]
    model = random_model(config, DiffusionConfig(**diffusion))
    sampler, module = Sampler(model.unet, model.diffusion, 10, seed=5, **options), None
    module, labels = ReverseStep(sampler), [2, 0, 1] if config.num_classes else None
    with torch.no_grad():
        ours = drawn(sampler, lambda inputs: module(**inputs), [7, 8, 2**32 - 1], labels)
    expected = sampler.sample([7, 8, 2**32 - 1], labels)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.1


@pytest.mark.slow
def test_a_program_is_read_without_fastddpm_and_takes_any_batch(tmp_path: Path) -> None:
    model = random_model(ATTENDING)
    exported = export.denoiser(model)
    assert not [node for node in exported.program.graph.nodes if "fastddpm" in str(node.target)]
    error = export.write(exported, tmp_path / "denoiser.pt2", "pt2")
    assert error is not None and error < 1e-5
    extra = {"fastddpm.json": ""}
    program = torch.export.load(tmp_path / "denoiser.pt2", extra_files=extra).module()
    about = json.loads(extra["fastddpm.json"])
    assert about["exported"] == "denoiser" and about["prediction"] == "eps" and about["T"] == "1000"
    for n in (1, 5):
        x_t, t = torch.randn(n, 1, 8, 8), torch.arange(n) * 100 + 3
        with torch.no_grad(), fastddpm.ops.use_backend("reference"):
            exact = model.unet.double()(x_t.double(), t)
            model.unet.float()
            torch.testing.assert_close(program(x_t=x_t, t=t).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "network"), [slow("onnx", "small"), slow("onnx", "digits"), slow("aoti", "smallest")])
def test_a_chain_in_another_runtime_draws_the_sampler_s_images(name: str, network: str, tmp_path: Path) -> None:
    """The digits with classifier-free guidance, its scale an input; 10 steps, three images at once and one alone."""
    if name == "onnx":
        needs("onnx", "onnxscript", "onnxruntime")
    elif reason := export.missing("aoti"):
        pytest.skip(reason)
    own = {"small": ATTENDING, "smallest": SMALLEST}
    model = random_model(own[network]) if network in own else fastddpm.load(network)
    options = {"guidance": 2.0, "method": "dpm2m"} if network == "digits" else {}
    sampler = Sampler(model.unet, model.diffusion, 10, **options)
    path, labels = tmp_path / "step", [1, 7, 4] if network == "digits" else None
    error = export.write(export.reverse_step(sampler), path, name)
    assert error is not None and error < 1e-5
    step = in_onnxruntime(path) if name == "onnx" else packaged(path)
    with torch.no_grad():
        ours = drawn(sampler, step, [0, 1, 2], labels)
        alone = drawn(sampler, step, [1], labels and labels[1:2])
    expected = sampler.sample([0, 1, 2], labels)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone[0], expected[1], rtol=0, atol=1e-4)


def packaged(path: Path) -> Step:
    with path.open("rb") as file:
        package = torch._inductor.aoti_load_package(file)
    return lambda inputs: tuple(package(**inputs))


def test_each_operation_in_pytorch_s_operators() -> None:
    """The statistics, too, which no network reads."""
    torch.manual_seed(0)
    ours, table = torch.ops.fastddpm, decompositions()
    x, skip, temb, scale, shift = (torch.randn(2, *shape) for shape in ((4, 3, 5), (8, 3, 5), (12,), (12,), (12,)))
    weight, bias = torch.randn(12), torch.randn(12)
    q, k, v = (torch.randn(2, 15, 8) for _ in range(3))
    norm = (x, weight, bias, 3, 1e-6, skip, temb, scale, shift, True, 0.0, None, None, None, 0)
    calls: dict[Any, tuple[Any, ...]] = {
        ours.group_norm_silu.default: norm,
        ours.attention.default: (q, k, v, 0.3, False),
        ours.linear_bf16.default: (q, torch.randn(6, 8), torch.randn(6)),
        ours.conv3x3.default: (x, torch.randn(6, 4, 3, 3), torch.randn(6), True, False),
    }
    assert calls.keys() == table.keys()
    for operation, arguments in calls.items():
        expected, found = operation(*arguments), table[operation](*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def of_a_layer(*, kept: bool = False) -> export.Exported:
    """A program that is quickly traced."""
    layer, x = torch.nn.Linear(2, 3), torch.ones(2, 2)
    program = torch.export.export(layer, (), kwargs={"input": x})
    return export.Exported(program, {"input": x}, ("out",), (layer(x).detach(),), {}, kept)


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = of_a_layer()
    monkeypatch.setattr(files, "_run_pt2", lambda exported, path: [1.01 * right for right in exported.expected])
    with pytest.raises(FastddpmError, match=r"computes something else than the network: error 1\.0e-02"):
        export.write(exported, tmp_path / "denoiser.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SMALLEST)
    guided = Sampler(model.unet, model.diffusion, 3, cond_fn=lambda x, t, label: x)
    with pytest.raises(UsageError, match="cond_fn cannot be exported"):
        export.reverse_step(guided)
    exported = of_a_layer(kept=True)
    with pytest.raises(UsageError, match="one of onnx, pt2, aoti; got 'tflite'"):
        export.write(exported, tmp_path / "x", "tflite")
    monkeypatch.setattr(files, "missing", lambda kind: None)
    with pytest.raises(UsageError, match="holds no operations of fastddpm"):
        export.write(exported, tmp_path / "x", "onnx")
    monkeypatch.undo()
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"needs onnx and onnxscript, not installed here: pip install 'fastddpm\[onnx\]'"
    ):
        export.write(exported, tmp_path / "x", "onnx")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="no C\\+\\+ compiler g\\+\\+ here"):
        export.write(exported, tmp_path / "x", "aoti")
    with pytest.raises(UsageError, match=r"only float32 weights are exported, and these are torch\.float64"):
        model.unet.double()
        export.denoiser(model)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_all_mistakes_before_it_loads_anything(tmp_path: Path) -> None:
    arguments = ["nowhere", "--to", "diffusers", "--whole-step", "--keep-operations"]
    with pytest.raises(UsageError) as refused:
        command.main(arguments)
    assert "no checkpoint at nowhere" in str(refused.value)
    with pytest.raises(
        UsageError, match=r"2 options cannot be used:\n.*a pipeline of diffusers is none.*\n.*pt2 and aoti"
    ):
        command.main(["digits", *arguments[1:]])
    with pytest.raises(UsageError, match="--method, --eta need --whole-step"):
        command.main(["digits", "--to", "pt2", "--method", "ddim", "--eta", "0.5"])
    with pytest.raises(UsageError, match=r"is a directory; name the file to write, such as .*/denoiser\.pt2"):
        command.main(["digits", "--to", "pt2", "--out", str(tmp_path)])
    (tmp_path / "there.pt2").write_text("mine")
    with pytest.raises(UsageError, match="exists; choose another --out, or add --overwrite"):
        command.main(["digits", "--to", "pt2", "--out", str(tmp_path / "there.pt2")])
    assert (tmp_path / "there.pt2").read_text() == "mine"


def test_the_command_writes_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["digits", "--to", "diffusers", "--out", str(tmp_path / "pipeline")])
    assert capsys.readouterr().out == f"{tmp_path / 'pipeline'}\n"
    own, same = fastddpm.load("digits").unet.state_dict(), fastddpm.load(tmp_path / "pipeline").unet.state_dict()
    assert all(np.array_equal(own[name], same[name]) for name in own)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_the_command_writes_a_step(keep: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "step.pt2"
    kept = ["--keep-operations"] if keep else []
    command.main(["digits", "--to", "pt2", "--whole-step", "--steps", "6", "--out", str(path), *kept])
    said = capsys.readouterr().out
    assert "x_t, step, noise, label, guidance -> x_next, x0; run, error " in said
    program, model = torch.export.load(path).module(), fastddpm.load("digits")
    sampler = Sampler(model.unet, model.diffusion, 6, guidance=2.0)
    with torch.no_grad():
        ours = drawn(sampler, lambda inputs: program(**inputs), [3, 4], [3, 4])
    torch.testing.assert_close(ours, sampler.sample([3, 4], [3, 4]), rtol=0, atol=1e-4)
