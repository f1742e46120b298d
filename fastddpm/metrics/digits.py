"""A small classifier of the embedded digits, the feature network that needs no downloaded weights.

A net trained on digits alone classifies black images and uniform noise with confidence. To prevent that, a fifth of
each training batch is random fields whose target is the uniform distribution over the classes.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastddpm.data import Dataset, open_dataset
from fastddpm.data.cache import default_directory
from fastddpm.errors import DataError, UsageError
from fastddpm.runtime.device import one_thread
from fastddpm.runtime.image_size import ImageSize, size_text
from fastddpm.storage import manifest
from fastddpm.storage.files import whole_directory
from fastddpm.storage.tensors import parse_tensors

from .features import Pretrained

CLASSES, FEATURES = 10, 32
SEEDS = (0, 1, 2)
EPOCHS = 10
SMALLEST = 8
_BATCH, _FIELDS_PER_BATCH = 64, 16
_VERSION = 1
_WEIGHTS = "weights.safetensors"

Report = Callable[[str], None]


class DigitNet(nn.Module):
    """Three convolutions and two linear layers on (N, 1, S, S) float32 in [-1, 1]; 32 features, 10 logits."""

    def __init__(self, size: int, width: int = 12, features: int = FEATURES) -> None:
        super().__init__()
        stride = _stride(size)
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, stride + 2, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.BatchNorm2d(4 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the penultimate layer's features (N, 32) and the logits (N, 10)."""
        features = self.trunk(x)
        return features, self.head(features)


class DigitNets(nn.Module):
    """An ensemble of `count` nets: images uint8 (N, 1, S, S) to features and logits.

    Features: float32 (N, 32 * count), those of all nets concatenated; each net's features are scaled to a total
    variance of 1 on the training digits, so that no net dominates the distances. Logits: float32 (N, 10), the
    logarithms of the mean class probabilities.
    """

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.size = size
        self.nets = nn.ModuleList(DigitNet(size) for _ in range(count))
        self.scales: Tensor
        self.register_buffer("scales", torch.ones(count))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 32 * count) and logits (N, 10). Raises `UsageError` for images of another size."""
        if images.shape[1:] != (1, self.size, self.size):
            raise UsageError(
                f"this net takes digits of {self.size}x{self.size}, (N, 1, H, W); got {tuple(images.shape)}"
            )
        x = images.float() / 127.5 - 1
        pairs = [net(x) for net in self.nets]
        features = torch.cat([f / scale for (f, _), scale in zip(pairs, self.scales, strict=True)], 1)
        return features, torch.stack([logits.softmax(1) for _, logits in pairs]).mean(0).log()


def _stride(size: int) -> int:
    """Return the first convolution's stride. It grows with the size, so large images cost about as much as 16x16."""
    return max(1, size // 16)


def to_float(images: np.ndarray) -> Tensor:
    """Convert uint8 (N, 1, S, S) to float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1


def random_fields(count: int, size: int, rng: torch.Generator) -> Tensor:
    """Draw Gaussian fields (count, 1, size, size) in [-1, 1] with several grain sizes, contrasts and brightnesses."""
    grains = torch.tensor([1, *(_stride(size) * g for g in (2, 3, 5, 7))])
    fields = torch.empty(count, 1, size, size)
    for i, grain in enumerate(grains.tolist()):
        part = fields[i :: len(grains)]
        white = torch.randn(len(part), 1, size + grain - 1, size + grain - 1, generator=rng)
        contrast = 1.5 * torch.rand(len(part), 1, 1, 1, generator=rng)
        brightness = 0.8 * torch.randn(len(part), 1, 1, 1, generator=rng)
        part.copy_((contrast * grain * F.avg_pool2d(white, grain, 1) + brightness).clamp(-1, 1))
    return fields


def train_net(images: np.ndarray, labels: np.ndarray, seed: int, epochs: int = EPOCHS) -> DigitNet:
    """Train a net on images uint8 (N, 1, S, S) with labels int64 (N,), randomly shifted, and on random fields."""
    size, steps = images.shape[-1], len(images) // _BATCH
    shift = _stride(size)
    rng = torch.Generator().manual_seed(seed)
    fields = random_fields(2000, size, rng)
    padded = F.pad(to_float(images), (shift,) * 4, value=-1.0)
    targets = F.one_hot(torch.from_numpy(labels), CLASSES).float()
    no_class = torch.full((_FIELDS_PER_BATCH, CLASSES), 1 / CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitNet(size)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=rng)
        for chosen in order[: steps * _BATCH].split(_BATCH):
            top, left = torch.randint(0, 2 * shift + 1, (2,), generator=rng).tolist()
            digits = padded[chosen, :, top : top + size, left : left + size]
            picked = torch.randint(0, len(fields), (_FIELDS_PER_BATCH,), generator=rng)
            _, logits = net(torch.cat([digits, fields[picked]]))
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.cat([targets[chosen], no_class])).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def held_out_halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return indices of the training set, the reference half and the probe half.

    Of every ten images of a class, in order, eight are trained on, and one each goes to the two held-out halves.
    """
    rank = np.empty(len(labels), dtype=np.int64)
    for label in range(CLASSES):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members)) % 10
    return np.flatnonzero(~np.isin(rank, (4, 9))), np.flatnonzero(rank == 4), np.flatnonzero(rank == 9)


