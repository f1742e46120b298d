"""The pictures as files: what they show, what lies beside them, and what they are said to cost."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.networks import Formula
from PIL import Image
from torch import Tensor

from fastddpm.data import Dataset
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.evaluation.context import EvaluationContext
from fastddpm.evaluation.figures.chains import pairs
from fastddpm.evaluation.figures.draw import PICTURES, picture_cost
from fastddpm.evaluation.options import PICTURE_NAMES, PictureOptions
from fastddpm.metrics import networks
from fastddpm.metrics.features import Activations
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling.chain import StartState
from fastddpm.sampling.images import to_uint8
from fastddpm.sampling.sampler import Sampler

SIZE, STEPS = 4, 6
OPTIONS = PictureOptions(rows=3, columns=4, lambdas=3, continuations=2, neighbours=2, scales=(1.0, 2.5), frames=5)


def context_of(out: Path, *, classes: int = 3, label_dropout: float = 0.1, **options: Any) -> EvaluationContext:
    def formula(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        shift = 0 if label is None else 0.2 * label.reshape(-1, 1, 1, 1)
        return torch.sin(2 * x + 0.01 * t) + shift

    network: Any = Formula(formula, image_size=SIZE, num_classes=classes, label_dropout=label_dropout)
    diffusion = Diffusion()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 1, SIZE, SIZE), dtype=np.uint8)
    dataset = Dataset.of(images, rng.integers(0, max(classes, 1), 30), "noise")
    sampler = Sampler(network, diffusion, STEPS, **options)
    return EvaluationContext("test", sampler, dataset, 4, torch.device("cpu"), out, ProcessGroup())


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def cell(path: Path, row: int, columns: list[int], column: int, *, margin: int = 0) -> np.ndarray:
    """What a picture shows at a row and column, (SIZE, SIZE); `columns`: of each block. Found from its right end."""
    with Image.open(path) as opened:
        picture = np.asarray(opened)
    scale = max(640 // (sum(columns) * SIZE), 10)
    pitch = SIZE * scale + 2
    rows = (picture.shape[0] - 20 + 2) // pitch if margin == 0 else margin
    block, within = 0, column
    while within >= columns[block]:
        within, block = within - columns[block], block + 1
    right = sum(count * pitch - 2 + 10 for count in columns[block + 1 :]) + (columns[block] - within) * pitch - 2
    left, top = picture.shape[1] - right, picture.shape[0] - (rows - row) * pitch + 2
    shown = picture[top : top + SIZE * scale, left : left + SIZE * scale]
    assert np.array_equal(shown, shown[::scale, ::scale].repeat(scale, 0).repeat(scale, 1))
    return shown[::scale, ::scale]


def frames_of(path: Path) -> int:
    with Image.open(path) as opened:
        return opened.n_frames


def test_progressive(tmp_path: Path) -> None:
    ours = context_of(tmp_path)
    paths = PICTURES["progressive"](ours, OPTIONS)
    assert [path.name for path in paths] == ["progressive.png", "progressive.gif", "progressive.npz"]
    arrays = read(paths[2])
    assert arrays["seeds"].tolist() == [0, 1, 2] and arrays["depths"][-1] == 1 and frames_of(paths[1]) == 5
    predictions = [to_uint8(state.x0) for state in ours.sampler.trajectory(range(3))]
    for row in range(3):
        for column, step in enumerate((0, 2, 3, 5)):
            assert np.array_equal(cell(paths[0], row, [4], column), predictions[step][row, 0])


def test_shared_latents(tmp_path: Path) -> None:
    ours = context_of(tmp_path)
    png, npz = PICTURES["shared-latent"](ours, dataclasses.replace(OPTIONS, depths=(1000, 300)))
    arrays = read(npz)
    before = next(ours.sampler.trajectory(range(3), watch=[3]))
    assert arrays["depths"].tolist() == [1000, 201] and ours.sampler.timesteps[4] == 200  # the nearest to 300
    assert np.array_equal(arrays["latents"][:, 1], before.x.numpy())
    for row in range(3):
        for d in range(2):
            shown = to_uint8(torch.from_numpy(arrays["latents"][row, d : d + 1]))[0, 0]
            assert np.array_equal(cell(png, row, [3, 3], 3 * d), shown)
            for k in range(2):
                assert np.array_equal(cell(png, row, [3, 3], 3 * d + 1 + k), arrays["images"][row, d, k, 0])


def test_interpolation(tmp_path: Path) -> None:
    """Originals at the borders; both of a class, whose label the network is given."""
    ours = context_of(tmp_path, guidance=2.0)
    png, npz = PICTURES["interpolation"](ours, OPTIONS)
    arrays, images, labels = read(npz), ours.dataset.images, ours.dataset.labels
    assert arrays["images"].shape == (3, 1, 3, 1, SIZE, SIZE) and arrays["lambdas"].tolist() == [0, 0.5, 1]
    assert len(set(arrays["sources"].ravel().tolist())) == 6 and labels is not None
    for row, (first, second) in enumerate(arrays["sources"]):
        assert labels[first] == labels[second]
        shown = [images[first, 0], *arrays["images"][row, 0, :, 0], images[second, 0]]
        for column, image in enumerate(shown):
            assert np.array_equal(cell(png, row, [1, 3, 1], column), image)


def test_interpolation_depths(tmp_path: Path) -> None:
    png, npz = PICTURES["interpolation-depths"](context_of(tmp_path), OPTIONS)
    arrays = read(npz)
    assert arrays["images"].shape == (1, 9, 3, 1, SIZE, SIZE)
    assert arrays["depths"][0] == 1000 and arrays["depths"][-1] == 0 and (np.diff(arrays["depths"]) <= 0).all()
    for row in range(9):
        for column in range(3):
            image = arrays["images"][0, row, column, 0]
            assert np.array_equal(cell(png, row, [1, 3, 1], column + 1, margin=9), image)


def test_neighbours(tmp_path: Path) -> None:
    ours = context_of(tmp_path)
    png, npz = PICTURES["neighbours"](ours, OPTIONS)
    arrays = read(npz)
    samples = to_uint8(ours.sampler.sample(range(3)))
    assert np.array_equal(arrays["samples"], samples)
    squares = np.square(samples[:, None].astype(int) - ours.dataset.images.astype(int)).sum(axis=(2, 3, 4))
    assert np.array_equal(arrays["indices"], np.argsort(squares, axis=1, kind="stable")[:, :2])
    for row in range(3):
        assert np.array_equal(cell(png, row, [1, 2], 0), samples[row, 0])
        for k in range(2):
            assert np.array_equal(cell(png, row, [1, 2], 1 + k), ours.dataset.images[arrays["indices"][row, k], 0])


def test_neighbours_by_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network that is opened by its name: here one that sees the mean level and nothing else."""

    def open_network(name: str, *, image_size: int, device: torch.device, report: Any) -> Any:
        assert (name, image_size) == ("means", SIZE)
        return lambda images: Activations(images.float().mean((1, 2, 3))[:, None], None)

    monkeypatch.setattr(networks, "open_network", open_network)
    ours = context_of(tmp_path)
    paths = PICTURES["neighbours"](ours, dataclasses.replace(OPTIONS, features="means"))
    assert [path.stem for path in paths] == ["neighbours"] * 2 + ["neighbours-features"] * 2
    samples, images = to_uint8(ours.sampler.sample(range(3))), ours.dataset.images[:]
    away = np.abs(samples.mean((1, 2, 3))[:, None] - images.mean((1, 2, 3)))
    indices = np.argsort(away, axis=1, kind="stable")[:, :2]
    assert np.array_equal(read(paths[3])["indices"], indices)
    for row in range(3):
        assert np.array_equal(cell(paths[2], row, [1, 2], 2), images[indices[row, 1], 0])


