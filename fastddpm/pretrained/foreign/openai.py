"""OpenAI's checkpoints: https://github.com/openai/improved-diffusion and https://github.com/openai/guided-diffusion.

Both name their tensors alike. What they do not tell: the number of heads, and for guided-diffusion in which order the
joint layer holds queries, keys and values. The tables have the flags that the two READMEs give for each file.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .format import Format, Published
from .layouts import COSINES_FIRST, PIXEL_1D, joined
from .mapping import Family, Place

_UP = r"output_blocks\.\d{1,3}\.[12]\."


def name(places: Sequence[Place]) -> list[str]:
    """Return their names of modules: a list per path, whose items hold a block, its attention, and the upsampling."""
    attends = {(place.path, place.level) for place in places if place.kind == "attention"}
    named, numbers = [], {"down": 0, "up": -1}  # item 0 of the first list is the first convolution
    for place in places:
        if place.path == "mid":
            named.append(f"middle_block.{1 if place.kind == 'attention' else 2 * place.number}")
            continue
        child = int(place.kind == "attention")
        if place.path == "up" and place.resamples:
            child = 1 + ((place.path, place.level) in attends)
        elif place.kind != "attention":
            numbers[place.path] += 1
        item = f"{'input' if place.path == 'down' else 'output'}_blocks.{numbers[place.path]}.{child}"
        named.append(item + ("" if place.kind != "conv" else ".op" if place.path == "down" else ".conv"))
    return named


def count(names: Sequence[str]) -> tuple[int, int]:
    """Return the number of levels and of blocks per level."""
    levels = 1 + sum(bool(re.fullmatch(_UP + r"(conv|in_layers\.0)\.weight", each)) for each in names)
    blocks = sum(bool(re.fullmatch(r"output_blocks\.\d{1,3}\.0\.in_layers\.0\.weight", each)) for each in names)
    return levels, blocks // levels - 1


def tells(names: Sequence[str]) -> dict[str, Any]:
    """Return how the network resamples: by convolutions or residual blocks."""
    blocks = any(re.fullmatch(_UP + r"in_layers\.0\.weight", each) for each in names)
    return {"resample": "resblock" if blocks else "conv"}


def family(options: Mapping[str, Any]) -> Family:
    """Return the table, for the order of queries, keys and values that `options` tells."""
    by_head = not options.get("new_attention_order", False)
    return Family(
        outer={
            "time1": "time_embed.0",
            "time2": "time_embed.2",
            "label": "label_emb",
            "conv_in": "input_blocks.0.0",
            "norm_out": "out.0",
            "conv_out": "out.2",
        },
        block={
            "norm1": "in_layers.0",
            "conv1": "in_layers.2",
            "temb_proj": "emb_layers.1",
            "norm2": "out_layers.0",
            "conv2": "out_layers.3",
            "shortcut": "skip_connection",
        },
        attention={"norm": "norm", "qkv": "qkv", "proj": "proj_out"},
        name=name,
        count=count,
        tells=tells,
        layouts={"projection": PIXEL_1D, "time1": COSINES_FIRST},
        qkv=lambda heads: joined(heads, by_head=by_head, dimensions=1),
        fixed={"groups": 32, "norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 0},
    )


def diffusion(unet: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the process of their default flags. Their linear schedule's ends are scaled by 1000 / T."""
    timesteps = given.get("timesteps", 1000)
    scale = 1000 / timesteps if isinstance(timesteps, int) and timesteps > 0 else 1.0
    process: dict[str, Any] = {"beta_start": min(scale * 1e-4, 0.5), "beta_end": min(scale * 0.02, 0.999)}
    learned = unet.get("learned_variance")
    process |= {"variance": "learned_range", "loss": "hybrid"} if learned else {"variance": "fixedlarge"}
    text = f"their default flags: T = {timesteps}, {given.get('schedule', 'linear')}, eps, {process['variance']}"
    return process, text


_SIZES: dict[int, tuple[int, ...]] = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}
_LINEAR: dict[str, Any] = {"variance": "learned_range", "loss": "hybrid"}
_COSINE: dict[str, Any] = _LINEAR | {"schedule": "cosine"}
_COSINE_4000: dict[str, Any] = _COSINE | {"timesteps": 4000}
_UPSAMPLER = "it is an upsampling model, whose network also takes a smaller image, which fastddpm does not have"
_CLASSIFIER = "it is a classifier of noisy images, not a diffusion model"


