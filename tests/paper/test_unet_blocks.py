"""The network's parts against float64: time embedding, initialisation, blocks, and how they are connected."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.networks import TINY, batch, shaken, tiny
from torch import Tensor, nn

from fastddpm.kernels import native
from fastddpm.ops.noise import NoiseKey
from fastddpm.presets import PRESETS
from fastddpm.unet import AttnBlock, Down, ResBlock, UNet, Up, blocks, on_cpu, timestep_embedding


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}


# Time embedding


@pytest.mark.parametrize("width", [4, 32, 128, 192])
def test_timestep_embedding(width: int) -> None:
    """Vaswani et al. 2017 as the released code has it: sin before cos, frequencies 1 down to 1e-4 inclusive."""
    t = np.array([0, 1, 500, 999, 99_999])
    half = width // 2
    angle = t[:, None] * 10_000.0 ** (-np.arange(half) / (half - 1))[None, :]
    expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    ours = timestep_embedding(torch.tensor(t), width)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-7)


def test_timestep_embedding_ends() -> None:
    """Sines are 0 at t = 0 and lie in the first half; the last frequency is exactly 1e-4."""
    at_zero, at_ten = timestep_embedding(torch.tensor([0, 10]), 128).double().numpy()
    assert (at_zero[:64] == 0).all() and (at_zero[64:] == 1).all()
    np.testing.assert_allclose(at_ten[[0, 63, 127]], [np.sin(10), np.sin(1e-3), np.cos(1e-3)], atol=1e-7)
    np.testing.assert_allclose(np.arcsin(at_ten[63]) / 10, 1e-4, rtol=1e-6)


# Initialisation


def fans(weight: Tensor) -> tuple[int, int]:
    receptive = weight[0, 0].numel() if weight.ndim == 4 else 1
    return weight.shape[1] * receptive, weight.shape[0] * receptive


def layers(unet: UNet) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield name, module


def test_initialisation() -> None:
    """Xavier-uniform: U(-b, b), b = gain sqrt(6 / (fan_in + fan_out)), gain 1e-5 where a residual branch ends."""
    unet = UNet(tiny(width=32, groups=8, num_classes=3, learned_variance=True))
    near_zero = set()
    for name, layer in layers(unet):
        values = layer.weight.detach().double().numpy()
        bound = np.sqrt(6 / sum(fans(layer.weight)))
        gain = 1e-5 if np.abs(values).max() < 1e-3 * bound else 1.0
        if gain < 1:
            near_zero.add(name)
        assert np.abs(values).max() <= gain * bound * (1 + 1e-6), name
        # Of n uniform draws the largest is below 1 - 12/n with probability exp(-12).
        assert np.abs(values).max() >= gain * bound * (1 - 12 / values.size), name
        # A uniform's mean square is b^2 / 3, with a relative deviation of sqrt(4/5 / n).
        mean_square = (values**2).mean() * 3 / (gain * bound) ** 2
        assert abs(mean_square - 1) < 5 * np.sqrt(0.8 / values.size), name
        assert abs(values.mean()) < 5 * gain * bound / np.sqrt(3 * values.size), name
        assert layer.bias is not None and not layer.bias.any(), name
    expected = {name for name, _ in layers(unet) if name.endswith((".conv2", ".proj"))} | {"conv_out"}
    assert near_zero == expected
    # Residual blocks: 2 on the way down, 2 in the middle, 4 on the way up; attention: 1, 1 and 2.
    assert len(expected) == 8 + 4 + 1
    for name, parameter in unet.named_parameters():
        if ".norm" in name or name.startswith("norm"):
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name


def test_a_new_network_predicts_nearly_nothing() -> None:
    """What gain 1e-5 is for: every residual branch and the output start near zero."""
    x_t, t = batch()
    with torch.no_grad():
        assert UNet(TINY).eval()(x_t, t).abs().max() < 1e-3


# Blocks


def res_block(p: dict[str, np.ndarray], h: np.ndarray, temb: np.ndarray, skip: np.ndarray | None) -> np.ndarray:
    """The released code's residual block on concat(h, skip), by hand."""
    x = h if skip is None else np.concatenate([h, skip], axis=1)

    def norm(name: str, value: np.ndarray) -> np.ndarray:
        weight, bias = p[f"{name}.weight"][:, None, None], p[f"{name}.bias"][:, None, None]
        return oracle.silu(oracle.group_norm(value, 4) * weight + bias)

    out = oracle.same_conv(norm("norm1", x), p["conv1.weight"], p["conv1.bias"])
    out = out + (temb @ p["temb_proj.weight"].T + p["temb_proj.bias"])[:, :, None, None]
    out = oracle.same_conv(norm("norm2", out), p["conv2.weight"], p["conv2.bias"])
    if "shortcut.weight" in p:
        x = oracle.conv(x, p["shortcut.weight"], p["shortcut.bias"])
    return out + x


