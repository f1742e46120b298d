"""The classifier of digits: its nets, its training, and the cache that it is kept in."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastddpm.data import open_dataset
from fastddpm.errors import UsageError
from fastddpm.metrics import digits
from fastddpm.storage import manifest


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64])
def test_nets_and_fields_of_other_sizes(size: int) -> None:
    fields = digits.random_fields(10, size, torch.Generator().manual_seed(0))
    assert fields.shape == (10, 1, size, size) and fields.abs().max() <= 1
    features, logits = digits.DigitNet(size)(fields)
    assert features.shape == (10, 32) and logits.shape == (10, 10)


def test_training_is_fixed_by_the_seed() -> None:
    data = open_dataset(None, image_size=16, channels=1)
    assert data.labels is not None
    images, labels = data.images[::40], data.labels[::40]
    before = torch.get_rng_state()
    first, again, other = (digits.train_net(images, labels, seed, epochs=1).head.weight for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SEEDS", (0,))
    monkeypatch.setattr(digits, "EPOCHS", 1)


@pytest.mark.slow
def test_the_feature_network(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of two nets side by side, each of a total variance of 1 on its digits; their mean probabilities."""
    monkeypatch.setattr(digits, "SEEDS", (0, 1))
    told: list[str] = []
    network = digits.load(16, cache=tmp_path, report=told.append)
    assert len(told) == 1 and "training 2 small nets" in told[0] and str(tmp_path) in told[0]
    data = open_dataset(None, image_size=16, channels=1)
    assert data.labels is not None
    train, reference, _ = digits.held_out_halves(data.labels)
    features, logits = network(torch.from_numpy(data.images[train]))
    assert network.dimension == 64 and features.shape == (4000, 64) and not network.is_inception
    for part in features.double().split(32, dim=1):
        assert float(part.var(0).sum()) == pytest.approx(1, rel=1e-4)
    held_out = network(torch.from_numpy(data.images[reference])).logits
    assert held_out is not None and logits is not None
    torch.testing.assert_close(held_out.exp().sum(1), torch.ones(500))
    assert (held_out.argmax(1).numpy() == data.labels[reference]).mean() > 0.85
    nets = network.module
    assert isinstance(nets, digits.DigitNets)
    x = digits.to_float(data.images[:5])
    expected = torch.stack([net(x)[1].softmax(1) for net in nets.nets]).mean(0)
    found = network(torch.from_numpy(data.images[:5])).logits
    assert found is not None
    torch.testing.assert_close(found.exp(), expected)


@pytest.mark.slow
def test_it_is_trained_once(quick: None, tmp_path: Path) -> None:
    told: list[str] = []
    first = digits.load(8, cache=tmp_path, report=told.append)
    again = digits.load(8, cache=tmp_path, report=told.append)
    assert len(told) == 1 and first.checksum == again.checksum
    other = digits.load(9, cache=tmp_path, report=told.append)
    assert len(told) == 2 and other.checksum != first.checksum
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.slow
def test_a_damaged_entry_is_made_again_and_gives_the_same_weights(quick: None, tmp_path: Path) -> None:
    first = digits.load(8, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    path = entry / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    told: list[str] = []
    again = digits.load(8, cache=tmp_path, report=told.append)
    assert "damaged" in told[0] and again.checksum == first.checksum
    assert manifest.read(entry)[1]["weights.safetensors"].sha256 == first.checksum


@pytest.mark.slow
def test_without_a_cache_it_is_trained_all_the_same(quick: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    network = digits.load(8, cache=tmp_path / "file")
    assert network(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).features.shape == (2, 32)


def test_mistakes(quick: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="8x8 or more; got 7"):
        digits.load(7, cache=tmp_path)
    network = digits.load(8, cache=tmp_path)
    with pytest.raises(UsageError, match="takes digits of 8x8"):
        network(torch.from_numpy(np.zeros((1, 1, 16, 16), np.uint8)))
    with pytest.raises(UsageError, match=r"uint8 \(N, 1, H, W\)"):
        network(torch.from_numpy(np.zeros((1, 3, 8, 8), np.uint8)))
