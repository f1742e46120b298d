"""The configuration that --data alone trains: each choice over many kinds of data and machines."""

import dataclasses
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.image_folder import png
from helpers.marks import slow
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from fastddpm.config import DiffusionConfig, Preset, TrainConfig, UNetConfig
from fastddpm.data.image import Preprocessing
from fastddpm.data.inspect import Findings, survey
from fastddpm.data.readers.source import EncodedImage, ImageSource
from fastddpm.errors import DataError, UsageError
from fastddpm.presets import PRESETS
from fastddpm.sampling.batch_size import free_bytes
from fastddpm.training.from_data import Chosen, Machine, choose, largest_size, suppose, with_steps
from fastddpm.training.given import NAME, Given, names_images
from fastddpm.training.length import too_short
from fastddpm.training.network_sizes import bytes_per_image, unet_of

GIB = 2**30
CPU, GPU = Machine("cpu", 8 * GIB), Machine("cuda", 80 * GIB)


def found(
    count: int = 1000,
    *,
    sides: dict[int, int] | None = None,
    kinds: dict[str, int] | None = None,
    classes: dict[int, int] | None = None,
    names: tuple[str, ...] = (),
    bad: int = 0,
) -> Findings:
    good = count - bad
    return Findings(
        "photos", count, good, bad=bad, class_names=list(names),
        kinds=Counter(kinds or {"JPEG RGB": good}), sides=Counter(sides or {300: good}), classes=Counter(classes or {}),
    )  # fmt: skip


def chosen(data: Findings, machine: Machine = CPU, **options: Any) -> Chosen:
    return choose(data, machine, Given(**options), source="photos")


@pytest.mark.parametrize(
    ("kinds", "channels"),
    [
        ({"PNG L": 5, "PNG 1": 3, "PNG I;16": 2, "TIFF F": 1, "PNG LA": 1}, 1),
        ({"PNG L": 999, "JPEG RGB": 1}, 3),
        ({"PNG P": 10}, 3),
        ({"TIFF CMYK": 1, "PNG L": 9}, 3),
    ],
)
def test_grey_only_if_all_are(kinds: dict[str, int], channels: int) -> None:
    assert chosen(found(sum(kinds.values()), kinds=kinds)).preset.unet.image_channels == channels


@pytest.mark.parametrize(
    ("sides", "on_a_cpu", "on_a_gpu"),
    [
        ({32: 100}, 32, 32),
        ({16: 100}, 32, 32),
        ({47: 100}, 32, 32),
        ({48: 100}, 48, 48),
        ({100: 90, 40: 10}, 64, 96),
        ({100: 89, 40: 11}, 32, 32),
        ({4000: 90, 20: 10}, 64, 256),
    ],
)
def test_the_size_that_nine_of_ten_images_have(sides: dict[int, int], on_a_cpu: int, on_a_gpu: int) -> None:
    assert chosen(found(100, sides=sides)).preset.unet.image_size == on_a_cpu
    assert chosen(found(100, sides=sides), GPU, minutes=10_000).preset.unet.image_size == on_a_gpu


@pytest.mark.parametrize(
    ("machine", "minutes", "size"),
    [
        (CPU, 30, 64), (CPU, 4.9, 32), (CPU, 1e5, 64), (GPU, 30, 64), (GPU, 60, 128), (GPU, 600, 256),
        (Machine("cuda", 12 * GIB), 600, 128), (Machine("cuda", 6 * GIB), 600, 64),
    ],
)  # fmt: skip
def test_the_largest_size_of_a_device(machine: Machine, minutes: float, size: int) -> None:
    assert largest_size(machine, minutes) == size


@pytest.mark.parametrize(
    ("classes", "num_classes", "reason"),
    [
        (None, 0, "the images have no labels"),
        ({0: 1000}, 0, "all images have one label"),
        ({0: 500, 1: 500}, 2, "2 classes (cat, dog), 500 images in the median one, with guidance 2"),
        ({0: 16, 1: 16}, 2, "2 classes"),
        ({0: 15, 1: 15}, 0, "the median of 2 labels has fewer than 16 images (15)"),
        ({0: 900, 1: 20, 2: 1}, 3, "3 classes"),
        ({0: 500, 70_000: 500}, 0, "the labels are numbers up to 70,000"),
        ({i: 1 for i in range(1000)}, 0, "the median of 1,000 labels has fewer than 16 images (1)"),
    ],
)
def test_classes_with_enough_images(classes: dict[int, int] | None, num_classes: int, reason: str) -> None:
    made = chosen(found(classes=classes, names=("cat", "dog") if classes == {0: 500, 1: 500} else ()))
    unet, sample = made.preset.unet, made.preset.sample
    assert (unet.num_classes, unet.label_dropout > 0, sample.guidance) == (
        num_classes, bool(num_classes), 2.0 if num_classes else 1.0,
    )  # fmt: skip
    assert sum(reason in line for line in made.lines) == 1


