"""fastddpm.accelerate: diffusers' networks compute the same with our operations, and are restored."""

import copy
from typing import Any

import pytest
import torch
from helpers.marks import slow
from torch import Tensor, nn

import fastddpm
from fastddpm.errors import UsageError
from fastddpm.kernels import native
from fastddpm.ops.accelerate import forwards
from fastddpm.ops.norm_conv import norm_conv

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SMALL: dict[str, Any] = dict(sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4)
UNCONDITIONAL: dict[str, Any] = SMALL | dict(
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
)  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "UNet2DModel": UNCONDITIONAL,
    "scale-shift, heads, resampling blocks": UNCONDITIONAL | dict(
        resnet_time_scale_shift="scale_shift", attention_head_dim=8, downsample_type="resnet", upsample_type="resnet",
        downsample_padding=0,
    ),
    "padding 0, dropout": UNCONDITIONAL | dict(downsample_padding=0, dropout=0.3),
    "UNet2DConditionModel": SMALL | dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4,
    ),
}  # fmt: skip


def network(name: str) -> Any:
    torch.manual_seed(0)
    kind = diffusers.UNet2DConditionModel if "Condition" in name else diffusers.UNet2DModel
    unet = kind(**NETWORKS[name]).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def inputs(unet: Any, n: int = 2, size: tuple[int, int] = (16, 16)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, unet.config.in_channels, *size, generator=generator)
    context = torch.randn(n, 5, 12, generator=generator)
    return (x, torch.tensor(500), context) if "Condition" in type(unet).__name__ else (x, torch.tensor(500))


def output(unet: Any, arguments: tuple[Tensor, ...]) -> Tensor:
    sample: Tensor = unet(*arguments).sample
    return sample


def exact(unet: Any, arguments: tuple[Tensor, ...]) -> Tensor:
    """In float64, by diffusers alone."""
    doubled = [value.double() if value.is_floating_point() else value for value in arguments]
    return output(copy.deepcopy(unet).double(), tuple(doubled))


