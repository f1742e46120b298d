"""The network in fewer kernels: every switch of the engine gives the network's numbers."""

import copy
import dataclasses
import functools

import pytest
import torch
from helpers.engines import arguments, in_float64, network, relative_error
from helpers.marks import slow
from helpers.networks import TINY, shaken, tiny
from torch import Tensor

from fastddpm import ops
from fastddpm.config import EngineConfig, UNetConfig
from fastddpm.errors import UsageError
from fastddpm.sampling import engine
from fastddpm.sampling.engine import FusedUNet, PreparedUNet, is_current, prepare
from fastddpm.unet import UNet

SWITCHES = ("channels_last", "time_table", "fused_qkv", "phase_convolutions", "accumulate", "one_product",
            "carried_biases", "fused_residuals", "folded_attention", "mirrored", "unpadded", "direct_input",
            "padded_channels")  # fmt: skip
OFF = dict.fromkeys((*SWITCHES, "transposed_convolutions"), False)
PLAIN = EngineConfig(native=False, **OFF)
CONFIGS = {
    "tiny": TINY,
    "three levels": UNetConfig(
        image_size=16, image_channels=3, width=32, multipliers=(1, 2, 2), blocks=2, attention_resolutions=(8,), groups=8
    ),
    "learned variance": tiny(learned_variance=True),
    "labels": tiny(num_classes=5, label_dropout=0.1),
}
ENGINES = {
    "plain": PLAIN,
    **{name: dataclasses.replace(PLAIN, **{name: True}) for name in SWITCHES},
    "one_product": dataclasses.replace(PLAIN, one_product=True, channels_last=True),
    "transposed_convolutions": dataclasses.replace(PLAIN, phase_convolutions=True, transposed_convolutions=True),
    "direct_input": dataclasses.replace(PLAIN, direct_input=True, channels_last=True, carried_biases=True),
    "biases and residuals": dataclasses.replace(PLAIN, carried_biases=True, fused_residuals=True),
    "unmirrored": EngineConfig(native=False, mirrored=False, transposed_convolutions=False),
    "chunk": dataclasses.replace(PLAIN, chunk=2),
    "all": EngineConfig(native=False),
    "all, in chunks": EngineConfig(native=False, chunk=2),
}


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        pytest.param(name, engine, marks=[] if engine == "all" or name == "tiny" else pytest.mark.slow)
        for name in CONFIGS
        for engine in ENGINES
    ],
)
def test_numbers(name: str, engine: str) -> None:
    """Of float64 within float32 rounding, for a t of each image and for one t of all."""
    unet = network(CONFIGS[name])
    x_t, t, label = arguments(3, CONFIGS[name])
    ours = FusedUNet(unet, 1000, ENGINES[engine], torch.float32)
    for timesteps in (t, t[1].expand(3)):
        found = ours(x_t, timesteps, label)
        assert found.dtype == torch.float32
        assert relative_error(found, in_float64(unet, x_t, timesteps, label)) <= 2e-6


