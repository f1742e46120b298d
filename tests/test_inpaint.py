"""Inpainting against the same walk in NumPy, against a Gaussian's known conditionals, and as a command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from networks import Formula
from PIL import Image
from torch import Tensor

from fastddpm import inpaint as command
from fastddpm import train
from fastddpm.config import DiffusionConfig
from fastddpm.data.decode import Rule
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, UsageError
from fastddpm.evaluation.inpainting import cost, inpaint, walk
from fastddpm.evaluation.inputs import read_hole, read_images
from fastddpm.figures import to_uint8
from fastddpm.sampler import Sampler

SHAPE = (1, 2, 2)
SEED = 5
LEFT = np.array([[True, False], [True, False]])


def wave(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """An x_0 prediction that depends on both and stays inside [-1, 1], so that every level shows a difference."""
    return 0.9 * torch.sin(2 * x_t + 0.01 * t)


def sampler(formula: Any = wave, steps: int = 6, **options: Any) -> Sampler:
    network = {name: options.pop(name) for name in ("num_classes", "label_dropout") if name in options}
    diffusion = Diffusion(DiffusionConfig(prediction="x0"))
    return Sampler(Formula(formula, **network), diffusion, steps, **({"seed": SEED} | options))


def some_images(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *SHAPE), dtype=np.uint8)


# The walk


@pytest.mark.parametrize(
    ("given", "order"),
    [
        ((4, 10, 10), [0, 1, 2, 3]),  # no stretch is so long
        ((4, 1, 1), [0, 1, 2, 3]),
        ((4, 1, 3), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
        ((5, 2, 2), [0, 1, 0, 1, 2, 3, 2, 3, 4]),
        ((8, 3, 2), [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]),
        ((1, 1, 5), [0]),
    ],
)
def test_walk(given: tuple[int, int, int], order: list[int]) -> None:
    assert walk(*given) == order


def test_the_length_of_the_published_walk() -> None:
    """That of 250 timesteps and jumps of 10: 24 stretches are taken 10 times, the 9 steps before them once."""
    order = walk(250, 10, 10)
    assert len(order) == 24 * 10 * 10 + 9 + 1 and np.bincount(order).tolist() == [1] * 9 + [10] * 240 + [1]


@pytest.mark.parametrize(("jump_length", "resamplings"), [(0, 1), (1, 0), (-1, 2)])
def test_walks_that_cannot_be_are_refused(jump_length: int, resamplings: int) -> None:
    with pytest.raises(UsageError, match="jump length and resamplings must be positive"):
        walk(10, jump_length, resamplings)


# Against NumPy


def repainted(
    images: np.ndarray,
    known: np.ndarray,
    order: list[int],
    timesteps: np.ndarray,
    numbers: list[int],
    eta: float | None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The algorithm of Lugmayr et al. 2022 in float64: (x_0 prediction, state) after every step of `order`."""
    process, last = oracle.Process.respaced(timesteps), len(timesteps) - 1
    bar, x0_known, found, times = process.alpha_bar, images / 127.5 - 1, [], 0

    def noise(step: int, stream: int) -> np.ndarray:
        return oracle.normals(SHAPE, np.array(numbers), SEED, step, stream)

    x = noise(0, 0)
    for place, i in enumerate(order):
        t = int(timesteps[i])
        x0 = 0.9 * np.sin(2 * x + 0.01 * t)
        if eta is None:
            x, sigma = process.posterior_mean(np.full(len(x), i), x0, x), np.sqrt(process.beta[i])
        else:
            sigma = eta * np.sqrt(process.posterior_variance[i])
            prev = process.alpha_bar_prev[i]
            eps = (x - np.sqrt(bar[i]) * x0) / np.sqrt(1 - bar[i])
            x = np.sqrt(prev) * x0 + np.sqrt(1 - prev - sigma**2) * eps
        if i == last:
            x = np.where(known, x0_known, x)
        else:
            s = int(timesteps[i + 1])
            x_known = np.sqrt(bar[i + 1]) * x0_known + np.sqrt(1 - bar[i + 1]) * noise(s + 1000 * times, 2)
            x = np.where(known, x_known, x + sigma * noise(t + 1000 * times, 1))
        if place + 1 < len(order) and order[place + 1] != i + 1:
            times += 1
            ratio = bar[order[place + 1]] / bar[i + 1]
            x = np.sqrt(ratio) * x + np.sqrt(1 - ratio) * noise(times, 6)
        found.append((x0, x))
    return found