def test_options_that_are_given_are_taken_and_not_explained() -> None:
    free = chosen(found())
    given = dict(
        image_size=32, image_channels=1, num_classes=0, batch=4, steps=70, network="small", resize="lanczos",
        background="black",
    )  # fmt: skip
    made = chosen(found(classes={0: 500, 1: 500}), **given)
    unet, train = made.preset.unet, made.preset.train
    assert (unet.image_size, unet.image_channels, unet.num_classes, unet.width) == (32, 1, 0, 64)
    assert (train.batch, train.steps, made.minutes) == (4, 70, None) and free.minutes == 30
    options = [line[line.rindex("[") :] for line in made.lines]
    assert options == ["[--allow-bad, --skip-bad]", "[--no-flip]"] and len(free.lines) == 10
    assert not any("minutes" in line for line in chosen(found(), minutes=5.0).lines)


def test_the_options_are_found_among_the_arguments() -> None:
    arguments = ["--data", "x", "--image_size", "48", "--batch=8", "--minutes", "2.5", "--network", "base"]
    assert Given.of(arguments) == Given(image_size=48, batch=8, minutes=2.5, network="base")
    # What the parser refuses anyway is not given, and of two the last one counts.
    wrong = ["--batch", "x", "--network", "huge", "--steps", "3", "--steps", "4", "--image-size"]
    assert Given.of(wrong) == Given(steps=4)


def test_images_are_named_unless_data_is_none() -> None:
    assert names_images(["--data", "x"]) and names_images(["--data=x"])
    assert not names_images(["--data", "None"]) and not names_images([])


def test_free_memory_is_a_part_of_all() -> None:
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < free_bytes(torch.device("cpu")) <= everything


@pytest.mark.parametrize("count", [0, 1, 2, 30, 99, 100])
def test_few_images_are_refused_or_noted(count: int) -> None:
    if count == 1:
        with pytest.raises(DataError, match="photos holds 1 image; training takes at least 2"):
            chosen(found(1))
        return
    notes = [line for line in chosen(found(count)).lines if line.startswith("note:")]
    assert len(notes) == (count < 100) and all(f"{count} images are few" in note for note in notes)


def test_images_whose_headers_are_bad_do_not_count() -> None:
    with pytest.raises(DataError, match="holds 1 image"):
        chosen(found(5, bad=4))
    assert chosen(found(10, bad=3)).preset.train.batch == 4


@pytest.mark.parametrize(
    ("machine", "count", "given", "batch"),
    [
        (CPU, 1000, {}, 8), (CPU, 1000, {"image_size": 32}, 16), (CPU, 15, {"image_size": 32}, 8), (CPU, 2, {}, 2),
        (GPU, 10_000, {}, 128), (GPU, 100, {}, 64), (Machine("cpu", 8 * GIB, 3), 1000, {}, 6),
        (Machine("cpu", 8 * GIB, 2), 3, {}, 2), (CPU, 1000, {"accumulate": 6}, 6),
        (Machine("cpu", 0.2 * GIB), 1000, {}, 4), (Machine("cpu", 1), 1000, {}, 1),
    ],
)  # fmt: skip
def test_the_batch(machine: Machine, count: int, given: dict[str, int], batch: int) -> None:
    assert chosen(found(count), machine, **given).preset.train.batch == batch


def test_the_network_by_device_and_number() -> None:
    widths = {(m.device, n): chosen(found(n), m).preset.unet.width for m in (CPU, GPU) for n in (1999, 2000)}
    assert widths == {("cpu", 1999): 16, ("cpu", 2000): 16, ("cuda", 1999): 64, ("cuda", 2000): 96}
    assert chosen(found(), GPU).preset.train.precision == "bf16"
    assert chosen(found()).preset.train.precision == "fp32"


def test_the_networks() -> None:
    assert (
        unet_of("paper", 32, 3, 0) == PRESETS["cifar10"].unet and unet_of("paper", 256, 3, 0) == PRESETS["lsun256"].unet
    )
    labelled = unet_of("paper", 32, 1, 5)
    assert (labelled.image_channels, labelled.num_classes, labelled.label_dropout) == (1, 5, 0.1)
    lowest = {
        size: (config.image_size >> (len(config.multipliers) - 1), config.attention_resolutions)
        for size in (16, 32, 48, 64, 96, 128, 192, 256, 100, 37)
        for config in (unet_of("tiny", size, 3, 0),)
    }
    assert lowest == {
        16: (8, (16,)), 32: (8, (16,)), 48: (12, (12,)), 64: (8, (16,)), 96: (12, (12,)), 128: (8, (16,)),
        192: (12, (12,)), 256: (8, (16,)), 100: (25, ()), 37: (37, ()),
    }  # fmt: skip


@pytest.mark.parametrize("network", ["tiny", "small", "base", "paper"])
@pytest.mark.parametrize("size", [16, slow(32)])
def test_the_estimate_of_memory_is_that_of_autograd(network: str, size: int) -> None:
    from fastddpm.training.dry_run import SavedActivations
    from fastddpm.unet import UNet

    config = dataclasses.replace(unet_of(network, size, 3, 0), dropout=0.0)
    unet = UNet(config)
    with SavedActivations(unet) as saved:
        unet(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64))
    assert 0.4 < saved.num_bytes / bytes_per_image(config) <= 1.0