@pytest.mark.parametrize("engine", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_in_low_precision(dtype: torch.dtype, engine: str) -> None:
    """As far from float64 as the network cast by hand is, or nearer."""
    unet = network(TINY)
    x_t, t, _ = arguments(3, TINY)
    expected = in_float64(unet, x_t, t, None)
    by_hand = copy.deepcopy(unet).to(dtype)
    with torch.no_grad():
        error = relative_error(by_hand(x_t.to(dtype), t), expected)
    ours = FusedUNet(unet, 1000, ENGINES[engine], dtype)(x_t, t)
    assert ours.dtype == dtype and relative_error(ours, expected) <= 1.2 * error
    assert next(unet.parameters()).dtype == torch.float32


def test_float64_stays_float64() -> None:
    unet = network(TINY).double()
    x_t, t, _ = arguments(2, TINY)
    ours = prepare(unet, range(1000), EngineConfig(native=False))(x_t.double(), t, None)
    assert ours.dtype == torch.float64 and relative_error(ours, in_float64(unet, x_t, t, None)) < 1e-14


def test_phases_are_the_doubled_convolution() -> None:
    """Odd sizes, in float64: the sums are exact but for their order."""
    from fastddpm.sampling.engine.fused_layers import Cast, PhaseUpsample, TransposedUpsample
    from fastddpm.unet import Up

    layer, x = Up(6).double(), torch.randn(2, 6, 5, 7, dtype=torch.float64)
    shaken(layer)
    for layout in (torch.channels_last, torch.contiguous_format):
        for kind in (PhaseUpsample, TransposedUpsample):
            ours = kind(layer.conv, layer.conv.bias, Cast(torch.float64, layout))(x)
            with ops.use_backend("reference"):
                torch.testing.assert_close(ours, layer(x), rtol=0, atol=1e-14)


def test_fewer_operations() -> None:
    """What the switches are for: operations of one evaluation with a t of all images."""
    unet, (x_t, t, _) = network(CONFIGS["three levels"]), arguments(2, CONFIGS["three levels"])
    counts = {name: count(FusedUNet(unet, 1000, engine, torch.float32), x_t, t[0].expand(2)) for name, engine in
              ENGINES.items()}  # fmt: skip
    assert counts["time_table"] < counts["plain"] - 5  # the embedding's sines, two layers, the projections
    assert counts["fused_qkv"] <= counts["plain"] - 2 * 5  # five attention blocks
    assert counts["all"] < 0.8 * counts["plain"]


def count(network: FusedUNet, *inputs: Tensor) -> int:
    """Operations that compute: views are free."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            views = ("view", "expand", "permute", "slice", "split", "transpose", "t.", "reshape", "select.", "detach")
            Count.number += not func.__name__.startswith(views) and "alias" not in func.__name__
            return func(*args, **(kwargs or {}))

    with Count():
        network(*inputs)
    return Count.number


COMPILED = EngineConfig(native=False, compile=True)


@pytest.mark.parametrize("name", [slow("tiny"), "labels"])
def test_the_network_compiles_without_a_break(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend="eager"))
    unet, inputs = network(CONFIGS[name]), arguments(2, CONFIGS[name])
    ours = FusedUNet(unet, 1000, COMPILED, torch.float32)(*inputs)
    assert torch.equal(ours, FusedUNet(unet, 1000, ENGINES["all"], torch.float32)(*inputs))


@pytest.mark.slow
def test_more_sizes_of_batches_than_torch_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond its limit are computed all the same."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    unet = network(TINY)
    ours, plain = (FusedUNet(unet, 1000, engine, torch.float32) for engine in (COMPILED, ENGINES["all"]))
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in (1, 2, 3, 4, 3, 1):
            x_t, t, _ = arguments(n, TINY)
            assert torch.equal(ours(x_t, t), plain(x_t, t))


def test_it_is_made_again_when_the_network_has_changed() -> None:
    unet, engine = network(TINY), EngineConfig(native=False)
    first = prepare(unet, range(1000), engine)
    assert isinstance(first, FusedUNet) and is_current(first, unet, engine)
    with torch.no_grad():
        unet.conv_in.weight.mul_(2)
    assert first.stale() and not is_current(first, unet, engine)


def test_the_library_is_taken_on_a_cpu_for_float32_weights_alone() -> None:
    unet = network(TINY)
    assert isinstance(prepare(unet, [1]), PreparedUNet | UNet)
    assert isinstance(prepare(unet, [1], EngineConfig(precision="fp16")), FusedUNet)
    assert isinstance(prepare(unet, [1], EngineConfig(precision="bf16", native=False)), FusedUNet)
    assert isinstance(prepare(unet, [1], EngineConfig(native=False)), FusedUNet)
    assert isinstance(prepare(unet.double(), [1], EngineConfig(precision="fp32")), FusedUNet)


def test_a_timestep_outside_the_table_is_refused() -> None:
    ours = FusedUNet(network(TINY), 10, EngineConfig(), torch.float32)
    x_t, _, _ = arguments(2, TINY)
    with pytest.raises(IndexError):
        ours(x_t, torch.tensor([3, 10]))


def test_wrong_arguments_are_refused_as_by_the_network() -> None:
    ours = FusedUNet(network(TINY), 10, EngineConfig(), torch.float32)
    with pytest.raises(ValueError, match=r"UNet: x_t must be \(N, 3, 12, 12\)"):
        ours(torch.zeros(2, 3, 12, 11), torch.zeros(2, dtype=torch.int64))


# 8-bit convolutions


def test_8_bit_convolutions_are_near() -> None:
    """Rounded to three bits behind the leading one; what no kernel of ours computes stays as it was."""
    unet = network(CONFIGS["three levels"])
    x_t, t, label = arguments(3, CONFIGS["three levels"])
    expected = in_float64(unet, x_t, t, label)
    ours = FusedUNet(unet, 1000, EngineConfig(fp8=True), torch.float32)(x_t, t, label)
    assert 1e-3 < relative_error(ours, expected) < 0.1


def test_8_bit_convolutions_are_refused_without_a_gpu_that_has_them() -> None:
    with pytest.raises(UsageError, match=r"8-bit convolutions \(fp8\) need a GPU that has them, sm_89 or later"):
        prepare(network(TINY), range(1000), EngineConfig(fp8=True))


def test_what_8_bit_convolutions_change_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that has them: the stated errors are those of the outputs."""
    monkeypatch.setattr(engine, "_check_fp8", lambda device: None)
    unet = network(TINY)
    with pytest.warns(UserWarning, match=r"8-bit convolutions change the network's output") as caught:
        ours = prepare(unet, range(1000), EngineConfig(fp8=True))
    x_t = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for t in (99, 499, 999):
        timesteps = torch.full((4,), t)
        error = relative_error(ours(x_t, timesteps, None), in_float64(unet, x_t, timesteps, None))
        assert f"{error:.1%} at t = {t}" in str(caught[0].message)


@pytest.mark.gpu
def test_8_bit_convolutions_on_a_gpu() -> None:
    unet = network(CONFIGS["three levels"]).cuda()
    with pytest.warns(UserWarning, match="8-bit convolutions change"):
        prepare(unet, range(1000), EngineConfig(fp8=True))