@pytest.mark.parametrize("eta", [None, 0.5])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_the_published_algorithm(batch: int, eta: float | None) -> None:
    ours = sampler() if eta is None else sampler(method="ddim", eta=eta)
    images = some_images(3)
    found = inpaint(ours, images, LEFT, [3, 1, 8], jump_length=2, resamplings=3, frames=3, batch=batch)
    order = [0, 1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4, 5]
    expected = repainted(images, LEFT, order, ours.timesteps, [3, 1, 8], eta)
    assert np.abs(found.images - (expected[-1][1].clip(-1, 1) + 1) * 127.5).max() < 0.53
    assert found.x0.shape == (3, 3, *SHAPE)
    for k, place in enumerate((0, 6, 13)):
        x0 = np.where(LEFT, images / 127.5 - 1, expected[place][0])
        assert np.abs(found.x0[:, k] - (x0 + 1) * 127.5).max() < 0.53
    assert found.images[..., 1].std() > 30


# Properties


def test_known_pixels_are_the_given_ones() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(64, *SHAPE)
    rng = np.random.default_rng(0)
    known = rng.random((64, 2, 2)) < 0.5
    found = inpaint(sampler(), images, known, range(64), jump_length=1, resamplings=2, frames=2).images
    assert np.array_equal(found[known[:, None]], images[known[:, None]])
    assert (found[~known[:, None]] != images[~known[:, None]]).mean() > 0.9


def test_where_nothing_is_known_it_is_sampling_and_where_all_is_known_nothing_is_drawn() -> None:
    """Bit for bit, with every option, beside images of which a part is known."""
    ours, asked = sampler(), []
    images = some_images(3)
    known = np.stack([np.zeros((2, 2), bool), LEFT, np.ones((2, 2), bool)])
    found = inpaint(ours, images, known, [4, 5, 6], jump_length=2, resamplings=3)
    assert np.array_equal(found.images[:1], to_uint8(ours.sample([4])))
    assert np.array_equal(found.images[2], images[2])
    alone = inpaint(ours, images[1:2], LEFT, [5], jump_length=2, resamplings=3).images
    assert np.array_equal(found.images[1:2], alone)
    nothing = sampler(lambda x, t, label: asked.append(0) or x)
    given = inpaint(nothing, images, np.ones((2, 2), bool), [4, 5, 6], frames=2)
    assert np.array_equal(given.images, images) and not asked
    assert np.array_equal(given.x0, np.stack([images, images], axis=1))


def test_completions_differ_by_seed_and_resampling_but_not_by_batch() -> None:
    ours, images = sampler(), np.repeat(some_images(1), 9, axis=0)
    together = inpaint(ours, images, LEFT, range(9), jump_length=2).images
    apart = [inpaint(ours, images[:1], LEFT, [seed], jump_length=2).images[0] for seed in range(9)]
    assert np.array_equal(together, np.stack(apart))
    assert len({image.tobytes() for image in together}) > 4
    assert not np.array_equal(together, inpaint(ours, images, LEFT, range(9), resamplings=1).images)