def test_strips(tmp_path: Path) -> None:
    """Forward from the image to noise, in reverse from noise to the image; the animation shows all of it."""
    ours = context_of(tmp_path)
    forward, reverse, gif, npz = PICTURES["strips"](ours, OPTIONS)
    assert [path.name for path in (forward, reverse, gif)] == ["strips-forward.png", "strips-reverse.png", "strips.gif"]
    arrays = read(npz)
    assert arrays["depths"][0] == 1000 and arrays["depths"][-1] == 0 and frames_of(gif) == 10
    samples = to_uint8(ours.sampler.sample(range(3)))
    for row in range(3):
        assert np.array_equal(cell(forward, row, [4], 0), ours.dataset.images[arrays["sources"][row], 0])
        assert np.array_equal(cell(reverse, row, [4], 3), samples[row, 0])
        noise = to_uint8(torch.from_numpy(arrays["forward"][:, 0]))
        assert np.array_equal(cell(forward, row, [4], 3), noise[row, 0])


def test_classes(tmp_path: Path) -> None:
    ours = context_of(tmp_path)
    png, npz = PICTURES["classes"](ours, OPTIONS)
    assert read(npz)["scales"].tolist() == [1, 2.5] and read(npz)["seeds"].tolist() == [0, 1, 2, 3]
    for label in range(3):
        for i, scale in enumerate((1.0, 2.5)):
            images = to_uint8(ours.sampler.guided(scale).sample(range(4), [label] * 4))
            for column in range(4):
                assert np.array_equal(cell(png, label, [4, 4], 4 * i + column), images[column, 0])


