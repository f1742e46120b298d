"""Configurations: what they refuse and say, plain data and back, differences, presets, and no torch."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig
from fastddpm.errors import UsageError, all_problems
from fastddpm.presets import PRESETS, preset
from fastddpm.storage.documents import difference, from_dict, to_dict

UNUSUAL = Preset(
    "unusual",
    UNetConfig(
        image_size=(24, 16), image_channels=1, width=20, blocks=4, attention_resolutions=(24, 12), dropout=0.25,
        groups=5, num_classes=7, label_dropout=0.125, learned_variance=True, channels=(60, 30), middle_attention=False,
        head_channels=15, scale_shift=True, resample="resblock", downsample_padding=1, norm_eps=1e-5, freq_shift=0,
        time_scale=0.25,
    ),
    DiffusionConfig(
        timesteps=77, schedule="quad", beta_start=3e-4, beta_end=0.5, prediction="v", variance="learned_range",
        loss="hybrid", hybrid_weight=0.02, min_snr_gamma=2.5, clip_x0=False, zero_terminal_snr=True,
        betas=tuple(0.001 * (t + 1) for t in range(77)),
    ),
    TrainConfig(
        steps=9, batch=6, accumulate=3, lr=3e-3, warmup=2, decay="cosine", clip_gradient=0.5, ema=(0.9, 0.5),
        ema_ramp=True, flip=False, precision="bf16", compile=True, graph=False, checkpoint_blocks=True, seed=-4,
        log_every=3, save_every=4, keep=5, preview_every=7, preview_steps=8, patience=6, ema_snapshots=10,
        ema_snapshot_lengths=(0.02,), ema_snapshot_dtype="float32",
    ),
    SampleConfig(
        method="ddim", steps=33, spacing="karras", eta=0.5, guidance=2.5, guidance_interval=(5, 70),
        guidance_rescale=0.5, dynamic_threshold=0.9, count=4, steps_offset=3,
        dynamic_threshold_max=1.5,
    ),
)  # fmt: skip


def test_the_unusual_configuration_leaves_no_default() -> None:
    """So that the round trip below notices any field that is dropped."""
    # head_channels forbids heads, paper accumulate, and fsdp compile
    standard = {"unet.heads", "train.mode", "train.parallel"}
    for section in ("unet", "diffusion", "train", "sample"):
        config = getattr(UNUSUAL, section)
        for f in dataclasses.fields(config):
            if f"{section}.{f.name}" not in standard:
                assert getattr(config, f.name) != f.default, f"{section}.{f.name}"


@pytest.mark.parametrize("value", [UNUSUAL, *PRESETS.values()], ids=lambda value: value.name)
def test_round_trip_through_json(value: Preset) -> None:
    data = json.loads(json.dumps(to_dict(value)))
    back = from_dict(Preset, data)
    assert back == value and to_dict(back) == to_dict(value)
    assert type(back.unet.multipliers) is tuple and type(back.train.lr) is float


def test_missing_fields_take_their_defaults() -> None:
    assert from_dict(UNetConfig, {"width": 64}) == UNetConfig(width=64)
    assert from_dict(Preset, {"name": "x", "train": {"batch": 4}}) == Preset("x", train=TrainConfig(batch=4))


def test_whole_numbers_are_floats_where_floats_are_meant() -> None:
    """JSON writers drop the .0 of a float."""
    config = from_dict(TrainConfig, {"lr": 1})
    assert config.lr == 1.0 and type(config.lr) is float


def test_one_decay_or_several() -> None:
    """A single one stays a number in JSON, as in the configurations of earlier runs."""
    assert from_dict(TrainConfig, {"ema": 0.5}).decays == (0.5,)
    assert from_dict(TrainConfig, {"ema": [0.5, 0]}).decays == (0.5, 0.0)
    assert TrainConfig(ema=(0.5,)) == TrainConfig(ema=0.5) and to_dict(TrainConfig(ema=(0.5,)))["ema"] == 0.5


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (Preset, [], "configuration must be an object; got list"),
        (Preset, {}, "configuration lacks the field 'name'"),
        (Preset, {"name": "x", "unet": 3}, r"configuration\.unet must be an object; got int"),
        (Preset, {"name": 3}, r"configuration\.name must be str; got 3"),
        (Preset, {"name": "x", "nets": {}},
         "configuration has no field 'nets'; it has name, unet, diffusion, train, sample"),
        (Preset, {"name": "x", "unet": {"wide": 3}}, r"configuration\.unet has no field 'wide'; it has image_size, "),
        (UNetConfig, {"width": "128"}, r"configuration\.width must be int; got '128'"),
        (UNetConfig, {"width": 128.0}, r"configuration\.width must be int; got 128\.0"),
        (UNetConfig, {"width": True}, r"configuration\.width must be int; got True"),
        (UNetConfig, {"width": None}, r"configuration\.width must be int; got None"),
        (UNetConfig, {"multipliers": 2}, r"configuration\.multipliers must be a list; got 2"),
        (UNetConfig, {"multipliers": [1, "2"]}, r"configuration\.multipliers must be int; got '2'"),
        (UNetConfig, {"dropout": True}, r"configuration\.dropout must be float; got True"),
        (TrainConfig, {"flip": 1}, r"configuration\.flip must be bool; got 1"),
        (DiffusionConfig, {"schedule": "sigmoid"},
         "schedule must be one of linear, cosine, quad, const, jsd; got 'sigmoid'"),
        (DiffusionConfig, {"schedule": ["linear"]},
         r"schedule must be one of linear, cosine, quad, const, jsd; got \['linear'\]"),
    ],
)  # fmt: skip
def test_from_dict_refuses(cls: type, data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_dict(cls, data)


def test_from_dict_names_the_place_it_is_given() -> None:
    with pytest.raises(UsageError, match=r"run/config\.json\.train\.lr must be float; got 'fast'"):
        from_dict(Preset, {"name": "x", "train": {"lr": "fast"}}, "run/config.json")


REFUSED: list[tuple[type, dict[str, Any], str]] = [
    *[(UNetConfig, {name: 0}, f"{name} must be positive; got 0")
      for name in ("image_size", "image_channels", "width", "blocks", "groups")],
    (UNetConfig, {"multipliers": ()}, r"multipliers must be one or more positive integers; got \(\)"),
    (UNetConfig, {"multipliers": (1, 0)}, r"multipliers must be one or more positive integers; got \(1, 0\)"),
    (UNetConfig, {"width": 33, "groups": 1}, "width must be even and at least 4 .* got 33"),
    (UNetConfig, {"width": 2, "groups": 1}, "width must be even and at least 4 .* got 2"),
    (UNetConfig, {"image_size": 36}, "image_size must be divisible by 8 for 4 levels; got 36"),
    (UNetConfig, {"width": 48}, "groups must divide each level's channels; 32 does not divide 48"),
    (UNetConfig, {"dropout": 1.0}, r"dropout must be in \[0\.0, 0\.999\); got 1\.0"),
    (UNetConfig, {"dropout": -0.1}, r"dropout must be in \[0\.0, 0\.999\); got -0\.1"),
    (UNetConfig, {"dropout": float("nan")}, r"dropout must be in \[0\.0, 0\.999\); got nan"),
    (UNetConfig, {"label_dropout": 1.0, "num_classes": 2}, r"label_dropout must be in \[0\.0, 1\.0\); got 1\.0"),
    (UNetConfig, {"num_classes": -1}, "num_classes must be 0 or more; got -1"),
    (UNetConfig, {"label_dropout": 0.1}, "label_dropout needs num_classes > 0"),
    (UNetConfig, {"image_size": 4104}, "image_size must be at most 4096; got 4104"),
    (UNetConfig, {"image_channels": 65}, "image_channels must be at most 64; got 65"),
    (UNetConfig, {"width": 4128}, "width must be at most 4096; got 4128"),
    (UNetConfig, {"blocks": 65}, "blocks must be at most 64; got 65"),
    (UNetConfig, {"multipliers": (1,) * 13, "image_size": 4096}, "levels must be at most 12; got 13"),
    (UNetConfig, {"multipliers": (65,)}, "the largest multiplier must be at most 64; got 65"),
    (UNetConfig, {"num_classes": 1_000_001}, "num_classes must be at most 1000000; got 1000001"),
    (UNetConfig, {"image_size": (32, 0)}, r"image_size must be positive; got \(32, 0\)"),
    (UNetConfig, {"image_size": (32, 36)}, r"image_size must be divisible by 8 for 4 levels; got \(32, 36\)"),
    (UNetConfig, {"image_size": (8, 4104)}, "image_size must be at most 4096; got 4104"),
    (UNetConfig, {"image_size": (8, 8, 8)}, r"image_size must be an integer, or a height and a width; got \(8, 8, 8\)"),
    (UNetConfig, {"image_size": 32.0}, r"image_size must be an integer, or a height and a width; got 32\.0"),
    (UNetConfig, {"channels": ()}, r"channels must be one or more positive integers; got \(\)"),
    (UNetConfig, {"channels": (64, 0)}, r"channels must be one or more positive integers; got \(64, 0\)"),
    (UNetConfig, {"channels": (64, 48)}, "groups must divide each level's channels; 32 does not divide 48"),
    (UNetConfig, {"channels": (32,) * 13, "image_size": 4096}, "levels must be at most 12; got 13"),
    (UNetConfig, {"channels": (262_176,)}, "the largest level must be at most 262144; got 262176"),
    (UNetConfig, {"heads": 0}, "heads must be positive; got 0"),
    (UNetConfig, {"head_channels": 0}, "head_channels must be positive; got 0"),
    (UNetConfig, {"heads": 3}, "heads must divide the channels of each attention block; 3 does not divide 256"),
    (UNetConfig, {"head_channels": 48},
     "head_channels must divide the channels of each attention block; 48 does not divide 256"),
    (UNetConfig, {"heads": 2, "head_channels": 64}, "heads and head_channels exclude each other; got 2 and 64"),
    (UNetConfig, {"resample": "pool"}, "resample must be one of conv, resblock; got 'pool'"),
    (UNetConfig, {"downsample_padding": 2}, "downsample_padding must be one of 0, 1; got 2"),
    (UNetConfig, {"freq_shift": -1}, "freq_shift must be one of 0, 1; got -1"),
    (UNetConfig, {"norm_eps": 0.0}, r"norm_eps must be in \(0, 1\); got 0\.0"),
    (UNetConfig, {"norm_eps": float("nan")}, r"norm_eps must be in \(0, 1\); got nan"),
    (UNetConfig, {"time_scale": float("inf")}, "time_scale must be positive and finite; got inf"),
    (DiffusionConfig, {"timesteps": 1}, r"timesteps must be in 2\.\.100000; got 1"),
    (DiffusionConfig, {"timesteps": 100_001}, r"timesteps must be in 2\.\.100000; got 100001"),
    (DiffusionConfig, {"beta_start": 0.0}, r"beta_start and beta_end must be in \(0, 1\); got 0\.0, 0\.02"),
    (DiffusionConfig, {"beta_end": 1.0}, r"beta_start and beta_end must be in \(0, 1\); got 0\.0001, 1\.0"),
    (DiffusionConfig, {"schedule": "exp"}, "schedule must be one of linear, cosine, quad, const, jsd; got 'exp'"),
    (DiffusionConfig, {"prediction": "noise"}, "prediction must be one of eps, x0, xprev, v; got 'noise'"),
    (DiffusionConfig, {"variance": "fixed"},
     "variance must be one of fixedlarge, fixedsmall, learned, learned_range; got 'fixed'"),
    (DiffusionConfig, {"loss": "l1"}, "loss must be one of simple, vlb, hybrid, min_snr; got 'l1'"),
    (DiffusionConfig, {"loss": "hybrid"}, "loss hybrid trains a learned variance; variance is fixedlarge"),
    (DiffusionConfig, {"variance": "learned"}, "variance learned gets no gradient from loss simple; use hybrid or vlb"),
    (DiffusionConfig, {"variance": "learned_range", "loss": "min_snr"},
     "variance learned_range gets no gradient from loss min_snr; use hybrid or vlb"),
    (DiffusionConfig, {"prediction": "xprev", "loss": "min_snr"},
     "min_snr weighting is defined for predictions eps, x0 and v, not xprev"),
    *[(TrainConfig, {name: 0}, f"{name} must be positive; got 0") for name in (
        "steps", "batch", "accumulate", "log_every", "save_every", "keep", "patience", "lr", "clip_gradient"
    )],
    (TrainConfig, {"lr": float("nan")}, "lr must be positive; got nan"),
    (TrainConfig, {"mode": "exact"}, "mode must be one of standard, paper; got 'exact'"),
    (TrainConfig, {"precision": "fp16"}, "precision must be one of fp32, bf16; got 'fp16'"),
    (TrainConfig, {"decay": "linear"}, "decay must be one of none, cosine; got 'linear'"),
    (TrainConfig, {"warmup": -1}, "warmup must be 0 or more; got -1"),
    (TrainConfig, {"ema": 1.0}, r"ema must be in \[0\.0, 1\.0\); got 1\.0"),
    (TrainConfig, {"ema": (0.5, 1.0)}, r"ema must be in \[0\.0, 1\.0\); got 1\.0"),
    (TrainConfig, {"ema": (0.5, 0.5)}, r"ema must be one decay, or several that differ; got \(0\.5, 0\.5\)"),
    (TrainConfig, {"ema": ()}, r"ema must be one decay, or several that differ; got \(\)"),
    (TrainConfig, {"parallel": "tp"}, "parallel must be one of ddp, fsdp; got 'tp'"),
    (TrainConfig, {"parallel": "fsdp", "compile": True}, "parallel fsdp does not go with compile; use parallel ddp"),
    (TrainConfig, {"parallel": "fsdp", "mode": "paper"}, "parallel fsdp does not go with mode paper"),
    (TrainConfig, {"batch": 10, "accumulate": 4}, "accumulate must divide batch; 4 does not divide 10"),
    (TrainConfig, {"mode": "paper", "batch": 12},
     "mode paper clips each of 8 shards of a batch; 8 does not divide batch 12"),
    (TrainConfig, {"mode": "paper", "accumulate": 2},
     "mode paper takes its batch in 8 shards already; leave accumulate at 1"),
    (SampleConfig, {"steps": 0}, "steps must be positive; got 0"),
    (SampleConfig, {"method": "heun"}, "method must be one of ancestral, ddim, dpm2m, dpm2m-sde; got 'heun'"),
    (SampleConfig, {"eta": 0.5}, r"eta is of method ddim, ancestral has none; got 0\.5"),
    (SampleConfig, {"eta": 1.1}, r"eta must be in \[0\.0, 1\.0\]; got 1\.1"),
    (SampleConfig, {"count": -1}, r"count must be in 0\.\.10000; got -1"),
    (SampleConfig, {"guidance": -1.0}, r"guidance must be in 0\.\..*; got -1\.0"),
    (SampleConfig, {"guidance_interval": (7, 5)}, r"guidance_interval must be two timesteps, .*; got \(7, 5\)"),
    (SampleConfig, {"guidance_rescale": 1.5}, r"guidance_rescale must be in \[0, 1\]; got 1\.5"),
    (SampleConfig, {"dynamic_threshold": 1.0}, r"dynamic_threshold must be in \(0, 1\); got 1\.0"),
    (Preset, {"name": "x", "unet": UNetConfig(learned_variance=True)},
     "variance fixedlarge needs learned_variance=False in the network; got True"),
    (Preset, {"name": "x", "diffusion": DiffusionConfig(variance="learned", loss="vlb")},
     "variance learned needs learned_variance=True in the network; got False"),
    (Preset, {"name": "x", "sample": SampleConfig(steps=1001)},
     "sample steps must be at most timesteps, 1000; got 1001"),
    (Preset, {"name": "x", "sample": SampleConfig(guidance=2.0)},
     "guidance needs a network trained with label_dropout > 0"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "options", "message"), REFUSED)
def test_refuses(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cls(**options)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (UNetConfig, {"dropout": 0.0}),
        (UNetConfig, {"width": 4, "groups": 4, "multipliers": (1,), "image_size": 1}),
        (DiffusionConfig, {"timesteps": 2}),
        (TrainConfig, {"ema": 0.0, "warmup": 0}),
        (SampleConfig, {"method": "ddim", "eta": 1.0, "guidance": 0.0, "count": 0}),
        (SampleConfig, {"guidance_interval": (0, 0), "guidance_rescale": 1.0}),
    ],
)
def test_accepts_the_ends_of_ranges(cls: type, options: dict[str, Any]) -> None:
    assert {name: getattr(cls(**options), name) for name in options} == options


def test_one_representation_of_a_network() -> None:
    """Equal sides are one number, and channels leave no multipliers; also of what JSON gives."""
    assert (
        UNetConfig(image_size=(32, 32)) == UNetConfig() and to_dict(UNetConfig(image_size=(32, 32)))["image_size"] == 32
    )
    wide = from_dict(UNetConfig, {"image_size": [16, 64], "channels": [64, 96], "multipliers": []})
    assert wide == UNetConfig(image_size=(16, 64), channels=(64, 96), multipliers=(9,))
    assert wide.image_shape == (3, 16, 64) and wide.multipliers == ()


def test_channels_of_the_levels() -> None:
    """Multiples of the width, or as given; the first convolution then has those of the first level."""
    narrowing = UNetConfig(width=64, multipliers=(2, 1, 3))
    assert (narrowing.level_channels, narrowing.first_channels) == ((128, 64, 192), 64)
    given = UNetConfig(width=64, channels=(32, 96))
    assert (given.level_channels, given.first_channels) == ((32, 96), 32)
    assert given.attends == (False, True)
    assert UNetConfig(image_size=(16, 64), attention_resolutions=(16, 4)).attends == (True, False, True, False)
    assert [UNetConfig(heads=4).heads_of(256), UNetConfig(head_channels=64).heads_of(256)] == [4, 4]


def test_all_mistakes_of_a_network_at_once() -> None:
    with pytest.raises(UsageError) as error:
        UNetConfig(norm_eps=2.0, freq_shift=7, heads=3, time_scale=-1.0, channels=(64, 80), image_size=(31, 32))  # type: ignore[arg-type]
    assert str(error.value).splitlines()[1:] == [
        "  image_size must be divisible by 2 for 2 levels; got (31, 32)",
        "  groups must divide each level's channels; 32 does not divide 80",
        "  heads must divide the channels of each attention block; 3 does not divide 80",
        "  freq_shift must be one of 0, 1; got 7",
        "  norm_eps must be in (0, 1); got 2.0",
        "  time_scale must be positive and finite; got -1.0",
    ]


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        UNetConfig().width = 64  # type: ignore[misc]


def test_difference() -> None:
    old, new = PRESETS["cifar10"], PRESETS["lsun256"]
    assert difference(old, old) == []
    assert difference(old, new) == [
        "name: cifar10 -> lsun256",
        "unet.image_size: 32 -> 256",
        "unet.multipliers: (1, 2, 2, 2) -> (1, 1, 2, 2, 4, 4)",
        "unet.dropout: 0.1 -> 0.0",
        "diffusion.variance: fixedlarge -> fixedsmall",
        "train.steps: 800000 -> 1200000",
        "train.batch: 128 -> 64",
        "train.lr: 0.0002 -> 2e-05",
    ]


def test_presets_are_the_papers() -> None:
    """Section 4 and appendix B."""
    cifar10 = preset("cifar10")
    assert (cifar10.unet.image_size, cifar10.unet.width, cifar10.unet.multipliers) == (32, 128, (1, 2, 2, 2))
    assert (cifar10.unet.blocks, cifar10.unet.attention_resolutions, cifar10.unet.dropout) == (2, (16,), 0.1)
    assert (cifar10.diffusion.timesteps, cifar10.diffusion.beta_start, cifar10.diffusion.beta_end) == (1000, 1e-4, 0.02)
    assert (cifar10.diffusion.variance, cifar10.diffusion.loss, cifar10.diffusion.prediction) == (
        "fixedlarge", "simple", "eps"
    )  # fmt: skip
    train = cifar10.train
    assert (train.steps, train.batch, train.lr, train.warmup, train.ema) == (800_000, 128, 2e-4, 5000, 0.9999)
    assert train.flip and train.clip_gradient == 1.0
    for name, steps, width in (
        ("celebahq256", 500_000, 128), ("lsun256", 1_200_000, 128), ("lsun256-large", 1_150_000, 192)
    ):  # fmt: skip
        large = preset(name)
        assert (large.unet.image_size, large.unet.width, large.unet.multipliers) == (256, width, (1, 1, 2, 2, 4, 4))
        assert (large.unet.dropout, large.diffusion.variance) == (0.0, "fixedsmall")
        assert (large.train.steps, large.train.batch, large.train.lr) == (steps, 64, 2e-5)
    assert not preset("lsun256-large").train.flip  # the bedrooms


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="unknown preset 'cifar'; choose one of cifar10, celebahq256, lsun256, "):
        preset("cifar")


@pytest.mark.parametrize("module", ["config", "presets", "errors"])
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, fastddpm.{module}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# All problems at once


def test_a_configuration_lists_all_its_problems() -> None:
    with pytest.raises(UsageError) as error:
        TrainConfig(steps=0, lr=-1.0, ema=(0.5, 2.0), mode="paper", batch=12)
    assert str(error.value).splitlines() == [
        "4 options cannot be used:",
        "  steps must be positive; got 0",
        "  lr must be positive; got -1.0",
        "  ema must be in [0.0, 1.0); got 2.0",
        "  mode paper clips each of 8 shards of a batch; 8 does not divide batch 12",
    ]


def test_several_configurations_are_refused_together() -> None:
    with pytest.raises(UsageError) as error, all_problems():
        UNetConfig(width=3)
        with all_problems():
            SampleConfig(eta=2.0, method="ddim")
        UNetConfig(width=3)  # said once
    assert str(error.value).splitlines()[1:] == [
        "  width must be even and at least 4 (the time embedding halves it); got 3",
        "  groups must divide each level's channels; 32 does not divide 3",
        "  groups must divide each level's channels; 32 does not divide 6",
        "  eta must be in [0.0, 1.0]; got 2.0",
    ]
    with pytest.raises(UsageError, match=r"^width must"):  # the block has ended
        UNetConfig(width=3, groups=1)


def test_an_error_that_follows_from_an_impossible_value_is_its_cause() -> None:
    with pytest.raises(UsageError, match=r"^timesteps must be in 2\.\.100000; got 0$") as error, all_problems():
        1 // DiffusionConfig(timesteps=0).timesteps
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    with pytest.raises(UsageError, match="2 options cannot be used"), all_problems():
        DiffusionConfig(timesteps=0)
        raise UsageError("another")
    with pytest.raises(ZeroDivisionError), all_problems():  # it is not hidden
        1 // (DiffusionConfig(timesteps=2).timesteps - 2)
    with pytest.raises(UsageError, match=r"^timesteps must"):  # the blocks have ended
        DiffusionConfig(timesteps=0)


@pytest.mark.parametrize("sizes", [{"groups": 0}, {"multipliers": ()}, {"multipliers": (1,) * 99}, {"width": 10**9}])
def test_sizes_without_sense_are_refused_before_their_relations(sizes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be"):
        UNetConfig(**sizes)