def _unet(size: int, width: int, blocks: int, **other: Any) -> dict[str, Any]:
    return dict(image_size=size, width=width, multipliers=_SIZES[size], blocks=blocks, **other)


def _improved(size: int, width: int, **other: Any) -> dict[str, Any]:
    return _unet(size, width, 3, attention_resolutions=(16, 8), heads=4, **other)


_IMPROVED_LSUN = Published(
    _unet(256, 128, 2, attention_resolutions=(16,), heads=1), _LINEAR, {"rescale_timesteps": False}
)
_VLB = _COSINE_4000 | {"loss": "vlb"}
_IMPROVED = {
    "imagenet64_uncond_100M_1500K": Published(_improved(64, 128), _COSINE_4000),
    "cifar10_uncond_50M_500K": Published(_improved(32, 128, dropout=0.3), _COSINE_4000),
    "imagenet64_cond_270M_250K": Published(
        _improved(64, 192, num_classes=1000), _COSINE_4000, {"rescale_timesteps": False}
    ),
    "lsun_uncond_100M_1200K_bs128": _IMPROVED_LSUN,
    "lsun_uncond_100M_2400K_bs64": _IMPROVED_LSUN,
    "imagenet64_uncond_vlb_100M_1500K": Published(_improved(64, 128), _VLB),
    "cifar10_uncond_vlb_50M_500K": Published(_improved(32, 128, dropout=0.3), _VLB),
}


def _guided(size: int, width: int, blocks: int = 2, **other: Any) -> dict[str, Any]:
    heads = {} if "heads" in other else {"head_channels": 64}
    return _unet(size, width, blocks, attention_resolutions=(32, 16, 8), resample="resblock", **heads, **other)


_LSUN = Published(_guided(256, 256, dropout=0.1), _LINEAR)
_GUIDED = {
    "64x64_diffusion": Published(
        _guided(64, 192, 3, num_classes=1000, dropout=0.1), _COSINE, {"new_attention_order": True}
    ),
    "128x128_diffusion": Published(_guided(128, 256, num_classes=1000, heads=4), _LINEAR),
    "256x256_diffusion": Published(_guided(256, 256, num_classes=1000), _LINEAR),
    "256x256_diffusion_uncond": Published(_guided(256, 256), _LINEAR),
    # The first level has half the width, which no multiplier expresses.
    "512x512_diffusion": Published(
        _guided(256, 256, num_classes=1000)
        | {"image_size": 512, "multipliers": (), "channels": (128, 256, 256, 512, 512, 1024, 1024)},
        _LINEAR,
    ),
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": Published(_guided(256, 256), _LINEAR),
}
_SIGNATURE = ("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight")
_NEEDED = {
    "image_size": "height and width of the images",
    "heads|head_channels": "the attention heads, or the channels of each",
}


def refuses(fields: Mapping[str, Any]) -> str | None:
    """Return why a network is refused: an upsampling model's takes the channels of two images, and gives 6 as well."""
    return _UPSAMPLER if fields["image_channels"] == 6 else None


def _named(models: Mapping[str, Any]) -> dict[str, Any]:
    return {f"openai/{name}": model for name, model in models.items()}


IMPROVED = Format(
    name="improved-diffusion",
    repository="https://github.com/openai/improved-diffusion",
    files="modelN.pt and ema_RATE_N.pt",
    signature=_SIGNATURE,
    family=family,
    diffusion=diffusion,
    published=_named(_IMPROVED),
    refused=_named({"upsample_cond_500K": _UPSAMPLER}),
    needed=_NEEDED,
    refuses=refuses,
    options={"rescale_timesteps": True},
)
GUIDED = Format(
    name="guided-diffusion",
    repository="https://github.com/openai/guided-diffusion",
    files="modelN.pt and ema_RATE_N.pt",
    signature=_SIGNATURE,
    family=family,
    diffusion=diffusion,
    published=_named(_GUIDED),
    refused=_named(
        {f"{size}x{size}_classifier": _CLASSIFIER for size in (64, 128, 256, 512)}
        | {name: _UPSAMPLER for name in ("64_256_upsampler", "128_512_upsampler")}
    ),
    needed=_NEEDED,
    refuses=refuses,
    options={"rescale_timesteps": False, "new_attention_order": False},
)