# Identity shortcut; 1x1 shortcut; a skip as wide as h; a skip that shares a group of 6 channels with h.
@pytest.mark.parametrize(("inputs", "outputs", "skip"), [(8, 8, 0), (8, 16, 0), (16, 16, 16), (16, 8, 8)])
def test_res_block(inputs: int, outputs: int, skip: int, rng: np.random.Generator) -> None:
    block = shaken(ResBlock(inputs, outputs, 32, TINY, layer=0, skip=skip))
    assert (block.shortcut is None) == (inputs + skip == outputs)
    h, temb = rng.standard_normal((2, inputs, 6, 5)), rng.standard_normal((2, 32))
    other = rng.standard_normal((2, skip, 6, 5)) if skip else None
    tensors = [None if x is None else torch.tensor(x, dtype=torch.float32) for x in (h, temb, other)]
    with torch.no_grad():
        ours = block(*tensors, key=None).double().numpy()
    expected = res_block(arrays(block), h, temb, other)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_attention_block(rng: np.random.Generator) -> None:
    """One head of the full width over all pixels, scale C^-1/2, no SiLU behind the norm, residual."""
    block, x = shaken(AttnBlock(8, 4)), rng.standard_normal((2, 8, 3, 5))
    p = arrays(block)
    normal = oracle.group_norm(x, 4) * p["norm.weight"][:, None, None] + p["norm.bias"][:, None, None]
    tokens = normal.reshape(2, 8, 15).transpose(0, 2, 1)
    q, k, v = (tokens @ p[f"{name}.weight"].T + p[f"{name}.bias"] for name in "qkv")
    out = oracle.attention(q, k, v) @ p["proj.weight"].T + p["proj.bias"]
    with torch.no_grad():
        ours = block(torch.tensor(x, dtype=torch.float32)).double().numpy()
    np.testing.assert_allclose(ours, x + out.transpose(0, 2, 1).reshape(x.shape), atol=2e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_wide_attention_by_convolutions_is_that_by_products(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU; in the output and in the gradients of input, weights and biases, against float64."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    block = shaken(AttnBlock(on_cpu.CHANNELS_TO_CONVOLVE, 32, heads=heads))
    for layer in (block.q, block.k, block.v, block.proj):
        nn.init.xavier_uniform_(layer.weight)
    x = torch.randn(2, on_cpu.CHANNELS_TO_CONVOLVE, 3, 5).contiguous(memory_format=torch.channels_last)
    assert on_cpu.convolves_faster(x) and not on_cpu.convolves_faster(x.double())

    def derivatives(module: AttnBlock, image: Tensor) -> list[Tensor]:
        image = image.clone().requires_grad_()
        out = module(image)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), [image, *module.parameters()])]

    found = derivatives(block, x)
    for ours, exact in zip(found, derivatives(block.double(), x.double()), strict=True):
        assert (ours - exact).norm() <= 1e-5 * exact.norm() + 1e-4


def test_a_replaced_layer_of_wide_attention_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    channels = on_cpu.CHANNELS_TO_CONVOLVE
    block, x = shaken(AttnBlock(channels, 32)), torch.randn(1, channels, 2, 2)
    plain, proj = block(x), Twice(channels, channels)
    proj.load_state_dict(block.proj.state_dict())
    block.proj = proj
    torch.testing.assert_close(block(x) - x, 2 * (plain - x), rtol=1e-4, atol=1e-4)


