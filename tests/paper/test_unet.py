"""The network as a whole: size, conditioning, dropout, precision, compilation, errors."""

import io

import pytest
import torch
from helpers.marks import slow
from helpers.networks import TINY, batch, shaken, tiny
from torch import Tensor

from fastddpm.config import UNetConfig
from fastddpm.errors import UsageError
from fastddpm.ops.noise import NoiseKey
from fastddpm.presets import PRESETS
from fastddpm.unet import ResBlock, UNet

# Size


def expected_parameters(config: UNetConfig) -> int:
    """From the paper's description (appendix B) and its released code, block by block."""
    time = 4 * config.width

    def res_block(inputs: int, outputs: int) -> int:
        convolutions = 9 * inputs * outputs + outputs + 9 * outputs * outputs + outputs
        shortcut = 0 if inputs == outputs else inputs * outputs + outputs
        return 2 * inputs + convolutions + time * outputs + outputs + 2 * outputs + shortcut

    def attention(channels: int) -> int:
        return 2 * channels + 4 * (channels**2 + channels)

    image, levels = config.image_channels, len(config.multipliers)
    total = config.width * time + time + time * time + time + 9 * image * config.width + config.width
    if config.num_classes:
        total += (config.num_classes + (config.label_dropout > 0)) * time
    channels, size, skips = config.width, config.image_size, [config.width]
    for level, multiplier in enumerate(config.multipliers):
        for _ in range(config.blocks):
            total += res_block(channels, config.width * multiplier)
            channels = config.width * multiplier
            total += attention(channels) * (size in config.attention_resolutions)
            skips.append(channels)
        if level < levels - 1:
            total += 9 * channels**2 + channels
            size //= 2
            skips.append(channels)
    total += 2 * res_block(channels, channels) + attention(channels)
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        for _ in range(config.blocks + 1):
            total += res_block(channels + skips.pop(), config.width * multiplier)
            channels = config.width * multiplier
            total += attention(channels) * (size in config.attention_resolutions)
        if level > 0:
            total += 9 * channels**2 + channels
            size *= 2
    outputs = image * (2 if config.learned_variance else 1)
    return total + 2 * channels + 9 * channels * outputs + outputs


def count(config: UNetConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(config).parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar10", 35_746_307),  # "35.7 million"
        ("celebahq256", 113_673_219),  # "114 million"
        ("lsun256", 113_673_219),
        ("lsun256-large", 255_677_955),  # "approximately 256 million"
    ],
)
def test_parameters_of_the_papers_networks(name: str, parameters: int) -> None:
    assert count(PRESETS[name].unet) == parameters == expected_parameters(PRESETS[name].unet)


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["mnist"].unet,
        TINY,
        tiny(num_classes=10),
        tiny(num_classes=10, label_dropout=0.1),
        tiny(learned_variance=True),
        tiny(multipliers=(1,), blocks=3, attention_resolutions=()),
        tiny(multipliers=(2, 1, 3), attention_resolutions=(12, 3)),
    ],
    ids=["mnist", "tiny", "labels", "null label", "learned variance", "one level", "narrowing"],
)
def test_parameters_of_other_networks(config: UNetConfig) -> None:
    assert count(config) == expected_parameters(config)


# Conditioning and heads


def test_labels_add_an_embedding_to_that_of_time() -> None:
    """The label's row is added behind the two linear layers: row r equals the same amount on the last bias."""
    x_t, t = batch(3)
    conditional = shaken(UNet(tiny(num_classes=4, label_dropout=0.1)))
    assert conditional.null_label == 4 and conditional.label.weight.shape == (5, 32)
    weights = {name: tensor for name, tensor in conditional.state_dict().items() if name != "label.weight"}
    unconditional = UNet(TINY).eval()
    assert unconditional.null_label is None and UNet(tiny(num_classes=4)).null_label is None
    with torch.no_grad():
        for label in (0, 3, 4):
            bias = weights["time2.bias"] + conditional.label.weight[label]
            unconditional.load_state_dict(weights | {"time2.bias": bias})
            ours = conditional(x_t, t, torch.full((3,), label))
            torch.testing.assert_close(ours, unconditional(x_t, t), rtol=1e-4, atol=1e-4)
        mixed = conditional(x_t, t, torch.tensor([0, 3, 4]))
        for n, label in enumerate((0, 3, 4)):
            alone = conditional(x_t, t, torch.full((3,), label))
            torch.testing.assert_close(mixed[n], alone[n], rtol=1e-4, atol=1e-4)
            assert (mixed[n] - conditional(x_t, t, torch.full((3,), 1))[n]).abs().max() > 1e-2


