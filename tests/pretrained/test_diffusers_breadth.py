"""UNet2DModel in its full breadth, and other schedulers: diffusers itself is the reference, in float64."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.marks import slow
from helpers.networks import SMALL, random_model

import fastddpm
from fastddpm import convert
from fastddpm.config import DiffusionConfig, UNetConfig
from fastddpm.diffusion import Diffusion, betas
from fastddpm.errors import DataError, UsageError
from fastddpm.pretrained import Model
from fastddpm.pretrained import diffusers as pipelines
from fastddpm.pretrained.foreign import unpickle, unpickle_child
from fastddpm.unet import timestep_embedding

BASE: dict[str, Any] = dict(
    sample_size=8, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
)  # fmt: skip
# Without a word on it: heads of 8 channels, norm_eps 1e-5, cosines first, frequencies / half, symmetric padding.
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "the paper's": dict(
        freq_shift=1, flip_sin_to_cos=False, norm_eps=1e-6, downsample_padding=0, attention_head_dim=None
    ),
    "classes": dict(num_class_embeds=5),
    "not square": dict(sample_size=(8, 16)),
    "scale-shift": dict(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8, norm_num_groups=8),
    "no middle attention": dict(add_attention=False, resnet_time_scale_shift="scale_shift"),
    "resnet": dict(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), downsample_type="resnet",
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), upsample_type="resnet",
    ),
    "channels": dict(block_out_channels=(64, 32), in_channels=1, out_channels=2),
    "train_unconditional": dict(
        block_out_channels=(32, 32, 64), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
}  # fmt: skip


def network(case: str) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**BASE | CASES[case])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def theirs(net: Any, config: UNetConfig, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    """diffusers' output in float64, with sinusoids that were rounded once: its own are computed in float32."""
    embedding = timestep_embedding(t, config.width, freq_shift=net.config.freq_shift).double()
    if net.config.flip_sin_to_cos:
        embedding = torch.cat(embedding.chunk(2, 1)[::-1], 1)
    net.time_proj.forward = lambda t: embedding
    with torch.no_grad():
        return net.double()(x.double(), t, class_labels=y).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", [case if case in ("defaults", "resnet") else slow(case) for case in CASES])