@drawn(steps=st.integers(1, 2_000_000))
@settings(max_examples=50)
def test_the_average_fits_the_length(steps: int) -> None:
    train = with_steps(suppose(Given(), 1), steps).train
    assert train.steps == steps and too_short(train, steps) is None
    assert train.ema <= 0.9999 and train.warmup <= steps / 10
    if 100 <= steps <= 100_000:
        assert 1 / (1 - train.ema) == pytest.approx(steps / 10, rel=0.06)


def test_other_presets_get_the_steps_alone() -> None:
    preset = PRESETS["cifar10"]
    assert with_steps(preset, 7).train == dataclasses.replace(preset.train, steps=7)


def test_a_pack_keeps_its_size_and_channels() -> None:
    made = choose(found(), CPU, Given(), source="x.fdpack", packed=Preprocessing(40, 1))
    assert (made.preset.unet.image_size, made.preset.unet.image_channels) == (40, 1)
    assert (made.options.resize, made.options.background, made.options.allow_bad) == ("none", None, 0.0)
    assert made.options.data == "x.fdpack" and "--resize" not in " ".join(made.lines)


def test_what_is_supposed_before_the_images_are_read_is_a_whole_configuration() -> None:
    preset = suppose(Given(image_size=48), processes=3)
    assert preset.name == NAME and preset.unet.image_size == 48 and preset.train.batch % 3 == 0
    assert preset.diffusion.prediction == "x0" and isinstance(preset.train, TrainConfig)
    for wrong in ({"image_size": 0}, {"batch": 0}, {"accumulate": 0}, {"steps": 0}):
        (name,) = wrong
        with pytest.raises(UsageError, match=f"{name} must be positive; got 0"):
            suppose(Given(**wrong), 1)


# What the choice looks at


def test_headers_of_some_images_and_the_classes_of_all() -> None:
    read = []

    def item(i: int) -> EncodedImage:
        def load() -> bytes:
            read.append(i)
            return b"no picture" if i == 40 else png(np.zeros((8 + i % 3, 30), np.uint8))

        return EncodedImage(f"{i}", i % 4, load)

    source = ImageSource("x", 100, [], lambda: iter(map(item, range(100))), classes=("a", "b", "c", "d"))
    seen = survey(source, looked_at=10)
    assert sorted(read) == list(range(0, 100, 10))
    assert (seen.images, seen.good, seen.bad) == (100, 9, 1)
    assert seen.classes == {0: 25, 1: 25, 2: 25, 3: 25} and seen.class_names == ["a", "b", "c", "d"]
    assert seen.sides == Counter(8 + i % 3 for i in range(0, 100, 10) if i != 40) and seen.kinds == {"PNG L": 9}
    read.clear()
    assert survey(source).good == 99 and sorted(read) == list(range(100))


def test_the_header_is_enough_for_the_survey(tmp_path: Path) -> None:
    file = io.BytesIO(png(np.zeros((50, 70, 3), np.uint8)))
    source = ImageSource("x", 1, [], lambda: iter([EncodedImage("cut", None, lambda: file.getvalue()[:60])]))
    assert survey(source).sizes == {"70x50": 1}


def test_a_model_to_begin_with_keeps_its_network_and_diffusion() -> None:
    """Also one of fewer timesteps than a chain takes by default."""
    unet = UNetConfig(
        image_size=16, image_channels=1, width=8, multipliers=(1, 2), groups=4, attention_resolutions=(8,),
        learned_variance=True,
    )  # fmt: skip
    model = Preset("other", unet, DiffusionConfig(timesteps=20, variance="learned", loss="vlb"), TrainConfig(lr=3e-4))
    taken = chosen(found(kinds={"PNG L": 1000}), model=model, steps=50)
    assert taken.preset.unet == model.unet and taken.preset.diffusion == model.diffusion
    assert (taken.preset.train.lr, taken.preset.sample.steps) == (3e-4, 20)
    assert any(line.endswith("[--init]") for line in taken.lines)
    assert not any("[--network]" in line or "[--image-size]" in line for line in taken.lines)


def test_a_grey_model_takes_no_colour_and_mirrors_only_if_it_did() -> None:
    model = Preset("grey", UNetConfig(image_size=16, image_channels=1), train=TrainConfig(flip=False))
    with pytest.raises(DataError, match="draws grey ones"):
        chosen(found(), model=model)
    taken = chosen(found(kinds={"PNG L": 1000}), model=model)
    assert not taken.preset.train.flip and not any("mirrored" in line for line in taken.lines)
    assert chosen(found()).preset.train.flip


@pytest.mark.parametrize(("background", "channels"), [("white", 1), ("#808080", 1), ("red", 3)])
def test_transparent_grey_on_a_colour_is_in_colour(background: str, channels: int) -> None:
    assert chosen(found(kinds={"PNG LA": 9, "PNG L": 9}), background=background).preset.unet.image_channels == channels
    assert chosen(found(kinds={"PNG L": 9}), background=background).preset.unet.image_channels == 1