def test_labels_and_guidance_reach_the_network() -> None:
    def by_label(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        return 0.3 * torch.sin(x) + 0.1 * label.reshape(-1, 1, 1, 1)

    classes: dict[str, Any] = {"num_classes": 3, "label_dropout": 0.1, "guidance": 2.5}
    ours = sampler(by_label, **classes)
    found = inpaint(ours, some_images(3), LEFT, [1, 2, 3], [0, 2, 3], jump_length=2, resamplings=2, batch=2).images
    for n, label in enumerate((0, 2, 3)):
        guided = 3 + 2.5 * (label - 3)
        fixed = sampler(lambda x, t, _, guided=guided: 0.3 * torch.sin(x) + 0.1 * guided)
        alone = inpaint(fixed, some_images(3)[n : n + 1], LEFT, [n + 1], jump_length=2, resamplings=2).images
        assert np.abs(found[n].astype(int) - alone[0]).max() <= 1
    assert np.array_equal(
        inpaint(ours, some_images(3), LEFT, [1, 2, 3]).images,
        inpaint(ours, some_images(3), LEFT, [1, 2, 3], [1, 2, 0]).images,
    )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_cost_is_what_the_network_is_asked(guidance: float) -> None:
    asked: list[int] = []
    told: list[int] = []
    ours = sampler(lambda x, t, label: asked.append(len(x)) or x, num_classes=3, label_dropout=0.1, guidance=guidance)
    known = np.stack([np.zeros((2, 2), bool), LEFT, LEFT, np.ones((2, 2), bool)])
    inpaint(ours, some_images(4), known, range(4), jump_length=2, resamplings=3, batch=1, progress=told.append)
    assert sum(asked) == sum(told) == cost(ours, known, 4, 2, 3) == (6 + 2 * 14) * (1 if guidance == 1 else 2)
    assert cost(ours, LEFT, 5, 2, 3) == 5 * 14 * (1 if guidance == 1 else 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": some_images(2)},
            r"images must be uint8 \(3, 1, 2, 2\), one for each seed; got uint8 \(2, 1, 2, 2\)",
        ),
        ({"images": some_images(3) / 255}, "got float64"),
        (
            {"known": LEFT.astype(int)},
            r"known must be bool \(2, 2\) or \(3, 2, 2\), True where a pixel is given; got int64",
        ),
        ({"known": np.ones((2, 2, 2), bool)}, r"got bool \(2, 2, 2\)"),
        ({"labels": [0, 0, 0]}, "trained without classes"),
        ({"seeds": [1, 2, -1]}, r"image seeds must be in 0\.\.4294967295; got -1"),
        ({"batch": 0}, "batch must be positive; got 0"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    given = {"images": some_images(3), "known": LEFT, "seeds": [1, 2, 3]} | change
    with pytest.raises(UsageError, match=message):
        inpaint(sampler(), **given)


# A Gaussian

MEAN = np.array([0.1, -0.1, 0.05, 0.0])
COVARIANCE = 0.04 * np.array([[1, 0.8, 0.5, 0.3], [0.8, 1, 0.4, 0.2], [0.5, 0.4, 1, 0.6], [0.3, 0.2, 0.6, 1]])
UNKNOWN, KNOWN = [0, 3], [1, 2]


def gaussian_sampler(variance: str) -> Sampler:
    """100 steps with E[x_0 | x_t] of N(MEAN, COVARIANCE), exactly."""
    diffusion = Diffusion(DiffusionConfig(prediction="x0", variance=variance, clip_x0=False))  # type: ignore[arg-type]
    bar = np.cumprod(1 - oracle.betas("linear", 1000))[:, None, None]
    gain = torch.tensor(np.sqrt(bar) * COVARIANCE @ np.linalg.inv(bar * COVARIANCE + (1 - bar) * np.eye(4)))
    scale, mean = torch.tensor(np.sqrt(bar[:, 0])), torch.tensor(MEAN)

    def exact(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        k = int(t[0])
        return (mean + (x.reshape(-1, 4).double() - scale[k] * mean) @ gain[k].T).float().reshape(x.shape)

    return Sampler(Formula(exact), diffusion, 100)


@pytest.fixture(scope="module")
def given_pixels() -> np.ndarray:
    """Two known pixels about two deviations off their means; the others say nothing."""
    return np.array([0, 191, 89, 0], np.uint8).reshape(1, *SHAPE)


def unknown_pixels(given: np.ndarray, variance: str, resamplings: int, num: int = 1000) -> np.ndarray:
    known = np.array([[False, True], [True, False]])
    found = inpaint(
        gaussian_sampler(variance), given.repeat(num, 0), known, range(num),
        jump_length=1, resamplings=resamplings, batch=num,
    )  # fmt: skip
    return found.images.reshape(num, 4)[:, UNKNOWN] / 127.5 - 1


def test_resampling_brings_the_conditional_mean_and_variance(given_pixels: np.ndarray) -> None:
    """Of a Gaussian: m_u + S_uk S_kk^-1 (x_k - m_k), and S_uu - S_uk S_kk^-1 S_ku.

    Standard errors are 0.004 and 0.005. Replacing alone gets 0.15 and 0.14 off the means of 0.45 and -0.25, ten times
    through each step 0.03 and 0.04; not conditioned at all it would be 0.35 and 0.25. The deviations of the chain,
    fixedsmall and fixedlarge, are a lower and an upper bound (section 3.2 of the paper), and so are the variances.
    """
    gain = COVARIANCE[np.ix_(UNKNOWN, KNOWN)] @ np.linalg.inv(COVARIANCE[np.ix_(KNOWN, KNOWN)])
    mean = MEAN[UNKNOWN] + gain @ (given_pixels.reshape(4)[KNOWN] / 127.5 - 1 - MEAN[KNOWN])
    variance = np.diag(COVARIANCE[np.ix_(UNKNOWN, UNKNOWN)] - gain @ COVARIANCE[np.ix_(KNOWN, UNKNOWN)])
    assert np.abs(MEAN[UNKNOWN] - mean).min() > 0.2 and (variance < 0.65 * 0.04).all()

    found = {times: unknown_pixels(given_pixels, "fixedsmall", times) for times in (1, 3, 10)}
    errors = {times: np.abs(pixels.mean(0) - mean) for times, pixels in found.items()}
    assert (errors[1] < 0.17).all() and (errors[3] < 0.7 * errors[1]).all() and (errors[10] < 0.06).all()
    assert (errors[10] < 0.35 * errors[1]).all()
    large = unknown_pixels(given_pixels, "fixedlarge", 10).var(0)
    assert (found[10].var(0) < variance).all() and (variance < large).all() and (large < 1.2 * variance).all()


# Files


def test_holes_by_name() -> None:
    rule = Rule(4, 1)
    columns, rows = np.meshgrid(np.arange(4), np.arange(4))
    for name, hole in {
        "left-half": columns < 2,
        "right-half": columns >= 2,
        "top-half": rows < 2,
        "bottom-half": rows >= 2,
        "center": (abs(columns - 1.5) < 1) & (abs(rows - 1.5) < 1),
        "every-other-row": rows % 2 == 0,
    }.items():
        assert np.array_equal(read_hole(name, rule), hole), name


def test_white_is_drawn(tmp_path: Path) -> None:
    levels = np.array([[0, 127], [128, 255]], np.uint8)
    Image.fromarray(levels).save(tmp_path / "mask.png")
    assert read_hole(str(tmp_path / "mask.png"), Rule(2, 3)).tolist() == [[False, False], [True, True]]
    with pytest.raises(DataError, match=r"mask\.png: 2x2, expected 4x4; --resize area"):
        read_hole(str(tmp_path / "mask.png"), Rule(4, 3))
    assert read_hole(str(tmp_path / "mask.png"), Rule(4, 3, "area")).tolist() == [[False] * 4] * 2 + [[True] * 4] * 2
    with pytest.raises(UsageError, match=r"--mask takes left-half, .*, or an image file; got 'middle'"):
        read_hole("middle", Rule(4, 3))


def test_images_from_wherever_they_lie(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 5), dtype=np.uint8)
    for i, image in enumerate(images):
        (tmp_path / f"{i}").mkdir()
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{i}" / "x.png")
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([4, 2]))
    np.savez(tmp_path / "b.npz", images=images)
    rule = Rule(5, 3)
    one, labels = read_images(str(tmp_path / "1" / "x.png"), rule)
    assert np.array_equal(one[:], images[1:]) and labels is None
    found, labels = read_images(str(tmp_path / "a.npz"), rule)
    assert np.array_equal(found[:], images) and labels is not None and labels.tolist() == [4, 2]
    assert read_images(str(tmp_path / "b.npz"), rule)[1] is None
    digits, labels = read_images("digits", Rule(16, 1))
    assert digits.shape == (5000, 1, 16, 16) and labels is not None and set(labels.tolist()) == set(range(10))


def test_files_that_hold_no_images(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"no archive")
    (tmp_path / "a.png").write_bytes(b"no image")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 3, 4, 4), np.uint8))
    np.savez(tmp_path / "c.npz", pictures=np.zeros((2, 3, 5, 5), np.uint8))
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 3, 5, 5), np.uint8), labels=np.zeros(3, int))
    for name, message in {
        "a.npz": r"a\.npz holds no images that can be read",
        "a.png": r"a\.png: not an image of a known format",
        "b.npz": r"b\.npz must hold images uint8 \(N, 3, 5, 5\); got uint8 \(2, 3, 4, 4\)",
        "c.npz": r"c\.npz holds no images that can be read",
        "d.npz": r"d\.npz holds 2 images and labels \(3,\)",
    }.items():
        with pytest.raises(DataError, match=message):
            read_images(str(tmp_path / name), Rule(5, 3))
    with pytest.raises(UsageError, match="nowhere"):
        read_images("nowhere", Rule(5, 3))


