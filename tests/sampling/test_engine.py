"""The prepared network: the same numbers as the network itself, whatever the batch and the threads; kept up to date."""

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers.engines import arguments, in_float64, network, relative_error
from helpers.marks import instruction_sets, on_instruction_set
from helpers.networks import TINY, batch, tiny

from fastddpm import ops
from fastddpm.config import DiffusionConfig, UNetConfig
from fastddpm.diffusion import Diffusion
from fastddpm.kernels import native
from fastddpm.sampling.engine import PreparedUNet, is_current, prepare
from fastddpm.sampling.sampler import Sampler

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

CONFIGS = {
    "tiny": TINY,
    "wide enough for Winograd": tiny(width=32, groups=8),
    "seams across groups and vectors": tiny(width=24, multipliers=(1, 3), groups=12),
    "three levels, blocks of two": UNetConfig(
        image_size=16, image_channels=3, width=32, multipliers=(1, 2, 2), blocks=2, attention_resolutions=(8,), groups=8
    ),
    "attention everywhere": UNetConfig(
        image_size=8, image_channels=1, width=32, multipliers=(1, 2), blocks=1, attention_resolutions=(8, 4), groups=8
    ),
    "one level": UNetConfig(
        image_size=6, image_channels=2, width=20, multipliers=(1,), blocks=1, attention_resolutions=(), groups=4
    ),
    "learned variance": tiny(learned_variance=True),
    "labels": tiny(num_classes=5, label_dropout=0.1),
}


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", CONFIGS)
def test_numbers(name: str, isa: str) -> None:
    with on_instruction_set(isa):
        unet = network(CONFIGS[name])
        inputs = arguments(3, CONFIGS[name])
        ours = PreparedUNet(unet)(*inputs)
        assert ours.dtype == torch.float32 and ours.shape[0] == 3
        assert relative_error(ours, in_float64(unet, *inputs)) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bits_whatever_the_batch_and_the_threads(name: str) -> None:
    unet = network(CONFIGS[name])
    x_t, t, label = arguments(5, CONFIGS[name])
    prepared = PreparedUNet(unet, [7, 307])  # the other timesteps of the batch are added when they are asked for
    together = prepared(x_t, t, label).clone()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(prepared(x_t, t, label), together)
        for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
            one_label = None if label is None else label[part]
            assert torch.equal(prepared(x_t[part], t[part], one_label), together[part])


def test_a_result_is_not_overwritten_by_the_next_call() -> None:
    unet = network(TINY)
    prepared = PreparedUNet(unet)
    x_t, t = batch(2)
    first = prepared(x_t, t)
    kept = first.clone()
    prepared(x_t + 1, t)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "float64"])
def test_any_input_layout(layout: str) -> None:
    unet = network(TINY)
    x_t, t = batch(2)
    expected = PreparedUNet(unet)(x_t, t)
    if layout == "sliced":
        laid_out = torch.cat([x_t, torch.full_like(x_t, torch.nan)], dim=3)[..., : x_t.shape[3]]
    else:
        laid_out = x_t.contiguous(memory_format=torch.channels_last)
        laid_out = laid_out.double() if layout == "float64" else laid_out
    assert torch.equal(PreparedUNet(unet)(laid_out, t), expected)


def test_it_is_made_again_when_the_network_has_changed() -> None:
    unet = network(TINY)
    sampler = Sampler(unet, Diffusion(DiffusionConfig()))
    x_t, t = batch(2)
    first = sampler.denoise(x_t, t)
    prepared = sampler._prepared
    assert torch.equal(sampler.denoise(x_t, t), first) and sampler._prepared is prepared
    for change in (lambda p: p.mul_(1.5), lambda p: p.copy_(torch.randn_like(p) / 10)):
        for parameter in (unet.conv_in.weight, unet.mid.block1.norm1.bias, unet.mid.block1.temb_proj.weight):
            with torch.no_grad():
                change(parameter)
            assert relative_error(sampler.denoise(x_t, t), in_float64(unet, x_t, t, None)) <= 1e-5
    unet.conv_out.weight = torch.nn.Parameter(torch.randn_like(unet.conv_out.weight))
    assert relative_error(sampler.denoise(x_t, t), in_float64(unet, x_t, t, None)) <= 1e-5


def test_other_backends_and_dtypes_run_the_network_itself() -> None:
    unet = network(TINY)
    prepared = prepare(unet, [0])
    assert isinstance(prepared, PreparedUNet) and is_current(prepared, unet)
    with ops.use_backend("reference"):
        assert prepare(unet, [0]) is unet
        assert not is_current(prepared, unet) and is_current(unet, unet)
    assert not is_current(unet, unet)
    assert prepare(copy.deepcopy(unet).double(), [0]) is not prepared
    assert not isinstance(prepare(copy.deepcopy(unet).bfloat16(), [0]), PreparedUNet)


def test_without_the_library_the_sampler_runs_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = network(TINY)
    x_t, t = batch(2)
    ops.status()  # an implementation keeps the function that it finds when it is imported, at its first use
    monkeypatch.setattr(native, "unavailable", lambda: "there is none")
    assert prepare(unet, [0]) is unet
    assert (
        relative_error(Sampler(unet, Diffusion(DiffusionConfig())).denoise(x_t, t), in_float64(unet, x_t, t, None))
        < 1e-5
    )


def test_denoise_is_in_evaluation_mode_and_leaves_the_mode() -> None:
    unet = network(tiny(dropout=0.5))
    unet.train()
    sampler = Sampler(unet, Diffusion(DiffusionConfig()))
    x_t, t = batch(2)
    out = sampler.denoise(x_t, t)
    assert unet.training and not out.requires_grad
    assert relative_error(out, in_float64(unet, x_t, t, None)) <= 1e-5


def test_denoise_takes_one_timestep_for_all() -> None:
    sampler = Sampler(network(TINY), Diffusion(DiffusionConfig()))
    x_t, _ = batch(3)
    assert torch.equal(sampler.denoise(x_t, 400), sampler.denoise(x_t, torch.full((3,), 400)))


def test_denoise_with_guidance() -> None:
    config = CONFIGS["labels"]
    unet = network(config)
    sampler = Sampler(unet, Diffusion(DiffusionConfig()), guidance=3.0)
    x_t, t, _ = arguments(2, config)
    label, none = torch.tensor([1, 4]), torch.tensor([5, 5])
    conditional, unconditional = (in_float64(unet, x_t, t, value) for value in (label, none))
    expected = unconditional + 3.0 * (conditional - unconditional)
    assert relative_error(sampler.denoise(x_t, t, label), expected) <= 2e-5
    with pytest.raises(ValueError, match="guidance needs a label"):
        sampler.denoise(x_t, t)


def test_wrong_arguments_are_refused_as_by_the_network() -> None:
    unet = network(TINY)
    sampler = Sampler(unet, Diffusion(DiffusionConfig()))
    x_t, t = batch(2)
    for wrong in ((x_t[:, :2], t), (x_t[..., :6], t), (x_t, t[:1])):
        with pytest.raises(ValueError) as ours:
            sampler.denoise(*wrong)
        with pytest.raises(ValueError) as theirs:
            unet(*wrong)
        assert str(ours.value) == str(theirs.value)