def test_downsampling_pads_right_and_bottom_only(rng: np.random.Generator) -> None:
    """A delta in the top left corner meets the kernel's top left weight; symmetric padding gives its centre."""
    down = shaken(Down(2))
    weight, bias = arrays(down)["conv.weight"], arrays(down)["conv.bias"]
    delta = torch.zeros(1, 2, 4, 4)
    delta[0, 1, 0, 0] = 1
    x = rng.standard_normal((2, 2, 6, 4))
    with torch.no_grad():
        corner = down(delta)[0, :, 0, 0].double().numpy() - bias
        ours = down(torch.tensor(x, dtype=torch.float32)).double().numpy()
    np.testing.assert_allclose(corner, weight[:, 1, 0, 0], atol=1e-6)
    padded = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))
    assert ours.shape == (2, 2, 3, 2)
    np.testing.assert_allclose(ours, oracle.conv(padded, weight, bias, stride=2), atol=1e-5)


def test_a_network_with_a_wrapped_convolution_is_copied() -> None:
    down = Down(2)
    down.conv = nn.Sequential(down.conv)  # type: ignore[assignment]
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(copy.deepcopy(down)(x), down(x))


def test_upsampling_doubles_pixels_then_convolves(rng: np.random.Generator) -> None:
    up, x = shaken(Up(3)), rng.standard_normal((2, 3, 3, 5))
    with torch.no_grad():
        ours = up(torch.tensor(x, dtype=torch.float32)).double().numpy()
    p = arrays(up)
    doubled = x.repeat(2, axis=2).repeat(2, axis=3)
    np.testing.assert_allclose(ours, oracle.same_conv(doubled, p["conv.weight"], p["conv.bias"]), atol=1e-5)


def test_skips_go_in_behind_h_newest_first() -> None:
    """What each block of the up path reads: the level below, then the outputs of the down path, last one first."""
    unet = shaken(UNet(tiny(blocks=2)))
    produced, consumed, previous = [], [], []
    for level in unet.down:
        for i, block in enumerate(level.blocks):
            source = level.attentions[i] if len(level.attentions) else block
            source.register_forward_hook(lambda module, args, output: produced.append(output))
        if level.resample is not None:
            level.resample.register_forward_hook(lambda module, args, output: produced.append(output))
    unet.conv_in.register_forward_hook(lambda module, args, output: produced.append(output))
    unet.mid.register_forward_hook(lambda module, args, output: previous.append(output))
    for level in unet.up:
        for block in level.blocks:
            block.register_forward_hook(lambda module, args, output: consumed.append((args[0], args[2])))
    with torch.no_grad():
        unet(*batch())
    assert len(produced) == len(consumed) == 1 + 2 + 1 + 2
    assert all(skip is tensor for (_, skip), tensor in zip(consumed, reversed(produced), strict=True))
    assert consumed[0][0] is previous[0]


def test_attention_follows_every_block_at_its_resolutions() -> None:
    unet = UNet(tiny(blocks=2, attention_resolutions=(6,)))
    assert [len(level.attentions) for level in unet.down] == [0, 2]
    assert [len(level.attentions) for level in unet.up] == [3, 0]
    with torch.device("meta"):
        cifar10 = UNet(PRESETS["cifar10"].unet)
    assert [len(level.attentions) for level in cifar10.down] == [0, 2, 0, 0]
    assert [len(level.attentions) for level in cifar10.up] == [0, 0, 3, 0]
    assert [[block.norm1.weight.numel() for block in level.blocks] for level in cifar10.up] == [
        [512, 512, 512], [512, 512, 512], [512, 512, 384], [384, 256, 256]
    ]  # fmt: skip


# As on a GPU, where biases are apart from convolutions