def test_networks_compute_what_diffusers_do_and_are_written_again(case: str, tmp_path: Path) -> None:
    net = network(case)
    net.save_pretrained(tmp_path / "unet")
    learned = case == "channels"
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range" if learned else "fixed_small"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    loaded = fastddpm.load(tmp_path)
    config = loaded.preset.unet
    x = torch.randn(2, *config.image_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, y = torch.tensor([3, 977]), torch.tensor([0, 4]) if config.num_classes else None
    expected = theirs(net, config, x, t, y)
    loaded.save_pretrained(tmp_path / "again")
    again = type(net).from_pretrained(tmp_path / "again" / "unet", low_cpu_mem_usage=False).eval()
    with torch.no_grad(), fastddpm.ops.use_backend("reference"):
        ours = loaded.unet.double()(x, t, y)
    for result in (ours, theirs(again, config, x, t, y)):
        assert ((result - expected).abs().max() / expected.abs().max()).item() < 1e-7
    read = fastddpm.load(tmp_path / "again")
    assert read.preset == loaded.preset and read.preset.name == "diffusers"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    path, model = tmp_path_factory.mktemp("pipe") / "pipe", random_model(SMALL)
    pipelines.save(model, path)
    (path / pipelines.OUR_FILE).unlink()
    return path, model


def rewritten(saved: tuple[Path, Model], target: Path, layout: str) -> Path:
    """The pipeline's weights as `layout` says, its configurations beside it."""
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        to = target / (Path(name).name if layout == "flat" else name)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((saved[0] / name).read_bytes())
    tensors = safetensors.torch.load_file(saved[0] / "unet" / pipelines.WEIGHTS)
    stem, folder = "diffusion_pytorch_model", target if layout == "flat" else target / "unet"
    if layout in ("flat", "fp16"):
        half = {name: tensor.half() if layout == "fp16" else tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(half, folder / f"{stem}{'.fp16' * (layout == 'fp16')}.safetensors")
    elif layout == "pickle":
        torch.save(tensors, folder / f"{stem}.bin")
    else:
        names = list(tensors)
        parts = {f"{stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, part in parts.items():
            safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
        places = {name: file for file, part in parts.items() for name in part}
        document = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(document))
    return target


@pytest.mark.parametrize("layout", ["flat", "fp16", "shards", "pickle"])
def test_layouts_of_the_weights(
    saved: tuple[Path, Model], layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rewritten(saved, tmp_path / layout, layout)
    if layout == "pickle":
        with pytest.raises(DataError, match=r"is a pickle.*python -m fastddpm\.convert"):
            fastddpm.load(path)
        monkeypatch.setattr(  # as in test_foreign.py
            unpickle, "read", lambda p: unpickle.Unpickled(*unpickle_child.collect(unpickle_child.unpickled(str(p))))
        )
        convert.main([str(path), str(tmp_path / "out.safetensors")])
        loaded = fastddpm.load(tmp_path / "out.safetensors")
    else:
        loaded = fastddpm.load(path)
    for name, tensor in saved[1].unet.state_dict().items():
        expected = tensor.half().float() if layout == "fp16" else tensor
        assert torch.equal(loaded.unet.state_dict()[name], expected), name


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"conv_in.weight": "../unet/config.json"}, "safetensors files beside it"),
        ({"conv_in.weight": "/etc/passwd"}, "safetensors files beside it"),
        ({}, "must name 1 to"),
        ({"conv_in.weight": 3}, "weight_map must be an object of file names"),
        (
            {"conv_in.weight": "nothing.safetensors"},
            r"lacks unet/nothing\.safetensors, which unet/.*\.index\.json names",
        ),
    ],
)
def test_forged_indices_of_shards_are_refused(
    saved: tuple[Path, Model], places: Any, message: str, tmp_path: Path
) -> None:
    path = rewritten(saved, tmp_path / "x", "shards")
    (path / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(DataError, match=message):
        fastddpm.load(path)


def test_what_a_directory_does_not_tell_is_given_to_convert(saved: tuple[Path, Model], tmp_path: Path) -> None:
    """diffusers' default sample_size is null, and a folder of weights alone has no scheduler."""
    path = rewritten(saved, tmp_path / "x", "flat")
    (path / "scheduler_config.json").unlink()
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(data | {"sample_size": None}))
    with pytest.raises(DataError, match="sample_size is null, so the size of the images is not told"):
        fastddpm.load(path)
    (tmp_path / "given.json").write_text('{"image_size": 8}')
    arguments = [str(path), str(tmp_path / "out.safetensors"), "--config", str(tmp_path / "given.json")]
    with pytest.raises(DataError, match=r"lacks scheduler/scheduler_config\.json .*which tells the process"):
        convert.main(arguments)
    (tmp_path / "given.json").write_text('{"image_size": 8, "schedule": "cosine", "prediction": "v"}')
    convert.main(arguments)
    loaded = fastddpm.load(tmp_path / "out.safetensors")
    assert loaded.preset.unet == SMALL
    assert loaded.diffusion.config == DiffusionConfig(schedule="cosine", prediction="v")
    (tmp_path / "out.safetensors").unlink()
    with pytest.raises(UsageError, match=r"--config: schedule is told by .*scheduler_config\.json"):
        convert.main([str(saved[0]), *arguments[1:]])