def relative(ours: Tensor, right: Tensor) -> float:
    return float((ours.double() - right).norm() / right.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_diffusers_in_float64(name: str) -> None:
    unet = network(name)
    arguments = inputs(unet)
    names, parameters = zip(*unet.named_parameters(), strict=True)
    doubled = copy.deepcopy(unet).double()
    right = output(doubled, tuple(a.double() if a.is_floating_point() else a for a in arguments))
    weight = torch.randn(right.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((right * weight).sum(), list(doubled.parameters()))
    report = fastddpm.accelerate(unet)
    assert "ResnetBlock2D" in report.replaced
    with torch.no_grad():
        assert relative(output(unet, arguments), right) < 1e-5
    ours = output(unet, arguments)
    assert relative(ours.detach(), right) < 1e-5
    found = torch.autograd.grad((ours * weight.float()).sum(), parameters)
    for parameter, mine, expected in zip(names, found, gradients, strict=True):
        if not parameter.endswith("to_k.bias"):  # exactly 0, as it moves every score of a row alike
            assert relative(mine, expected) < 1e-4, parameter


def test_sizes_that_do_not_halve() -> None:
    unet = network("UNet2DConditionModel")
    arguments = inputs(unet, 1, (18, 14))
    with torch.no_grad():
        right = exact(unet, arguments)
        fastddpm.accelerate(unet)
        assert relative(output(unet, arguments), right) < 1e-5


def test_restored_it_is_what_it_was() -> None:
    unet = network("UNet2DModel")
    arguments = inputs(unet)
    before = {name: dict(vars(module)) for name, module in unet.named_modules()}
    tensors = {name: (t, t.data_ptr(), t.stride(), t.clone()) for name, t in unet.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        expected = output(unet, arguments)
        report = fastddpm.accelerate(unet)
        assert not torch.equal(output(unet, arguments), expected)
        assert unet.state_dict().keys() == tensors.keys()
        assert fastddpm.restore(unet) == sum(map(len, report.replaced.values())) + 1  # the last activation, too
        assert torch.equal(output(unet, arguments), expected)
    assert fastddpm.restore(unet) == 0
    for name, module in unet.named_modules():
        assert vars(module).keys() == before[name].keys(), name
    for name, tensor in unet.state_dict(keep_vars=True).items():
        same, place, stride, value = tensors[name]
        assert tensor is same and tensor.data_ptr() == place and tensor.stride() == stride
        assert torch.equal(tensor, value)


def test_the_report_says_what_was_replaced_and_what_not() -> None:
    unet = network("UNet2DConditionModel")
    unet.conv_in.forward = unet.conv_in.forward
    report = fastddpm.accelerate(unet)
    assert len(report.replaced["ResnetBlock2D"]) == 8
    assert report.replaced["GroupNorm with the SiLU after it"] == ("conv_norm_out",)
    left = {reason: names for reason, names in report.left.items() if "other tokens" in reason}
    assert left and all("attentions" in name for names in left.values() for name in names)
    assert report.left["its forward was replaced by torch.nn.modules.conv"] == ("conv_in",)
    assert "8 x ResnetBlock2D" in str(report) and "left 1: its forward was replaced" in str(report)


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("slow_mkl", [True, False])
@pytest.mark.parametrize("name", ["scale-shift, heads, resampling blocks", "UNet2DConditionModel"])
def test_linear_layers_and_heads_are_ours_where_mkl_is_slow(
    name: str, slow_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "outpaces_mkl", lambda: slow_mkl)
    for limit in ("_FEWEST_ROWS", "_FEWEST_PRODUCTS"):
        monkeypatch.setattr(forwards, limit, 1)
    unet = network(name)
    arguments, projections = inputs(unet), []
    right = exact(unet, arguments)
    report = fastddpm.accelerate(unet)
    linears = {layer for layer, module in unet.named_modules() if type(module) is nn.Linear}
    assert set(report.replaced.get("linear layer", ())) == (linears if slow_mkl else set())
    assert ("attention of several heads" in report.replaced) == slow_mkl
    assert set(report.left.get("linear layers: PyTorch's is as fast", ())) == (set() if slow_mkl else linears)
    first = next(module for layer, module in unet.named_modules() if layer.endswith("to_q"))
    first.register_forward_hook(lambda module, args, out: projections.append(out.shape))
    with torch.no_grad():
        assert relative(output(unet, arguments), right) < 1e-5
    assert len(projections) == 1
    sample = output(unet, arguments)  # with gradients the layers are PyTorch's
    assert relative(sample.detach(), right) < 1e-5 and sample.requires_grad


class Halved(Tensor):
    """A weight with a rule of its own for linear layers, and none for anything else, as quantised ones have."""

    @staticmethod
    def __new__(cls, value: Tensor) -> "Halved":
        return Tensor._make_subclass(cls, value)

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            x, weight, bias = args
            return nn.functional.linear(x, weight.as_subclass(Tensor) / 2, bias)
        return super().__torch_function__(function, kinds, args, kwargs or {})


def test_weights_with_rules_of_their_own_are_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "_FEWEST_PRODUCTS", 1)
    layer, x = nn.Linear(16, 8), torch.randn(80, 16)
    layer.weight = nn.Parameter(Halved(layer.weight.detach()), requires_grad=False)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(forwards.linear_forward(layer, x), expected)


def test_tangents_pass_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward mode is not switched off by no_grad."""
    monkeypatch.setattr(forwards, "_FEWEST_PRODUCTS", 1)
    linear, conv = nn.Linear(16, 8), nn.Conv2d(16, 8, 3, padding=1)
    for layer, forward, x in (
        (linear, forwards.linear_forward, torch.randn(80, 16)), (conv, forwards.conv_forward, torch.randn(1, 16, 8, 8))
    ):  # fmt: skip
        with torch.no_grad():
            _, expected = torch.func.jvp(layer, (x,), (x,))
            _, found = torch.func.jvp(lambda x, f=forward, layer=layer: f(layer, x), (x,), (x,))
        assert relative(found, expected.double()) < 1e-5


def test_the_processor_s_vendor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for isa, vendor, answer in (
        ("avx512", "AuthenticAMD", True), ("avx512bf16", "GenuineIntel", False), ("avx2", "AuthenticAMD", False),
        ("avx512", "", False),
    ):  # fmt: skip
        monkeypatch.setattr(native, "isa", lambda isa=isa: isa)
        monkeypatch.setattr(native, "_vendor", lambda vendor=vendor: vendor)
        assert native.outpaces_mkl() == answer


def test_hooks_are_called_with_what_they_get_from_diffusers() -> None:
    unet = network("UNet2DModel")
    arguments, plain = inputs(unet), copy.deepcopy(unet)
    names = ["conv_in", "conv_act", "mid_block.resnets.0.norm2", "mid_block.resnets.1.conv1", "mid_block.resnets.1",
             "up_blocks.0.upsamplers.0", "mid_block.attentions.0.to_q",
             "down_blocks.1.attentions.0.group_norm"]  # fmt: skip
    fastddpm.accelerate(unet)
    seen: list[list[Tensor]] = [[], []]
    for network_, values in zip((plain, unet), seen, strict=True):
        for name in names:
            network_.get_submodule(name).register_forward_hook(lambda m, a, out, values=values: values.append(out))
        with torch.no_grad():
            output(network_, arguments)
    assert len(seen[0]) == len(seen[1]) == len(names)
    for theirs, ours in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_hooks_of_every_module_are_called() -> None:
    unet = network("UNet2DModel")
    arguments, calls = inputs(unet), []
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: calls.append(type(m).__name__))
        output(unet, arguments)
        theirs = calls.copy()
        calls.clear()
        fastddpm.accelerate(unet)
        output(unet, arguments)
        handle.remove()
    assert calls.count("GroupNorm") == theirs.count("GroupNorm") and calls.count("Conv2d") == theirs.count("Conv2d")


class Adapter(nn.Module):
    """What LoRA makes of a layer: the layer itself, and a low-rank term beside it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        convolves = isinstance(base, nn.Conv2d)
        self.down = nn.Conv2d(base.in_channels, 2, 3, padding=1) if convolves else nn.Linear(base.in_features, 2)
        self.up = nn.Conv2d(2, base.out_channels, 1) if convolves else nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("first", ["adapted", "accelerated"])
def test_adapters_in_place_of_layers_are_kept_and_trained(first: str) -> None:
    unet = network("UNet2DModel")
    arguments = inputs(unet)
    if first == "accelerated":
        fastddpm.accelerate(unet)
    block, attention = unet.mid_block.resnets[0], unet.mid_block.attentions[0]
    torch.manual_seed(3)
    block.conv1, block.time_emb_proj, attention.to_q = map(Adapter, (block.conv1, block.time_emb_proj, attention.to_q))
    plain = copy.deepcopy(unet)
    fastddpm.restore(plain)
    right = exact(plain, arguments)
    if first == "adapted":
        fastddpm.accelerate(unet)
    with torch.no_grad():
        assert relative(output(unet, arguments), right.detach()) < 1e-5
    output(unet, arguments).square().sum().backward()
    output(plain, arguments).square().sum().backward()
    for ours, theirs in zip(
        block.conv1.down.parameters(), plain.mid_block.resnets[0].conv1.down.parameters(), strict=True
    ):
        assert relative(ours.grad, theirs.grad.double()) < 1e-3


@pytest.mark.parametrize("write", ["optimizer", "data", "one filter by data", "load", "replaced"])
def test_a_changed_weight_is_noticed(write: str) -> None:
    unet = network("UNet2DModel")
    arguments = inputs(unet)
    fastddpm.accelerate(unet)
    conv = unet.mid_block.resnets[0].conv2
    with torch.no_grad():
        before = output(unet, arguments)
        if write == "optimizer":
            conv.weight.add_(0.1)
        elif write == "data":
            conv.weight.data.mul_(1.5)
        elif write == "one filter by data":
            conv.weight.data[3] = 0
        elif write == "load":
            conv.load_state_dict({"weight": 2 * conv.weight, "bias": conv.bias})
        else:
            conv.weight = nn.Parameter(-conv.weight)
        after = output(unet, arguments)
        assert not torch.equal(after, before)
        plain = copy.deepcopy(unet)
        fastddpm.restore(plain)
        assert relative(after, exact(plain, arguments)) < 1e-5


@pytest.mark.parametrize("size", [4, 8])  # by patches and by Winograd
def test_one_number_of_a_large_weight_changed_by_data_is_noticed_at_once(size: int) -> None:
    weight = nn.Parameter(torch.randn(128, 128, 3, 3))
    x = torch.randn(1, 128, size, size)
    with torch.no_grad():
        norm_conv(x, weight)
        weight.data.view(-1)[4321 * 7] += 1
        result = norm_conv(x, weight)
    right = torch.nn.functional.conv2d(x.double(), weight.detach().double(), padding=1)
    assert relative(result, right) < 1e-5


def test_dropout_is_pytorch_s_own() -> None:
    unet = network("padding 0, dropout").train()
    arguments, plain = inputs(unet), copy.deepcopy(unet)
    fastddpm.accelerate(unet)
    torch.manual_seed(5)
    theirs = output(plain, arguments)
    torch.manual_seed(5)
    ours = output(unet, arguments)
    # Masks are drawn in the order of memory, which is another in channels_last: alike in distribution only.
    assert 0.5 < float(ours.std() / theirs.std()) < 2
    assert not torch.equal(ours, output(unet, arguments))


def test_a_copy_is_accelerated_and_independent() -> None:
    unet = network("UNet2DModel")
    arguments = inputs(unet)
    fastddpm.accelerate(unet)
    with torch.no_grad():
        expected = output(unet, arguments)
        twin = copy.deepcopy(unet)
        assert torch.equal(output(twin, arguments), expected)
        twin.conv_in.weight.zero_()
        assert torch.equal(output(unet, arguments), expected)
        assert not torch.equal(output(twin, arguments), expected)


def test_other_precisions_and_autocast() -> None:
    unet = network("UNet2DModel")
    arguments = inputs(unet)
    with torch.no_grad():
        right = exact(unet, arguments)
        fastddpm.accelerate(unet)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative(output(unet, arguments), right) < 0.05
        half = unet.to(torch.bfloat16)
        assert relative(output(half, tuple(a.to(torch.bfloat16) if a.ndim else a for a in arguments)), right) < 0.05


def test_other_networks_are_refused_by_name() -> None:
    class Mine(diffusers.UNet2DModel):  # type: ignore[misc, name-defined]
        pass

    with pytest.raises(
        UsageError, match=r"test_accelerate.*Mine is a subclass of UNet2DModel, whose code is not known"
    ):
        fastddpm.accelerate(Mine(**UNCONDITIONAL))
    with pytest.raises(UsageError, match=r"takes UNet2DModel and UNet2DConditionModel of diffusers; got torch.*Linear"):
        fastddpm.accelerate(nn.Linear(2, 2))


def test_a_subclass_of_a_block_is_left_and_said() -> None:
    unet = network("UNet2DModel")
    block = unet.mid_block.resnets[0]

    class Other(type(block)):  # type: ignore[misc]
        def forward(self, *arguments: Any) -> Any:
            return 2 * super().forward(*arguments)

    block.__class__ = Other
    arguments = inputs(unet)
    with torch.no_grad():
        right = exact(unet, arguments)
        report = fastddpm.accelerate(unet)
        assert relative(output(unet, arguments), right) < 1e-5
    (reason,) = (reason for reason, names in report.left.items() if "mid_block.resnets.0" in names)
    assert "Other is a subclass of ResnetBlock2D" in reason


@pytest.mark.parametrize("grad", [slow(False), slow(True)])
def test_compiled_without_breaks_in_the_graph(grad: bool) -> None:
    unet = network("UNet2DModel")
    arguments = inputs(unet)
    right = exact(unet, arguments).detach()
    fastddpm.accelerate(unet)
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        assert relative(output(compiled, arguments).detach(), right) < 1e-5