def test_time_changes_the_output() -> None:
    unet, (x_t, t) = shaken(UNet(TINY)), batch()
    with torch.no_grad():
        assert (unet(x_t, t) - unet(x_t, t + 1)).abs().amax((1, 2, 3)).min() > 1e-3


def test_learned_variance_is_a_second_half_of_channels() -> None:
    x_t, t = batch()
    plain, learned = shaken(UNet(TINY)), UNet(tiny(learned_variance=True)).eval()
    state = plain.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = torch.cat([state[name], learned.state_dict()[name][3:]])
    learned.load_state_dict(state)
    with torch.no_grad():
        out = learned(x_t, t)
        torch.testing.assert_close(out[:, :3], plain(x_t, t), rtol=1e-4, atol=1e-4)
    assert out.shape == (2, 6, 12, 12) and out[:, 3:].abs().max() < 1e-2


def test_options_that_are_off_add_no_parameters() -> None:
    """Checkpoints of one network load into another that differs in such options only."""
    names = set(UNet(TINY).state_dict())
    for off in ({"dropout": 0.5}, {"learned_variance": True}, {"attention_resolutions": (6, 7)}):
        assert set(UNet(tiny(**off)).state_dict()) == names
    assert set(UNet(tiny(num_classes=2)).state_dict()) == names | {"label.weight"}


def test_state_dict_round_trip() -> None:
    x_t, t = batch()
    one, other = shaken(UNet(TINY)), UNet(TINY).eval()
    stream = io.BytesIO()
    torch.save(one.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    with torch.no_grad():
        assert torch.equal(one(x_t, t), other(x_t, t))


# Dropout


def test_evaluation_is_deterministic_and_ignores_the_key() -> None:
    unet, (x_t, t) = shaken(UNet(tiny(dropout=0.5))), batch()
    with torch.no_grad():
        first = unet(x_t, t)
        assert torch.equal(first, unet(x_t, t)) and torch.equal(first, unet(x_t, t, None, NoiseKey.of(1, 2, [0, 1])))


def test_training_dropout_is_a_function_of_the_key() -> None:
    unet, (x_t, t) = shaken(UNet(tiny(dropout=0.5))).train(), batch()

    def run(key: NoiseKey | None, manual_seed: int) -> Tensor:
        torch.manual_seed(manual_seed)
        with torch.no_grad():
            return unet(x_t, t, None, key)

    key = NoiseKey.of(1, 2, [0, 1])
    assert torch.equal(run(key, 1), run(key, 2))
    for other in (NoiseKey.of(2, 2, [0, 1]), NoiseKey.of(1, 3, [0, 1]), NoiseKey.of(1, 2, [2, 3])):
        assert (run(key, 1) - run(other, 1)).abs().amax((1, 2, 3)).min() > 1e-2
    assert torch.equal(run(None, 1), run(None, 1)) and not torch.equal(run(None, 1), run(None, 2))


def test_every_residual_block_has_dropout_of_its_own() -> None:
    """One layer number each, 22 in the CIFAR-10 network, on the second norm only."""
    with torch.device("meta"):
        unet = UNet(PRESETS["cifar10"].unet)
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    assert sorted(block.norm2.layer for block in blocks) == list(range(22))
    assert {block.norm2.dropout for block in blocks} == {0.1} and {block.norm1.dropout for block in blocks} == {0.0}


def test_an_image_does_not_depend_on_its_batch() -> None:
    unet, (x_t, t) = shaken(UNet(tiny(dropout=0.3))).train(), batch(3)
    key = NoiseKey.of(5, 6, [11, 4, 7])
    with torch.no_grad():
        together = unet(x_t, t, None, key)
        for n in range(3):
            alone = unet(x_t[n : n + 1], t[n : n + 1], None, key.part(n, n + 1))
            torch.testing.assert_close(alone[0], together[n], rtol=1e-4, atol=1e-4)


def test_empty_batch() -> None:
    with torch.no_grad():
        assert UNet(TINY).eval()(*batch(0)).shape == (0, 3, 12, 12)


# Precision, layout, compilation


def test_bfloat16_autocast_is_close() -> None:
    """Some 40 roundings of 2^-9 in a row, of which most average out."""
    unet, (x_t, t) = shaken(UNet(TINY), 0.05), batch()
    exact = unet(x_t, t)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = unet(x_t, t)
    assert rounded.dtype in (torch.bfloat16, torch.float32)  # of PyTorch, or of the compiled library
    error = (rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-4 < error < 0.03
    rounded.float().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in unet.named_parameters()}
    exact.square().sum().backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert {name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()} == set()


def test_channels_last_gives_the_same_numbers_in_channels_last() -> None:
    unet, (x_t, t) = shaken(UNet(TINY)), batch()
    with torch.no_grad():
        expected = unet(x_t, t)
        ours = unet.to(memory_format=torch.channels_last)(x_t.to(memory_format=torch.channels_last), t)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("training", [slow(False), True])
def test_compiles_into_one_graph(training: bool) -> None:
    """Outputs and every parameter's gradient, in evaluation mode and with dropout."""
    torch._dynamo.reset()
    unet = shaken(UNet(tiny(dropout=0.3, num_classes=3))).train(training)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    x_t, t = batch()
    label, key = torch.tensor([0, 2]), NoiseKey.of(1, 2, [0, 1])
    results = []
    for network in (unet, compiled):
        unet.zero_grad()
        out = network(x_t, t, label, key)
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad.clone() for parameter in unet.parameters())])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4 * eager.abs().max().item())