def test_classes_of_a_network_without_guidance(tmp_path: Path) -> None:
    ours = context_of(tmp_path, label_dropout=0.0)
    assert read(PICTURES["classes"](ours, OPTIONS)[1])["scales"].tolist() == [1]
    without = context_of(tmp_path, classes=0, label_dropout=0.0)
    for draw in (PICTURES["classes"], lambda *given: picture_cost("classes", *given)):
        with pytest.raises(UsageError, match="there is no grid of classes to draw"):
            draw(without, OPTIONS)


# All of them


@pytest.mark.parametrize("guidance", [1.0, 2.0, "in an interval"])
@pytest.mark.parametrize("name", PICTURE_NAMES)
def test_the_cost_is_what_the_network_is_asked(name: str, guidance: Any, tmp_path: Path) -> None:
    chosen = {"guidance": guidance} if guidance in (1, 2) else {"guidance": 2.0, "guidance_interval": (200, 600)}
    ours, asked = context_of(tmp_path, **chosen), []
    network: Any = ours.sampler.network
    inner = network.formula
    network.formula = lambda x, *rest: asked.append(len(x)) or inner(x, *rest)
    options = dataclasses.replace(OPTIONS, depths=(700, 300)) if name == "shared-latent" else OPTIONS
    PICTURES[name](ours, options)
    assert sum(asked) == picture_cost(name, ours, options)


@pytest.mark.parametrize("name", PICTURE_NAMES)
def test_another_batch_gives_the_same_files(name: str, tmp_path: Path) -> None:
    files = []
    for batch in (1, 64):
        out = tmp_path / str(batch)
        out.mkdir()
        paths = PICTURES[name](dataclasses.replace(context_of(out), batch=batch), OPTIONS)
        files.append({path.name: path.read_bytes() for path in paths if path.suffix != ".npz"})
        files[-1] |= {key: value.tobytes() for key, value in read(paths[-1]).items()}
    assert files[0] == files[1]


def test_every_name_has_a_picture() -> None:
    assert tuple(PICTURES) == PICTURE_NAMES


# What is asked for


def test_pairs_of_a_network_with_classes(tmp_path: Path) -> None:
    """Of one class where there are labels; else without a class, where the network can; else an error."""
    ours = context_of(tmp_path)
    indices, labels = pairs(ours.dataset, 5, ours.sampler)
    assert ours.dataset.labels is not None and labels is not None
    assert (ours.dataset.labels[indices] == np.array(labels)[:, None]).all()
    unlabelled = dataclasses.replace(ours.dataset, labels=None)
    assert pairs(unlabelled, 2, ours.sampler)[1] == [3, 3]
    assert pairs(unlabelled, 2, context_of(tmp_path, classes=0, label_dropout=0.0).sampler)[1] is None
    with pytest.raises(UsageError, match="needs the class of each image, and the data set has no labels"):
        pairs(unlabelled, 2, context_of(tmp_path, label_dropout=0.0).sampler)
    with pytest.raises(UsageError, match="the picture needs 32 images, the data set has 30"):
        pairs(unlabelled, 16, ours.sampler)
    with pytest.raises(UsageError, match=r"needs 16 pairs of images of one class, the data set has 1[345]"):
        pairs(ours.dataset, 16, ours.sampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, r"rows must be in 1\.\.10000; got 0"),
        ({"frames": 10001}, r"frames must be in 1\.\.10000; got 10001"),
        ({"lambdas": 1}, "lambdas must be 2 or more"),
        ({"first_seed": -1}, r"first_seed must be in 0\.\.4294967285; got -1"),
        ({"first_seed": 2**32 - 2}, "first_seed must be in"),
        ({"scales": ()}, "scales must hold at least one guidance scale; got none"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PictureOptions(**options)


def test_the_options_do_not_load_torch() -> None:
    program = "import sys, fastddpm.evaluation.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.gpu
def test_a_gpu_starts_and_rewinds_as_a_cpu_does(tmp_path: Path) -> None:
    """Captured steps, from a state in the middle, and again."""
    ours = context_of(tmp_path)
    state = torch.randn(3, 1, SIZE, SIZE)
    expected = ours.sampler.sample([1, 2, 3], start=StartState(state, 2))
    ours.sampler.network.cuda()
    for _ in range(2):
        np.testing.assert_allclose(
            ours.sampler.sample([1, 2, 3], start=StartState(state, 2)).cpu(), expected, rtol=0, atol=2e-4
        )
