"""Both engines compute the networks with the options of other implementations, without leaving the fast path."""

import copy
import functools
import warnings

import pytest
import torch
from helpers.architectures import ALL, EVERYTHING, TOGETHER
from helpers.engines import arguments, expected_of, network, relative_error
from helpers.marks import instruction_sets, on_instruction_set, slow

from fastddpm.config import EngineConfig, UNetConfig
from fastddpm.kernels import native
from fastddpm.sampling.engine import FusedUNet, PreparedUNet, prepare

FUSED = EngineConfig(native=False)
PLAIN = EngineConfig(
    native=False, channels_last=False, time_table=False, fused_qkv=False, phase_convolutions=False, accumulate=False
)
needs_library = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@needs_library
@pytest.mark.parametrize("name", ALL)
def test_the_compiled_library_computes_every_option(name: str) -> None:
    unet = network(ALL[name])
    inputs = arguments(3, ALL[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a network that is run as it is would be said
        ours = prepare(unet, [7, 307])
    assert isinstance(ours, PreparedUNet)
    assert relative_error(ours(*inputs), expected_of(unet, *inputs)) <= 1e-5


@needs_library
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("name", ["guided", "everything"])
def test_on_every_instruction_set(name: str, isa: str) -> None:
    with on_instruction_set(isa):
        unet, inputs = network(ALL[name]), arguments(2, ALL[name])
        assert relative_error(PreparedUNet(unet)(*inputs), expected_of(unet, *inputs)) <= 1e-5


@needs_library
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOGETHER)
def test_the_same_bits_whatever_the_batch_and_the_threads(name: str, precision: torch.dtype) -> None:
    unet, before = network(ALL[name]), torch.get_num_threads()
    x_t, t, label = arguments(4, ALL[name])
    prepared = PreparedUNet(unet, [7], precision)
    together = prepared(x_t, t, label).clone()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for part in (slice(0, 1), slice(1, 4)):
                assert torch.equal(prepared(x_t[part], t[part], None if label is None else label[part]), together[part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ALL)
def test_fewer_torch_operations_compute_every_option(name: str) -> None:
    """For a t of each image and one t of all, with every switch of the engine on and off."""
    unet = network(ALL[name])
    x_t, t, label = arguments(3, ALL[name])
    for engine in (FUSED, PLAIN):
        ours = prepare(unet, range(1000), engine)
        assert isinstance(ours, FusedUNet)
        for timesteps in (t, t[1].expand(3)):
            error = relative_error(ours(x_t, timesteps, label), expected_of(unet, x_t, timesteps, label))
            assert error <= 2e-6


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
def test_in_low_precision(name: str, dtype: torch.dtype) -> None:
    """As far from float64 as the network cast by hand is, or nearer."""
    unet = network(ALL[name])
    x_t, t, label = arguments(2, ALL[name])
    expected = expected_of(unet, x_t, t, label)
    with torch.no_grad():
        by_hand = relative_error(copy.deepcopy(unet).to(dtype)(x_t.to(dtype), t, label), expected)
    ours = FusedUNet(unet, 1000, FUSED, dtype)(x_t, t, label)
    assert ours.dtype == dtype and relative_error(ours, expected) <= 1.2 * by_hand


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guided", "everything"])
def test_compiles_without_a_break(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend="eager"))
    unet, inputs = network(ALL[name]), arguments(2, ALL[name])
    compiled = FusedUNet(unet, 1000, EngineConfig(native=False, compile=True), torch.float32)
    assert torch.equal(compiled(*inputs), FusedUNet(unet, 1000, FUSED, torch.float32)(*inputs))


def test_8_bit_convolutions_of_resampling_blocks() -> None:
    """Near, but not equal: every convolution of a residual block is rounded, also those that resample."""
    unet, inputs = network(EVERYTHING), arguments(2, EVERYTHING)
    ours = FusedUNet(unet, 1000, EngineConfig(fp8=True), torch.float32)(*inputs)
    assert 1e-3 < relative_error(ours, expected_of(unet, *inputs)) < 0.15


@needs_library
def test_many_heads_and_odd_sizes() -> None:
    """Heads of one channel, and channels that fill no vector, at every level."""
    config = UNetConfig(
        image_size=(4, 6), image_channels=1, width=6, channels=(6, 10), blocks=1, attention_resolutions=(4, 2),
        groups=2, head_channels=1, resample="resblock", scale_shift=True, dropout=0.0,
    )  # fmt: skip
    unet, inputs = network(config), arguments(3, config)
    for ours in (PreparedUNet(unet), FusedUNet(unet, 1000, FUSED, torch.float32)):
        assert relative_error(ours(*inputs), expected_of(unet, *inputs)) <= 1e-5
