"""A classifier of noisy images, p(label | x_t), whose gradient guides a chain: Dhariwal and Nichol 2021, section 4."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.ops.noise import NoiseKey
from fastddpm.pretrained.run import check_weights
from fastddpm.runtime.checks import MAX_GUIDANCE
from fastddpm.runtime.network import checksum
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import from_stored
from fastddpm.unet import GroupNormSiLU, UNet

from .classifier_config import ClassifierConfig

DOCUMENT = "classifier"  # of a checkpoint: the configuration


class Classifier(nn.Module):
    """The down path and the middle of a U-Net, and logits of its pooled features: `classifier(x_t, t)`.

    The blocks are those of `UNet(config.unet)`; after the middle come GroupNorm and SiLU, the mean over all pixels and
    a linear layer, which begins at zero. x_t: float32 (N, C, H, W) of the configured size. t: int64 (N,) in 0..T-1.
    Returns logits of the classes, float32 (N, num_classes). In training mode dropout masks are a function of
    `noise_key`. Default: a key drawn from torch's default generator. Raises ValueError for other shapes and types.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = UNet(dataclasses.replace(config.unet, num_classes=0, label_dropout=0.0, learned_variance=False))
        channels = config.unet.level_channels[-1]
        for of_the_other_half in ("up", "norm_out", "conv_out"):
            delattr(self.trunk, of_the_other_half)
        self.norm_out = GroupNormSiLU(channels, config.unet.groups, config.unet.norm_eps)
        self.head = nn.Linear(channels, config.unet.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.trunk.image_shape

    @property
    def num_classes(self) -> int:
        """The number of classes that it tells apart."""
        return self.config.unet.num_classes

    def forward(self, x_t: Tensor, t: Tensor, noise_key: NoiseKey | None = None) -> Tensor:
        self.trunk.check(x_t, t, None)
        if self.training and self.config.unet.dropout > 0 and noise_key is None:
            noise_key = NoiseKey.draw(len(x_t), x_t.device)
        h, _ = self.trunk.descend(x_t, self.trunk.embed(t, None), noise_key)
        return self.head(self.norm_out(h).mean((2, 3))).float()

    def cond_fn(self, scale: float = 1.0) -> "ClassifierGuidance":
        """Return the `cond_fn` of a `Sampler`: `scale` times the gradient of log p(label | x_t).

        `scale`: 0 or more; 1 draws from the product of the model and the classifier. Raises `UsageError` for another.
        """
        return ClassifierGuidance(self, scale)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "Classifier":
        """Read a classifier that `python -m fastddpm.classifier` trained: its directory, or one of its checkpoints.

        Of a directory the newest checkpoint is read. The classifier is in evaluation mode, on `device` (default: the
        CPU). Raises `UsageError` if there is none at `path`, and `DataError` if a file is damaged.
        """
        saved = checkpoint.load(Path(path), parts={"model"})
        config = config_of(saved)
        with torch.device("meta"):
            classifier = cls(config)
        weights = saved.tensors["model"]
        check_weights(classifier.state_dict(), weights, saved.path, "the classifier of its configuration")
        classifier.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
        return classifier.to(device).requires_grad_(False).eval()


@dataclass(frozen=True, eq=False)
class ClassifierGuidance:
    """cond_fn(x, t, label) = `scale` times the gradient of log p(label | x_t) with respect to x_t.

    Raises `UsageError` without labels, and for a label that is not a class of the classifier.
    """

    classifier: Classifier
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= MAX_GUIDANCE:
            raise UsageError(f"the scale of a classifier must be in 0..{MAX_GUIDANCE:g}; got {self.scale}")

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        classes = self.classifier.num_classes
        if label is None:
            raise UsageError(f"a classifier guides to a label, 0..{classes - 1}; give one for each image")
        wrong = label[(label < 0) | (label >= classes)]
        if len(wrong):
            raise UsageError(
                f"the classifier knows the labels 0..{classes - 1}; got {int(wrong[0])}. For a chain that is guided by "
                "the classifier alone give the class, and take guidance 0 in place of the label that means none"
            )
        log_p = self.classifier(x, t).log_softmax(1).gather(1, label[:, None]).sum()
        return self.scale * torch.autograd.grad(log_p, x)[0]

    @property
    def num_classes(self) -> int:
        """The number of classes of the classifier."""
        return self.classifier.num_classes

    def settings(self) -> dict[str, Any]:
        """Return what determines the gradient, for JSON: the sha256 of the weights, and the scale."""
        return {"classifier": checksum(self.classifier), "classifier_scale": float(self.scale)}

    def check(self, diffusion: Diffusion, shape: tuple[int, int, int]) -> None:
        """Raise `UsageError` if a chain of `diffusion` on images of `shape`, (C, H, W), has another x_t."""
        if self.classifier.image_shape != tuple(shape):
            raise UsageError(
                f"the classifier is for images {self.classifier.image_shape}, and the model draws {tuple(shape)}; "
                "train one for this model"
            )
        ours, theirs = diffusion.alpha_bar, Diffusion(self.classifier.config.diffusion).alpha_bar
        if len(ours) != len(theirs) or not np.allclose(ours, theirs, rtol=1e-6, atol=0):
            own, other = self.classifier.config.diffusion, diffusion.config
            raise UsageError(
                f"the classifier knows the noise of schedule {own.schedule} with {own.timesteps} timesteps, and the "
                f"model has {other.schedule} with {other.timesteps}, or other betas; train one for this model"
            )


def config_of(saved: checkpoint.Checkpoint) -> ClassifierConfig:
    """Return the configuration of a classifier's checkpoint.

    Raises `UsageError` for the checkpoint of anything else, and `DataError` for a damaged configuration.
    """
    if DOCUMENT not in saved.documents:
        raise UsageError(f"{saved.path} is no classifier; train one with python -m fastddpm.classifier")
    config: ClassifierConfig = from_stored(ClassifierConfig, saved.documents[DOCUMENT], f"{saved.path / DOCUMENT}.json")
    return config
