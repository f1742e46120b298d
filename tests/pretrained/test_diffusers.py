"""diffusers as the oracle: the same weights give the same outputs, gradients, samples and schedules."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.marks import slow
from helpers.networks import SMALL, random_model

import fastddpm
from fastddpm.config import DiffusionConfig, Preset, SampleConfig, UNetConfig
from fastddpm.errors import UsageError
from fastddpm.kernels.philox import STREAM_INITIAL, STREAM_REVERSE
from fastddpm.kernels.philox.eager import normals
from fastddpm.pretrained import diffusers as pipelines
from fastddpm.pretrained.diffusers_names import their_names
from fastddpm.pretrained.model import Model
from fastddpm.sampling.sampler import Sampler

LAYOUTS = {
    # The paper's two networks at reduced width and, for the second, size: the same levels, attention and depths.
    # 8 groups, or each would hold one channel at width 32, and the biases before it would have no effect at all.
    "cifar10": UNetConfig(width=32, groups=8),
    "256": UNetConfig(
        image_size=64, width=32, multipliers=(1, 1, 2, 2, 4, 4), attention_resolutions=(4,), dropout=0.0, groups=8
    ),
}


def diffusers_unet(path: Path) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DModel.from_pretrained(path / "unet").eval()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@dataclass(frozen=True)
class Compared:
    """A network of each side with the same weights, and what diffusers' makes of one batch in float64."""

    model: Model
    theirs: Any
    x: torch.Tensor  # (4, 3, H, W), an image for each of
    t: torch.Tensor
    weight: torch.Tensor  # of the outputs, in the sum whose gradients are taken
    out: torch.Tensor
    gradients: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[*(slow(name) if name == "256" else name for name in LAYOUTS), slow("full")])
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    model = random_model(LAYOUTS.get(request.param, UNetConfig()))
    path = tmp_path_factory.mktemp("compared") / "pipe"
    pipelines.save(model, path)
    theirs = diffusers_unet(path)
    if request.param == "full":
        assert sum(p.numel() for p in theirs.parameters()) == 35_746_307
    size, t = model.preset.unet.image_size, torch.tensor([0, 1, 500, 999])
    x = torch.randn(len(t), 3, size, size, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    exact = copy.deepcopy(theirs).double()
    out = exact(x.double(), t).sample
    gradients = gradients_of(exact, (out * weight).sum())
    return Compared(model, theirs, x, t, weight, out.detach(), gradients)


def gradients_of(network: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


Error = Callable[[torch.Tensor, torch.Tensor], float]


def assert_gradients_equal(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], names: dict[str, str], error: Error, bound: float
) -> None:
    for name, gradient in ours.items():
        # A key's bias moves every score of a row alike: its exact gradient is 0, what is left is rounding.
        if name.endswith(".k.bias"):
            assert gradient.abs().max() < 1e-4 * ours[name[:-4] + "weight"].abs().max()
        else:
            assert error(gradient, theirs[names[name]]) < bound, name


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_outputs_and_gradients_equal_diffusers_in_float64(compared: Compared, backend: str) -> None:
    unet = compared.model.unet
    with fastddpm.ops.use_backend(backend):
        out = unet(compared.x, compared.t)
        ours = gradients_of(unet, (out * compared.weight).sum())
    for image, expected in zip(out, compared.out, strict=True):
        assert relative(image, expected) < 1e-5
    # Sums of many terms that cancel: PyTorch's own float32 comes to 1e-5 on the full network.
    names = their_names(unet.config)
    assert_gradients_equal(ours, compared.gradients, names, lambda a, b: ((a - b).norm() / b.norm()).item(), 2e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_outputs_for_one_image_equal_diffusers(compared: Compared, backend: str) -> None:
    """Which kernel runs depends on the number of images, too."""
    with torch.no_grad(), fastddpm.ops.use_backend(backend):
        for i, expected in enumerate(compared.out):
            assert relative(compared.model.unet(compared.x[i : i + 1], compared.t[i : i + 1])[0], expected) < 1e-5


# Not the full network: there two orders of summation in float32 differ by 1.5e-5.
@pytest.mark.parametrize("compared", ["cifar10", slow("256")], indirect=True)
def test_gradients_of_plain_pytorch_equal_diffusers_in_float32(compared: Compared) -> None:
    unet, theirs = compared.model.unet, compared.theirs
    with fastddpm.ops.use_backend("reference"):
        ours = gradients_of(unet, (unet(compared.x, compared.t) * compared.weight).sum())
    expected = gradients_of(theirs, (theirs(compared.x, compared.t).sample * compared.weight).sum())
    assert_gradients_equal(ours, expected, their_names(unet.config), relative, 1e-5)


def test_classes_equal_diffusers(tmp_path: Path) -> None:
    config = UNetConfig(image_size=8, width=32, multipliers=(1, 1), blocks=1, num_classes=3, label_dropout=0.1)
    model = random_model(config)
    pipelines.save(model, tmp_path / "pipe")
    theirs = diffusers_unet(tmp_path / "pipe")
    x, t, label = torch.randn(4, 3, 8, 8), torch.tensor([0, 5, 9, 999]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        assert relative(model.unet(x, t, label), theirs(x, t, class_labels=label).sample) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variance", "prediction", "backend", "bound"),
    [
        ("fixedsmall", "eps", "auto", 1e-4),
        slow("fixedsmall", "v", "auto", 1e-4),
        # Predicted x_0 enters undivided, and little noise is drawn over it: what a step adds is carried through all
        # others. The compiled kernels come to 1.1e-4 with AVX-512, 8e-5 with AVX2, plain PyTorch to 4e-5.
        slow("fixedsmall", "x0", "auto", 2e-4),
        slow("fixedsmall", "x0", "reference", 1e-4),
        slow("fixedlarge", "eps", "auto", 1e-4),
        slow("fixedlarge", "v", "auto", 1e-4),
        slow("fixedlarge", "x0", "auto", 1e-4),
    ],
)
def test_fifty_ancestral_steps_equal_ddpm_scheduler(
    variance: str, prediction: str, backend: str, bound: float, tmp_path: Path
) -> None:
    model = random_model(SMALL, DiffusionConfig(variance=variance, prediction=prediction))  # type: ignore[arg-type]
    pipelines.save(model, tmp_path)
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    in_float64(scheduler)
    scheduler.set_timesteps(50)

    def step(out: torch.Tensor, t: int, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean = _without_noise(scheduler, out, t, x)
        if t == 0:
            return mean
        # The scheduler's own deviation at t, taken from its step on a known draw.
        return mean + _deviation(scheduler, t) * noise

    sampler = Sampler(model.unet, model.diffusion, timesteps=scheduler.timesteps.tolist())
    with fastddpm.ops.use_backend(backend):
        _compare_chains(sampler, step, bound)


def in_float64(scheduler: Any) -> None:
    """diffusers accumulates alpha_bar in float32, which moves the x_0 prediction at large t."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)


def _without_noise(scheduler: Any, out: torch.Tensor, t: int, x: torch.Tensor) -> torch.Tensor:
    """diffusers' step with its random draw replaced by zero."""
    import diffusers.schedulers.scheduling_ddpm as module

    original, module.randn_tensor = module.randn_tensor, lambda shape, **_: torch.zeros(shape)
    try:
        return scheduler.step(out, t, x).prev_sample
    finally:
        module.randn_tensor = original


def _deviation(scheduler: Any, t: int) -> float:
    return float(scheduler._get_variance(t) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, slow(1.0)])
def test_fifty_ddim_steps_equal_ddim_scheduler(eta: float, tmp_path: Path) -> None:
    model = random_model(SMALL)
    pipelines.save(model, tmp_path)
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler", set_alpha_to_one=True)
    in_float64(scheduler)
    scheduler.set_timesteps(50)

    def step(out: torch.Tensor, t: int, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        options = {"eta": eta, "use_clipped_model_output": True}
        return scheduler.step(out, t, x, variance_noise=noise if eta else None, **options).prev_sample

    # At eta 1 their last step adds noise of a deviation that is exactly 0 there, as is ours.
    sampler = Sampler(model.unet, model.diffusion, method="ddim", eta=eta, timesteps=scheduler.timesteps.tolist())
    _compare_chains(sampler, step, 1e-4)


def _compare_chains(
    sampler: Sampler, their_step: Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], torch.Tensor], bound: float
) -> None:
    """Both chains from the same x_T on the same noise: every step from the same state, then the two whole chains."""
    images, seed = torch.arange(3), torch.tensor(0)
    num = 3 * 8 * 8
    x = normals(num, images, seed, torch.tensor(0), STREAM_INITIAL).reshape(3, 3, 8, 8)
    states = [x.clone()]
    ours = sampler.sample(range(3), callback=lambda i, t, x_t, x0: states.append(x_t.clone()))
    assert len(states) == 51
    unet = copy.deepcopy(sampler.network).double()

    def theirs(x: torch.Tensor, t: int) -> torch.Tensor:
        noise = normals(num, images, seed, torch.tensor(t), STREAM_REVERSE).reshape(x.shape).double()
        with torch.no_grad(), fastddpm.ops.use_backend("reference"):
            return their_step(unet(x, torch.full((3,), t)), t, x, noise)

    x = x.double()
    steps, chain = [], []
    for before, after, t in zip(states[:-1], states[1:], sampler.timesteps.tolist(), strict=True):
        x = theirs(x, t)
        steps.append((after - theirs(before.double(), t)).abs().max().item())
        chain.append((after - x).abs().max().item())
    assert max(steps) < 1e-5
    assert max(chain) < bound
    assert (ours - x.clamp(-1, 1)).abs().max() < bound


def test_round_trip_through_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = random_model(SMALL, DiffusionConfig(schedule="cosine", variance="fixedsmall"))
    pipelines.save(model, tmp_path / "ours")
    diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded = pipelines.load(tmp_path / "theirs")
    assert loaded.preset.unet == SMALL
    assert loaded.diffusion.config.schedule == "cosine" and loaded.diffusion.config.variance == "fixedsmall"
    assert_same_weights(model, loaded)


def assert_same_weights(a: Model, b: Model) -> None:
    weights = b.unet.state_dict()
    assert weights.keys() == a.unet.state_dict().keys()
    for name, tensor in a.unet.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_our_own_round_trip_is_exact(tmp_path: Path) -> None:
    config = UNetConfig(
        image_size=8, width=8, multipliers=(1, 2), groups=4, num_classes=4, label_dropout=0.2, learned_variance=True
    )
    model = random_model(config, DiffusionConfig(variance="learned_range", loss="hybrid", timesteps=100))
    model = Model(model.unet, model.diffusion, Preset("mine", config, model.diffusion.config, sample=SampleConfig()))
    pipelines.save(model, tmp_path / "pipe")
    loaded = pipelines.load(tmp_path / "pipe")
    assert loaded.preset == model.preset
    assert_same_weights(model, loaded)


def test_root_layout_old_names_and_half_precision(tmp_path: Path) -> None:
    model = random_model(SMALL)
    pipelines.save(model, tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "new/unet/config.json").read_bytes())
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "variance_type": "fixed_large"}
    (old / "scheduler_config.json").write_text(json.dumps(scheduler))
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in safetensors.torch.load_file(tmp_path / "new/unet" / pipelines.WEIGHTS).items():
        for new, former in renames.items():
            name = name.replace(f".{new}.", f".{former}.")
        if "proj_attn.weight" in name:
            tensor = tensor[:, :, None, None]
        tensors[name] = tensor.to(torch.bfloat16).contiguous()
    safetensors.torch.save_file(tensors, old / pipelines.WEIGHTS)
    loaded = pipelines.load(old)
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], tensor.to(torch.bfloat16).float())


@pytest.mark.parametrize("schedule", ["linear", "quad", "cosine"])
def test_schedules_equal_diffusers(schedule: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = random_model(SMALL, DiffusionConfig(schedule=schedule))  # type: ignore[arg-type]
    pipelines.save(model, tmp_path / "pipe")
    betas = diffusers.DDPMScheduler.from_pretrained(tmp_path / "pipe" / "scheduler").betas.double().numpy()
    np.testing.assert_allclose(model.diffusion.betas, betas, rtol=2e-6)


def test_a_model_saves_and_reads_itself(tmp_path: Path) -> None:
    model = random_model(SMALL)
    model.save_pretrained(tmp_path / "pipe")
    loaded = Model.from_pretrained(tmp_path / "pipe")
    assert type(loaded) is Model and loaded.preset == model.preset
    assert all(torch.equal(tensor, loaded.unet.state_dict()[name]) for name, tensor in model.unet.state_dict().items())
    with pytest.raises(UsageError, match="exists and is not empty"):
        model.save_pretrained(tmp_path / "pipe")
    model.save_pretrained(tmp_path / "pipe", overwrite=True)