# Errors


@pytest.mark.parametrize(
    ("shape", "t", "label", "options", "message"),
    [
        ((2, 3, 12), [0, 1], None, {}, r"x_t must be \(N, 3, 12, 12\); got \(2, 3, 12\)"),
        ((2, 1, 12, 12), [0, 1], None, {}, r"x_t must be \(N, 3, 12, 12\); got \(2, 1, 12, 12\)"),
        ((2, 3, 16, 16), [0, 1], None, {}, r"x_t must be \(N, 3, 12, 12\); got \(2, 3, 16, 16\)"),
        ((2, 3, 12, 12), [0], None, {}, r"t must be integer \(2,\); got torch.int64 \(1,\)"),
        ((2, 3, 12, 12), [0.0, 1.0], None, {}, r"t must be integer \(2,\); got torch.float32 \(2,\)"),
        ((2, 3, 12, 12), [0, 1], [0, 1], {}, "this network takes no label"),
        ((2, 3, 12, 12), [0, 1], None, {"num_classes": 3}, "this network needs a label"),
        ((2, 3, 12, 12), [0, 1], [0], {"num_classes": 3}, r"label must be integer \(2,\); got torch.int64 \(1,\)"),
        ((2, 3, 12, 12), [0, 1], [0.0, 1], {"num_classes": 3}, r"label must be integer \(2,\); got torch.float32"),
    ],
)
def test_refuses(
    shape: tuple[int, ...], t: list[float], label: list[float] | None, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match="UNet: " + message):
        UNet(tiny(**options))(torch.zeros(shape), torch.tensor(t), None if label is None else torch.tensor(label))


def test_groups_divide_the_first_convolutions_channels() -> None:
    """Its output, one width, is normalised in the first block, and with a skip in the last."""
    with pytest.raises(UsageError, match="groups must divide each level's channels; 8 does not divide 12"):
        tiny(width=12, multipliers=(2, 4), groups=8)
    config = tiny(width=12, multipliers=(2, 4), groups=12)
    assert UNet(config)(torch.zeros(1, 3, 12, 12), torch.tensor([0])).shape == (1, 3, 12, 12)
