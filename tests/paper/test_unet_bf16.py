"""Blocks under autocast in bfloat16 on a CPU: what the compiled library multiplies, and what stays autocast's."""

import copy

import pytest
import torch
from helpers.networks import shaken, tiny
from torch import Tensor, nn

from fastddpm.kernels import native
from fastddpm.ops import conv3x3
from fastddpm.unet import AttnBlock, Down, ResBlock, UNet, Up, blocks, on_cpu


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("doubled", [False, True])
def test_autocast_leaves_convolutions_to_the_library_where_it_is_fast(
    doubled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations then stay float32, and so does what comes out; else PyTorch's convolution rounds it to bfloat16."""
    layer, x = blocks.Conv3x3(32, 24, doubled=doubled), torch.randn(2, 32, 8, 8)
    expected = conv3x3(x, layer.weight, layer.bias, doubled=doubled, bf16=True)
    for instructions in (True, False):
        monkeypatch.setattr(native, "has_bf16", lambda answer=instructions: answer)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = layer(x.bfloat16())
            y = layer(x)
        assert y.dtype == rounded.dtype == (torch.float32 if instructions else torch.bfloat16)
        assert torch.equal(y, expected) == instructions
        assert (y.float() - expected).norm() <= 1e-2 * expected.norm()
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == torch.float16


def gradients_of(network: nn.Module, *arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradient of a loss by each parameter."""
    out = network(*arguments)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    names = [name for name, _ in network.named_parameters()]
    return out.detach(), dict(zip(names, torch.autograd.grad(loss, list(network.parameters())), strict=True))


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize(
    "options", [{}, {"heads": 2, "scale_shift": True, "resample": "resblock"}], ids=["defaults", "other blocks"]
)
def test_bf16_on_a_cpu_is_closer_than_autocast(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradient of a network against float64: with float32 activations, and by PyTorch's autocast."""
    config = tiny(width=32, multipliers=(1, 2), image_size=16, attention_resolutions=(16,), groups=8, **options)
    unet = UNet(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    x, t = torch.randn(2, *config.image_shape), torch.tensor([3, 700])
    out, gradients = gradients_of(copy.deepcopy(unet).double(), x.double(), t)
    exact = torch.cat([gradient.flatten() for gradient in gradients.values()])
    errors = []
    for instructions in (True, False):
        monkeypatch.setattr(native, "has_bf16", lambda answer=instructions: answer)
        with torch.autocast("cpu", torch.bfloat16):
            ours, found = gradients_of(unet, x, t)
        assert ours.dtype == (torch.float32 if instructions else torch.bfloat16)
        gradient = torch.cat([found[name].flatten() for name in gradients])
        errors.append((relative_error(ours, out), relative_error(gradient, exact)))
    library, autocast = errors
    assert 1e-4 < library[0] < 0.95 * autocast[0] and 1e-4 < library[1] < 0.95 * autocast[1], errors


@pytest.mark.parametrize("part", ["", "mid.attention.q", "mid.block1.temb_proj", "time1", "time2", "mid.block2.conv1"])
def test_autocast_takes_weights_that_are_bfloat16_already(part: str, bf16_instructions: None) -> None:
    """Of the whole network or of one layer: then autocast's own casts decide."""
    unet = shaken(UNet(tiny()))
    x, t = torch.randn(2, *unet.config.image_shape), torch.tensor([3, 700])
    expected, gradients = gradients_of(copy.deepcopy(unet).double(), x.double(), t)
    unet.get_submodule(part).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, found = gradients_of(unet, x, t)
    assert relative_error(out, expected) <= 4e-2
    exact = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert relative_error(torch.cat([found[name].flatten().double() for name in gradients]), exact) <= 6e-2


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_bf16_on_a_cpu_calls_layers_that_were_replaced(bf16_instructions: None) -> None:
    """And hooks; the others of the block stay as they are."""

    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    block, x = shaken(AttnBlock(32, 8)), torch.randn(1, 32, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        plain, proj = block(x), Twice(32, 32)
        proj.load_state_dict(block.proj.state_dict())
        block.proj = proj
        assert relative_error(block(x) - x, 2 * (plain - x).double()) <= 2e-2
    res = shaken(ResBlock(16, 32, 8, tiny(), 0))
    h, temb = torch.randn(1, 16, 4, 4), torch.randn(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, seen = res(h, temb, None, None), []
        res.shortcut.register_forward_hook(lambda module, args, output: seen.append(output))
        assert relative_error(res(h, temb, None, None), expected.double()) <= 2e-2
    assert len(seen) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_of_many_channels_are_one_graph(precision: str, bf16_instructions: None) -> None:
    """What decides on a library is left to the compiler, or not traced."""
    channels = on_cpu.CHANNELS_TO_CONVOLVE
    block = nn.Sequential(AttnBlock(channels, 32), Down(channels), Up(channels))
    x = torch.randn(1, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected, found = block(x), compiled(x)
    assert found.dtype == torch.float32
    assert relative_error(found, expected.double()) <= 1e-5
