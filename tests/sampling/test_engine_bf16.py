"""The compiled library's network with factors in bfloat16."""

import copy
import warnings

import pytest
import torch
from helpers.architectures import ALL
from helpers.engines import arguments, expected_of, network, relative_error
from helpers.marks import instruction_sets, on_instruction_set

import fastddpm
from fastddpm.config import EngineConfig
from fastddpm.kernels import native
from fastddpm.sampling.engine import PreparedUNet, is_current, precision_of, prepare

BF16 = EngineConfig(precision="bf16")
pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@pytest.mark.parametrize("name", ALL)
def test_numbers_of_every_option(name: str) -> None:
    """As near to float64 as the network cast by hand is, or nearer."""
    unet, inputs = network(ALL[name]), arguments(3, ALL[name])
    expected = expected_of(unet, *inputs)
    x_t, t, label = inputs
    with torch.no_grad():
        by_hand = copy.deepcopy(unet).bfloat16()(x_t.bfloat16(), t, label)
    ours = PreparedUNet(unet, [7, 307], torch.bfloat16)(*inputs)
    assert ours.dtype == torch.float32
    assert 1e-5 < relative_error(ours, expected) <= 1.1 * relative_error(by_hand, expected)


@pytest.mark.parametrize("isa", instruction_sets())
def test_on_every_instruction_set(isa: str) -> None:
    with on_instruction_set(isa):
        unet, inputs = network(ALL["everything"]), arguments(2, ALL["everything"])
        ours = PreparedUNet(unet, precision=torch.bfloat16)(*inputs)
        assert relative_error(ours, expected_of(unet, *inputs)) <= 2e-2


@pytest.mark.usefixtures("bf16_instructions")
def test_a_processor_with_the_instructions_computes_in_bf16() -> None:
    unet = network(ALL["guided"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare(unet, [1], BF16)
    assert isinstance(prepared, PreparedUNet) and prepared.precision == torch.bfloat16
    assert precision_of(unet, BF16) == torch.bfloat16 and precision_of(unet, EngineConfig()) == torch.float32
    assert is_current(prepared, unet, BF16) and not is_current(prepared, unet, EngineConfig())


def test_a_processor_without_computes_in_float32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_bf16", lambda: False)
    unet, inputs = network(ALL["guided"]), arguments(2, ALL["guided"])
    with pytest.warns(UserWarning, match=r"no bf16 instructions \(AVX512-BF16\), so the network is computed in fp32"):
        prepared = prepare(unet, [1], BF16)
    assert isinstance(prepared, PreparedUNet) and prepared.precision == torch.float32
    assert precision_of(unet, BF16) == torch.float32 and is_current(prepared, unet, BF16)
    assert torch.equal(prepared(*inputs), prepare(unet, [1])(*inputs))


@pytest.mark.usefixtures("bf16_instructions")
def test_a_denoiser_and_a_sampler_take_it() -> None:
    unet, inputs = network(ALL["guided"]), arguments(2, ALL["guided"])
    ours = fastddpm.Denoiser(unet, BF16)(*inputs)
    assert torch.equal(ours, PreparedUNet(unet, precision=torch.bfloat16)(*inputs))
    sampler = fastddpm.Sampler(unet, fastddpm.Diffusion(), steps=3, engine=BF16)
    assert sampler.settings()["precision"] == "bfloat16"
