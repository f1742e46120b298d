"""A classifier of noisy images: its logits and their gradient in float64, chains that it guides, and its files."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.classifiers import CLASSES, EASY, config, logits64, random_classifier, shades
from helpers.networks import TINY, Formula, random_model, tiny
from torch import Tensor

import fastddpm
from fastddpm.config import DiffusionConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, UsageError
from fastddpm.ops.backend import use_backend
from fastddpm.sampling.classifier import Classifier
from fastddpm.sampling.options import ChainOptions
from fastddpm.training.classifier import ClassifierTrainer

LABELS = torch.tensor([2, 0, 1])


def noisy() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 3, 12, 12), torch.tensor([0, 400, 999])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_and_gradient_are_those_of_plain_operators_in_float64(backend: str) -> None:
    classifier, (x, t) = random_classifier(), noisy()
    twice = x.double().requires_grad_()
    expected = logits64(classifier, twice, t)
    (slope,) = torch.autograd.grad(expected.log_softmax(1)[torch.arange(3), LABELS].sum(), twice)
    with use_backend(backend):
        logits = classifier(x, t)
        gradient = classifier.cond_fn(2.5)(x.clone().requires_grad_(), t, LABELS)
    assert logits.dtype == torch.float32 and expected.std() > 0.05 and slope.abs().max() > 0.005
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), 2.5 * slope, rtol=1e-3, atol=1e-5)


def test_the_gradient_is_the_difference_of_log_p() -> None:
    """Along one direction, from the float64 formula: (log p(x + h d) - log p(x - h d)) / 2h."""
    classifier, (x, t) = random_classifier(), noisy()
    direction = torch.randn(x.shape, dtype=torch.float64)

    def log_p(shift: float) -> Tensor:
        return logits64(classifier, x.double() + shift * direction, t).log_softmax(1)[torch.arange(3), LABELS]

    expected = (log_p(1e-4) - log_p(-1e-4)) / 2e-4
    gradient = classifier.cond_fn()(x.clone().requires_grad_(), t, LABELS)
    torch.testing.assert_close((gradient.double() * direction).sum((1, 2, 3)), expected, rtol=1e-3, atol=1e-5)


def test_a_new_classifier_knows_nothing() -> None:
    classifier, (x, t) = Classifier(config(tiny(num_classes=CLASSES))), noisy()
    assert torch.equal(classifier(x, t), torch.zeros(3, CLASSES))
    whole = sum(p.numel() for p in fastddpm.UNet(TINY).parameters())
    assert sum(p.numel() for p in classifier.parameters()) < 0.6 * whole


# Chains


def eps(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    return 0.9 * x if label is None else 0.9 * x + 0.02 * label.reshape(-1, 1, 1, 1)


def network(**options: Any) -> Formula:
    return Formula(eps, image_size=12, image_channels=3, **options)


def test_a_chain_follows_the_gradient_of_the_classifier() -> None:
    """The same as a cond_fn written with the float64 formula; without labels the seeds name the classes."""
    classifier = random_classifier()

    def own(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        twice = x.detach().double().requires_grad_()
        log_p = logits64(classifier, twice, t).log_softmax(1).gather(1, label[:, None]).sum()
        return (40 * torch.autograd.grad(log_p, twice)[0]).float()

    guided = fastddpm.Sampler(network(), Diffusion(), 4, "ddim", cond_fn=classifier.cond_fn(40))
    written = fastddpm.Sampler(network(), Diffusion(), 4, "ddim", cond_fn=own)
    images = guided.sample([4, 5])
    torch.testing.assert_close(images, written.sample([4, 5], [1, 2]), rtol=0, atol=2e-4)
    assert (images - fastddpm.Sampler(network(), Diffusion(), 4, "ddim").sample([4, 5])).abs().max() > 0.05


def test_guidance_0_is_by_the_classifier_alone() -> None:
    """The network sees its null label, the classifier the class."""
    labelled = network(num_classes=CLASSES, label_dropout=0.1)
    unlabelled = Formula(lambda x, t, label: eps(x, t, torch.full((len(x),), CLASSES)), image_size=12, image_channels=3)
    cond_fn = random_classifier().cond_fn(30)
    ours, expected = (
        fastddpm.Sampler(each, Diffusion(), 4, guidance=scale, cond_fn=cond_fn)
        for each, scale in ((labelled, 0.0), (unlabelled, 1.0))
    )
    torch.testing.assert_close(ours.sample([7], [2]), expected.sample([7], [2]), rtol=0, atol=1e-5)


def test_settings_tell_the_weights_and_the_scale() -> None:
    one, other = random_classifier(), random_classifier()
    with torch.no_grad():
        other.head.bias[0] += 1
    said = [
        fastddpm.Sampler(network(), Diffusion(), 4, cond_fn=each).settings()
        for each in (one.cond_fn(2), one.cond_fn(3), other.cond_fn(2), random_classifier().cond_fn(2))
    ]
    assert said[0]["classifier_scale"] == 2.0 and said[0] == said[3] != said[1]
    assert said[0]["classifier"] != said[2]["classifier"] and "cond_fn" not in said[0]


# Files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("classifier")
    ClassifierTrainer(config(), shades(), torch.device("cpu")).save(run, None)
    return run


def test_a_file_gives_the_same_classifier(saved: Path) -> None:
    again, expected = Classifier.from_pretrained(saved), ClassifierTrainer(config(), shades(), torch.device("cpu"))
    assert again.config == config() and not again.training and not any(p.requires_grad for p in again.parameters())
    for name, tensor in expected.classifier.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    model = random_model(EASY)
    sampler = ChainOptions(steps=2, classifier=saved, classifier_scale=3.0).sampler(model)
    assert sampler.settings()["classifier_scale"] == 3.0 and sampler.sample([1]).shape == (1, 1, 6, 6)


def test_files_of_the_other_kind_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a classifier, which draws no images; name it with --classifier"):
        fastddpm.load(saved)
    fastddpm.Trainer(random_model(EASY).preset, shades(128), torch.device("cpu")).save(tmp_path, None)
    with pytest.raises(UsageError, match=r"is no classifier; train one with python -m fastddpm\.classifier"):
        Classifier.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        Classifier.from_pretrained(tmp_path / "nothing")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = ClassifierTrainer(config(), shades(), torch.device("cpu")).save(tmp_path, None)
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        Classifier.from_pretrained(tmp_path)


# Mistakes


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, r"guides to a label, 0\.\.2; give one for each image"),
        (torch.tensor([0, 3, 0]), r"knows the labels 0\.\.2; got 3"),
        (torch.tensor([-1, 0, 0]), r"knows the labels 0\.\.2; got -1"),
    ],
)
def test_labels_that_it_does_not_know(label: Tensor | None, message: str) -> None:
    x, t = noisy()
    with pytest.raises(UsageError, match=message):
        random_classifier().cond_fn()(x.requires_grad_(), t, label)


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_impossible_scales(scale: float) -> None:
    with pytest.raises(UsageError, match=r"scale of a classifier must be in 0\.\.1e\+06"):
        random_classifier().cond_fn(scale)
    with pytest.raises(UsageError, match=r"classifier_scale must be in 0\.\.1e\+06"):
        ChainOptions(classifier=Path("some"), classifier_scale=scale)


def test_a_scale_without_a_classifier() -> None:
    with pytest.raises(UsageError, match="classifier_scale is of a classifier; name one with --classifier"):
        ChainOptions(classifier_scale=2.0)


@pytest.mark.parametrize(
    ("process", "size", "message"),
    [
        (
            {"schedule": "cosine"},
            12,
            "knows the noise of schedule linear with 1000 timesteps, and the model has cosine",
        ),
        ({"timesteps": 500}, 12, "with 1000 timesteps, and the model has linear with 500"),
        ({"beta_end": 0.021}, 12, "or other betas"),
        ({}, 6, r"is for images \(3, 12, 12\), and the model draws \(3, 6, 6\)"),
    ],
)
def test_another_process_or_size_is_refused(process: dict[str, Any], size: int, message: str) -> None:
    model = Formula(eps, image_size=size, image_channels=3)
    with pytest.raises(UsageError, match=message):
        fastddpm.Sampler(model, Diffusion(DiffusionConfig(**process)), 4, cond_fn=random_classifier().cond_fn())


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x_t must be \(N, 3, 12, 12\); got \(1, 3, 6, 6\)"):
        random_classifier()(torch.zeros(1, 3, 6, 6), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UsageError, match="tells two or more classes apart; num_classes is 1"):
        config(tiny(num_classes=1))
    assert np.isfinite(random_classifier()(*noisy()).numpy()).all()
