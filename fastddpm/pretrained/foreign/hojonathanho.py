"""The paper's own checkpoints: TensorFlow, https://github.com/hojonathanho/diffusion."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .format import Format, paper_diffusion, paper_image_size
from .layouts import CONV_TF, LINEAR_TF, SHORTCUT_TF
from .mapping import Family, Place

AVERAGE = "/ExponentialMovingAverage"
ROOT = "model/"
STEPS = "global_step"
_NAMES = {"block": "block", "attention": "attn"}


def name(places: Sequence[Place]) -> list[str]:
    """Return their names of modules; their levels count from the full resolution in both paths."""
    named = []
    for place in places:
        if place.path == "mid":
            named.append(f"mid/{_NAMES[place.kind]}_{1 if place.kind == 'attention' else place.number + 1}")
        elif place.kind == "conv":
            named.append(f"{place.path}_{place.level}/{place.path}sample/conv")
        else:
            named.append(f"{place.path}_{place.level}/{_NAMES[place.kind]}_{place.number}")
    return named


def count(names: Sequence[str]) -> tuple[int, int]:
    """Return the number of levels and of blocks per level."""
    found = [match for each in names if (match := re.fullmatch(r"down_(\d{1,3})/block_(\d{1,3})/conv1/W", each))]
    return tuple(max((int(match[i]) for match in found), default=-1) + 1 for i in (1, 2))  # type: ignore[return-value]


FAMILY = Family(
    outer={
        "time1": "temb/dense0",
        "time2": "temb/dense1",
        "conv_in": "conv_in",
        "norm_out": "norm_out",
        "conv_out": "conv_out",
    },
    block={layer: layer for layer in ("norm1", "conv1", "temb_proj", "norm2", "conv2")} | {"shortcut": "nin_shortcut"},
    attention={"norm": "norm", "q": "q", "k": "k", "v": "v", "proj": "proj_out"},
    name=name,
    count=count,
    parameters={"layer": ("/W", "/b"), "norm": ("/gamma", "/beta")},
    separator="/",
    layouts={
        "time1": LINEAR_TF,
        "linear": LINEAR_TF,
        "projection": LINEAR_TF,
        "conv": CONV_TF,
        "shortcut": SHORTCUT_TF,
    },
    fixed={"groups": 32},
)

_PREDICTIONS = {"eps": "eps", "xstart": "x0", "xprev": "xprev"}
_LOSSES = {"mse": "simple", "noisepred": "simple", "kl": "vlb"}
# Their words in kwargs.json, and ours, with the values that have other names.
_KWARGS: dict[str, tuple[str, Mapping[str, str] | None]] = {
    "beta_schedule": ("schedule", None),
    "beta_start": ("beta_start", None),
    "beta_end": ("beta_end", None),
    "num_diffusion_timesteps": ("timesteps", None),
    "model_mean_type": ("prediction", _PREDICTIONS),
    "model_var_type": ("variance", None),
    "loss_type": ("loss", _LOSSES),
}


def of_kwargs(document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of UNetConfig and of DiffusionConfig that kwargs.json, beside a checkpoint, tells.

    run_lsun.py writes no mean and variance types; its are eps and fixedsmall.
    """
    process: dict[str, Any] = {"prediction": "eps", "variance": "fixedsmall"}
    for theirs, (ours, values) in _KWARGS.items():
        if theirs in document:
            value = document[theirs]
            process[ours] = value if values is None or not isinstance(value, str) else values.get(value, value)
    if process.get("loss") == "simple" and str(process["variance"]).startswith("learned"):
        process["loss"] = "vlb"
    unet = {"dropout": document["dropout"]} if "dropout" in document else {}
    return unet, process


FORMAT = Format(
    name="hojonathanho",
    repository="https://github.com/hojonathanho/diffusion",
    files="model.ckpt-N.index and .data-* (TensorFlow), with kwargs.json beside them if there is one",
    signature=("temb/dense0/W", "conv_in/W", "down_0/block_0/conv1/W"),
    family=lambda options: FAMILY,
    diffusion=paper_diffusion,
    sets={"average": AVERAGE, "raw": ""},
    image_size=paper_image_size,
)