SCHEDULERS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("DDPMScheduler", {"timestep_spacing": "trailing"}, {"variance": "fixedsmall"}, {"spacing": "trailing"}),
    ("DDPMScheduler", {"thresholding": True, "clip_sample": False}, {"variance": "fixedsmall"}, {"spacing": "leading"}),
    ("DDPMScheduler", {"clip_sample": False}, {"variance": "fixedsmall", "clip_x0": False}, {"spacing": "leading"}),
    (
        "DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"variance": "fixedsmall", "zero_terminal_snr": True, "prediction": "v"},
        {"spacing": "leading", "method": "ddim"},
    ),
    ("DDIMParallelScheduler", {"beta_schedule": "squaredcos_cap_v2"}, {"variance": "fixedsmall", "schedule": "cosine"},
     {"spacing": "leading", "method": "ddim"}),
    ("DPMSolverMultistepScheduler", {}, {"variance": "fixedsmall", "clip_x0": False},
     {"spacing": "linspace", "method": "dpm2m"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
     {"variance": "fixedsmall", "clip_x0": False}, {"spacing": "karras", "method": "dpm2m-sde"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "process", "sample"), SCHEDULERS)
def test_schedulers_become_process_and_sampling(
    name: str, options: dict[str, Any], process: dict[str, Any], sample: dict[str, Any], saved: tuple[Path, Model],
    tmp_path: Path,
) -> None:  # fmt: skip
    """As diffusers writes them; betas and timesteps are those of the scheduler."""
    diffusers = pytest.importorskip("diffusers")
    path = rewritten(saved, tmp_path / "x", "fp16")
    scheduler = getattr(diffusers, name)(**options)
    scheduler.save_pretrained(path / "scheduler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = fastddpm.load(path)
    assert loaded.diffusion.config == DiffusionConfig(**process)
    defaults = {"method": "ancestral", "spacing": "even"}
    assert {field: getattr(loaded.preset.sample, field) for field in defaults} == defaults | sample
    np.testing.assert_allclose(
        np.cumprod(1 - loaded.diffusion.betas), scheduler.alphas_cumprod.double(), rtol=0, atol=2e-6
    )
    if sample["spacing"] != "karras":  # theirs are not rounded to timesteps
        scheduler.set_timesteps(10)
        sampler = fastddpm.Sampler(
            loaded.unet, loaded.diffusion, 10, loaded.preset.sample.method, spacing=loaded.preset.sample.spacing
        )
        assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", ["PNDMScheduler", slow("EulerDiscreteScheduler"), "HeunDiscreteScheduler"])
def test_the_process_of_other_schedulers_is_read_with_a_warning(
    name: str, saved: tuple[Path, Model], tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    path = rewritten(saved, tmp_path / "x", "fp16")
    getattr(diffusers, name)(prediction_type="v_prediction").save_pretrained(path / "scheduler")
    with pytest.warns(UserWarning, match=f"the process of {name} is read, but fastddpm does not have its method"):
        loaded = fastddpm.load(path)
    ends = (0.00085, 0.012) if name.startswith("Heun") else (1e-4, 0.02)
    assert loaded.diffusion.config == DiffusionConfig(
        prediction="v", variance="fixedsmall", beta_start=ends[0], beta_end=ends[1]
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "DDPMScheduler",
            {"thresholding": True, "sample_max_value": 0.5},
            "sample_max_value must be 1 or more with thresholding",
        ),
        ("DDIMScheduler", {"set_alpha_to_one": False}, "set_alpha_to_one must be True, .*; got False"),
        ("DDIMScheduler", {"steps_offset": True}, "steps_offset must be an integer; got True"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order must be 2; got 3"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver"},
            r"algorithm_type must be one of dpmsolver\+\+",
        ),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "use_lu_lambdas must be False"),
        ("FlowMatchEulerDiscreteScheduler", {}, "the scheduler must be one of DDPMScheduler"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous"},
            "timestep_type must be 'discrete'; got 'continuous'",
        ),
        ("DDPMScheduler", {"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr must be true or false; got 'yes'"),
    ],
)
def test_fields_of_schedulers_that_are_not_ours_are_refused_by_name(
    name: str, options: dict[str, Any], message: str, saved: tuple[Path, Model], tmp_path: Path
) -> None:
    path = rewritten(saved, tmp_path / "x", "fp16")
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name} | options))
    with pytest.raises(DataError, match=message):
        fastddpm.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_scale": 0.25}, "time_scale 0.25"),
        ({"channels": (64, 32), "width": 32}, "width 32"),
        ({"heads": 2}, "heads 2 .diffusers: heads of one size"),
    ],
)
def test_networks_that_diffusers_do_not_have_are_not_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = UNetConfig(**{"image_size": 8, "width": 32, "multipliers": (1, 2), "blocks": 1} | options
                        | {"attention_resolutions": (8, 4), "groups": 8})  # fmt: skip
    with pytest.raises(UsageError, match=message):
        pipelines.save(random_model(config), tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


@pytest.mark.parametrize("schedule", ["linear", "quad", "cosine"])
def test_zero_terminal_snr_equals_diffusers(schedule: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    name = {"linear": "linear", "quad": "scaled_linear", "cosine": "squaredcos_cap_v2"}[schedule]
    config = DiffusionConfig(schedule=schedule, zero_terminal_snr=True, prediction="v")  # type: ignore[arg-type]
    scheduler = diffusers.DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=True)
    np.testing.assert_allclose(
        np.cumprod(1 - betas(config)), scheduler.alphas_cumprod.double().numpy(), rtol=0, atol=2e-6
    )
    assert betas(config)[-1] == 1 and Diffusion(config).alpha_bar[-1] == 0
    with pytest.raises(UsageError, match="leaves no signal in x_t at t = 999"):
        Diffusion(DiffusionConfig(schedule=schedule, zero_terminal_snr=True))  # type: ignore[arg-type]