# The command

TINY = [
    "--width", "8", "--groups", "4", "--multipliers", "1", "2", "--blocks", "1", "--timesteps", "20", "--batch", "8",
    "--steps", "1", "--sample.steps", "5", "--sample.count", "0", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    train.main([*TINY, "--out", str(out)])
    return out


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--pick", "3,700", "--seeds", "5-7", "--mask", "top-half", "--jump-length", "2", "--resamplings", "2"]
    command.main([str(run), *given, "--frames", "4", "--device", "cpu", "--batch", "4", "--out", str(tmp_path / "one")])
    printed = capsys.readouterr()
    assert printed.out.split() == [
        str(tmp_path / "one" / name) for name in ("inpainted.png", "inpainted.npz", "inpainted.gif")
    ]
    assert "2 images, 3 completions of each, 5 steps, 108 evaluations of the network" in printed.err  # guidance is 2
    with np.load(tmp_path / "one" / "inpainted.npz", allow_pickle=False) as file:
        arrays = dict(file)
    digits, labels = read_images("digits", Rule(16, 1))
    assert labels is not None and arrays["labels"].tolist() == labels[[3, 700]].tolist()
    assert np.array_equal(arrays["given"], digits[[3, 700]]) and arrays["seeds"].tolist() == [5, 6, 7]
    assert arrays["images"].shape == (2, 3, 1, 16, 16) and arrays["known"].sum() == 128
    assert np.array_equal(arrays["images"][:, :, :, 8:], arrays["given"][:, None, :, 8:].repeat(3, 1))
    drawn = arrays["images"][:, :, :, :8]
    assert all(len({image.tobytes() for image in of_one}) == 3 for of_one in drawn)
    with Image.open(tmp_path / "one" / "inpainted.png") as png, Image.open(tmp_path / "one" / "inpainted.gif") as gif:
        assert gif.n_frames == 4 and png.width > png.height
        picture = np.asarray(png)
    scale = 640 // (4 * 16)
    pitch = 16 * scale + 2
    for row in range(2):
        top = picture.shape[0] - (2 - row) * pitch + 2
        for k in range(3):
            left = picture.shape[1] - (3 - k) * pitch + 2
            shown = picture[top : top + 16 * scale : scale, left : left + 16 * scale : scale]
            assert np.array_equal(shown, arrays["images"][row, k, 0])
        known = picture[top : top + 16 * scale : scale, : 16 * scale : scale]
        assert (known[:8] == 128).all() and np.array_equal(known[8:], arrays["given"][row, 0, 8:])

    command.main([str(run), *given, "--frames", "0", "--device", "cpu", "--batch", "1", "--out", str(tmp_path / "two")])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["inpainted.npz", "inpainted.png"]
    assert (tmp_path / "two" / "inpainted.png").read_bytes() == (tmp_path / "one" / "inpainted.png").read_bytes()


def test_images_without_labels_are_completed_without_a_class(run: Path, tmp_path: Path) -> None:
    images = read_images("digits", Rule(16, 1))[0][:3]
    np.savez(tmp_path / "images.npz", images=images)
    command.main([
        str(run), "--images", str(tmp_path / "images.npz"), "--seeds", "1", "--resamplings", "1", "--frames", "0",
        "--device", "cpu", "--out", str(tmp_path),
    ])  # fmt: skip
    with np.load(tmp_path / "inpainted.npz", allow_pickle=False) as arrays:
        assert arrays["labels"].tolist() == [10, 10, 10] and np.array_equal(arrays["given"], images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pick", "5000"], r"--pick: there are images 0\.\.4999; got 5000"),
        (["--labels", "1,2"], "--labels gives 2 classes for 8 images; give one for each, or for all"),
        (["--labels", "12"], r"labels must be in 0\.\.9; got 12"),
        (["--mask", "half"], "--mask takes left-half"),
        (["--resamplings", "0"], "jump length and resamplings must be positive; got 10 and 0"),
        (["--guidance", "2", "--seeds", "x"], "--seeds takes numbers and ranges"),
        (["--batch", "0"], "--batch must be positive; got 0"),
        (["--frames", "-1"], "--frames must be 0 or more; got -1"),
    ],
)
def test_mistakes(run: Path, arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        command.main([str(run), *arguments, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_help_and_mistakes_answer_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys, json, fastddpm.inpaint as i\nfrom fastddpm.errors import UsageError\n"
        "try:\n    i.main(sys.argv[1:])\nexcept (SystemExit, UsageError) as e:\n    code = getattr(e, 'code', 2) or 0\n"
        "print(json.dumps([code, 'torch' in sys.modules]))"
    )
    for arguments, code in ((["--help"], 0), (["x", "--sede", "1"], 2), (["nowhere"], 2)):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert json.loads(done.stdout.splitlines()[-1]) == [code, False], done.stderr