def output_and_gradients(unet: UNet, dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(3, *unet.config.image_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    key = NoiseKey(torch.tensor(1), torch.tensor(2), torch.arange(3))
    label = [torch.tensor([0, 1, 1])] if unet.num_classes else []
    unet.zero_grad()
    out = unet(x.requires_grad_(), torch.tensor([1, 500, 999]), *label, noise_key=key)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    assert x.grad is not None and len(gradients) == len(list(unet.parameters()))
    return gradients | {"output": out.detach(), "x": x.grad}


@pytest.mark.parametrize(
    "options",
    [{}, {"scale_shift": True, "resample": "resblock"}, {"num_classes": 2, "image_channels": 1, "dropout": 0.1}],
    ids=["defaults", "scale_shift", "labels"],
)
def test_biases_apart_from_convolutions(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    unet = shaken(UNet(tiny(**options)).double()).train()
    expected = output_and_gradients(unet, torch.float64)
    monkeypatch.setattr(blocks, "by_kernels", lambda x: True)
    for name, ours in output_and_gradients(unet, torch.float64).items():
        # The gradient of the keys' bias is zero but for rounding.
        torch.testing.assert_close(ours, expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_biases_apart_from_convolutions_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to float32 as with PyTorch's convolutions, the last of which has fewer than 8 output channels."""
    monkeypatch.setattr(native, "has_bf16", lambda: False)  # as on a GPU, where there are no others
    torch.manual_seed(0)
    unet = shaken(UNet(tiny())).train()
    exact = output_and_gradients(unet, torch.float32)
    errors = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(blocks, "by_kernels", lambda x: True)
        with torch.autocast("cpu", torch.bfloat16):
            found = output_and_gradients(unet, torch.float32)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in unet.parameters())
        errors.append(sum(float((found[name].float() - exact[name]).norm() / exact[name].norm()) for name in exact
                          if not name.endswith("k.bias")))  # fmt: skip
    assert errors[1] <= 1.1 * errors[0]


class Added(nn.Module):
    """A layer and a low-rank product, as LoRA adds one."""

    def __init__(self, layer: nn.Module, seen: list[str], name: str) -> None:
        super().__init__()
        self.layer, self._seen, self._name = layer, seen, name

    def forward(self, x: Tensor) -> Tensor:
        self._seen.append(self._name)
        return 1.5 * self.layer(x)


@pytest.mark.parametrize("apart", [False, True], ids=["CPU", "GPU"])
def test_replaced_and_hooked_layers_are_called(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution and linear layer inside of blocks: none is replaced by its weights alone."""
    torch.manual_seed(0)
    unet = shaken(UNet(tiny()).double()).eval()
    found = dict(unet.named_modules())
    layers = {name: type(module) for name, module in found.items() if isinstance(module, nn.Conv2d | nn.Linear)}
    monkeypatch.setattr(blocks, "by_kernels", lambda x: apart)
    x, t = torch.randn(2, *unet.config.image_shape, dtype=torch.float64), torch.tensor([1, 500])
    hooked, replaced = set[str](), list[str]()
    handles = [found[name].register_forward_hook(lambda *_, name=name: hooked.add(name)) for name in layers]
    with_hooks = unet(x, t)
    for handle in handles:
        handle.remove()
    assert hooked == set(layers)
    torch.testing.assert_close(with_hooks, unet(x, t), rtol=1e-9, atol=1e-9)
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent), leaf, Added(found[name], replaced, name))
    out = unet(x, t)
    assert set(replaced) == set(layers) and not torch.allclose(out, with_hooks)


def test_other_layers_of_the_same_kind_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bias, with another padding, dilation or groups: as on a CPU, whatever the device."""
    torch.manual_seed(0)
    unet = shaken(UNet(tiny()).double()).eval()
    x, t = torch.randn(2, *unet.config.image_shape, dtype=torch.float64), torch.tensor([1, 500])
    block, attention, down = unet.down[0].blocks[0], unet.mid.attention, unet.down[0].resample
    channels = block.conv1.out_channels
    block.conv1 = nn.Conv2d(block.conv1.in_channels, channels, 3, padding=1).double()
    unet.mid.block1.conv2.bias = None
    attention.q = nn.Linear(attention.q.in_features, attention.q.out_features, bias=False).double()
    down.conv = nn.Conv2d(channels, channels, 3, stride=2, groups=2, padding_mode="circular").double()
    expected = unet(x, t)
    monkeypatch.setattr(blocks, "by_kernels", lambda x: True)
    torch.testing.assert_close(unet(x, t), expected, rtol=1e-9, atol=1e-9)


def test_a_network_pickled_whole_by_an_earlier_version() -> None:
    for padding in (0, 1):
        down = Down(4, padding)
        state = down.__getstate__()
        del state["_pads"]
        loaded = Down.__new__(Down)
        loaded.__setstate__(state)
        x = torch.randn(1, 4, 6, 6)
        assert torch.equal(loaded(x), down(x))