def train_nets(digits: Dataset, seeds: Sequence[int], epochs: int) -> DigitNets:
    """Train one net per seed on the training part of the digits.

    It uses one thread, because the weights would otherwise depend on the number of cores.
    """
    images, labels = digits.images, digits.labels
    assert labels is not None
    train, _, _ = held_out_halves(labels)
    nets = DigitNets(images.shape[-1], len(seeds)).eval()
    with one_thread():
        nets.nets = nn.ModuleList(train_net(images[train], labels[train], seed, epochs) for seed in seeds)
        with torch.inference_mode():
            features = torch.stack([net(to_float(images[train]))[0] for net in nets.nets])
        nets.scales.copy_(features.var(dim=1).sum(1).sqrt())
    return nets.requires_grad_(False)


def check(size: ImageSize, channels: int = 1) -> None:
    """Raise `UsageError` for images that the classifier does not take: not square, below 8 pixels, or in colour."""
    if channels != 1:
        raise UsageError(
            "the classifier of digits takes grey images, of 1 channel, and the model has "
            f"{channels}; choose the feature network inception or efficientnet-lite0"
        )
    if not isinstance(size, int):
        raise UsageError(
            f"the classifier of digits takes square images, and the model's are {size_text(size)}; choose the feature "
            "network inception or efficientnet-lite0"
        )
    if size < SMALLEST:
        raise UsageError(f"the classifier of digits takes images of {SMALLEST}x{SMALLEST} or more; got {size}")


def load(
    size: ImageSize, device: torch.device | str = "cpu", *, cache: Path | None = None, report: Report | None = None
) -> Pretrained:
    """Return the feature network "digits" for images of `size` pixels, training it into the cache if needed.

    It has 96 features, of three nets that were trained on 4,000 of the digits, and 10 logits. A cache entry has
    checksums and appears whole; a damaged one is made again, and if the cache cannot be written the nets serve this
    process only. `cache`: its directory. Default: ~/.cache/fastddpm. `report` gets a line before training. Raises
    `UsageError` if `size` is below 8 or not that of squares.
    """
    check(size)
    assert isinstance(size, int)
    digits = open_dataset(None, image_size=size, channels=1)
    recipe = [_VERSION, size, SEEDS, EPOCHS, digits.checksum]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    entry = (cache or default_directory()) / f"features-digits-{size}-{key}"
    try:
        data = _read(entry)
    except DataError as error:
        if report is not None:
            why = f" ({error})" if entry.exists() else ""
            report(f"training {len(SEEDS)} small nets on the digits, which will be kept in {entry}{why}")
        data = safetensors.torch.save(train_nets(digits, SEEDS, EPOCHS).state_dict())
        _keep(entry, data)
    nets = DigitNets(size, len(SEEDS))
    nets.load_state_dict(parse_tensors(data, entry / _WEIGHTS))
    checksum = hashlib.sha256(data).hexdigest()
    module = nets.eval().requires_grad_(False).to(device)
    return Pretrained("digits", checksum, FEATURES * len(SEEDS), CLASSES, False, 1, module)


def _read(entry: Path) -> bytes:
    _, files = manifest.read(entry)
    if _WEIGHTS not in files:
        raise DataError(f"{entry} has no {_WEIGHTS}")
    return manifest.read_file(entry / _WEIGHTS, files[_WEIGHTS])


def _keep(entry: Path, data: bytes) -> None:
    """Write an entry under a temporary name and rename it. A failure is ignored, since the cache is only a shortcut."""
    with contextlib.suppress(OSError), whole_directory(entry) as temporary:  # in place of a damaged entry
        manifest.seal(temporary, 0, {_WEIGHTS: manifest.write_file(temporary / _WEIGHTS, data)})
