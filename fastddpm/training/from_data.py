"""The configuration that `--data` alone trains: chosen from the images and the device, each choice with its reason.

Imports no torch. `choose` is a pure function of what `data.inspect.survey` found, the machine and the given options.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig, UNetConfig
from fastddpm.errors import DataError
from fastddpm.presets import preset as preset_of
from fastddpm.runtime import cli
from fastddpm.runtime.distributed import ProcessGroup, on_main
from fastddpm.runtime.image_size import ImageSize, size_text
from fastddpm.runtime.progress import announced, counted

from .given import NAME, Given
from .initial import starting_preset
from .network_sizes import NETWORK_SIZES, NetworkSize, bytes_per_image, unet_of
from .saved import RunOptions

if TYPE_CHECKING:
    import torch

    from fastddpm.data.image import Preprocessing
    from fastddpm.data.inspect import Findings

T = TypeVar("T")
MINUTES = 30.0
SIZES = (32, 48, 64, 96, 128, 192, 256)
LARGE_ENOUGH = 0.9  # of the images are at least as large as the chosen size
LEAST_IMAGES = 2
FEW_IMAGES = 100
LEAST_OF_A_CLASS = 16  # images of the median class
MOST_BAD = 0.01  # of the images may be left out
MANY_IMAGES = 2000  # from this number on a GPU trains the base network
_GIB = 2**30
_GREY = {"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
_TRANSPARENT = {"LA", "La", "P", "PA"}
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Machine:
    """What a run is computed on: device "cpu" or "cuda", its free memory in bytes, and the number of processes."""

    device: str
    free_bytes: float
    processes: int = 1


@dataclass(frozen=True)
class Chosen:
    """A configuration, how its images are read, the minutes it may take (None: `--steps` was given), and the reasons.

    `lines`: one per choice, with the option that changes it; none for a choice that was given.
    """

    preset: Preset
    options: RunOptions
    minutes: float | None
    lines: tuple[str, ...]


def choose_here(
    source: str, given: Given, device: "torch.device", group: ProcessGroup, report: Callable[[str], None]
) -> Chosen:
    """Return what to train on the images at `source`, and report the choices. Rank 0 looks and chooses for all.

    Raises `UsageError` and `DataError` as `open_dataset` does, and `DataError` for fewer than 2 images.
    """

    def chosen() -> Chosen:
        from fastddpm.sampling.batch_size import free_bytes

        found, packed = look(source)
        machine = Machine(device.type, free_bytes(device), group.world_size)
        return choose(found, machine, given, source=source, packed=packed)

    result = on_main(chosen, group)
    report("chosen from the data; in brackets, the option that changes it:")
    for line in result.lines:
        report(f"  {line}")
    return result


def look(source: str) -> "tuple[Findings, Preprocessing | None]":
    """Return what the images at `source` are, by their headers, and of a pack the size and channels that it has."""
    from fastddpm.data.inspect import survey
    from fastddpm.data.pack.format import ENDING, open_pack
    from fastddpm.data.sources import open_image_source

    images = open_image_source(source)
    with announced(f"reading headers of the images of {source}"):
        found = survey(images)
    return found, open_pack(Path(source)).preprocessing if source.lower().endswith(ENDING) else None


def starting_point(name: str, arguments: Sequence[str], processes: int, model: Preset | None) -> Preset:
    """Return the configuration that a new run starts from: the preset called `name`, or for `photos` the supposed one.

    `model`: the configuration of the model that --init names. Its network and diffusion are taken, and if no preset is
    named and no images, all of it. Raises `UsageError` for a name that is unknown.
    """
    if name == NAME:
        return suppose(Given.of(arguments, model), processes)
    base = preset_of(name)
    return base if model is None else starting_preset(model, base, chosen=cli.peek(arguments, "--preset") is not None)


def suppose(given: Given, processes: int) -> Preset:
    """Return the configuration for typical images, on which a command line is checked before any image is read."""
    from fastddpm.data.inspect import Findings

    kind = "JPEG RGB" if given.model is None or given.model.unet.image_channels == 3 else "JPEG L"
    found = Findings("", 10_000, 10_000, kinds=Counter({kind: 10_000}), sides=Counter({256: 10_000}))
    found.classes.update({0: 5000, 1: 5000})
    return choose(found, Machine("cpu", 2.0**40, processes), given, source="").preset


def choose(
    found: "Findings", machine: Machine, given: Given, *, source: str, packed: "Preprocessing | None" = None
) -> Chosen:
    """Return what to train on images like `found`. Raises `DataError` for fewer than 2 images.

    `source`: what --data named. `packed`: the size and channels of a pack, which are then taken.
    """
    lines: list[str] = []

    def say(option: str, given_value: object, text: str) -> None:
        if given_value is None:
            lines.append(f"{text} [{option}]")

    count = found.good if found.good + found.bad == found.images else found.images
    if 0 < count < LEAST_IMAGES:
        raise DataError(
            f"{found.source} holds {count} image; training takes at least {LEAST_IMAGES}, and some hundreds to draw "
            "new ones instead of copies"
        )
    if count < FEW_IMAGES:
        lines.append(
            f"note: {count:,} images are few: the model will repeat them rather than draw new ones; some hundreds, of "
            "one kind, are needed for that"
        )
    minutes = None if given.steps is not None else _or(given.minutes, MINUTES)
    model = given.model
    if model is not None:
        size: ImageSize = model.unet.image_size
        channels = model.unet.image_channels
        lines.append(
            f"{size_text(size)} pixels, {channels} channels, network and diffusion: those of the model [--init]"
        )
        if packed is None and channels < _channels(found, packed, None)[0]:
            raise DataError(
                f"images of {found.source} are in colour, and the model that --init names draws grey ones; convert the "
                "images to grey, or begin with a model of 3 channels"
            )
    else:
        channels, text = _channels(found, packed, given.background)
        say("--image-channels", given.image_channels, text)
        size, text = _image_size(found, machine, minutes, packed)
        say("--image-size", given.image_size, text)
    size, channels = _or(given.image_size, size), _or(given.image_channels, channels)
    resize: Literal["none", "area"] = "none" if packed else "area"
    if not packed:
        shape = "square" if isinstance(size, int) else "part of that shape"
        say("--resize", given.resize, f"cropped to the central {shape}, resized with an antialiasing filter (area)")
        say("--background", given.background, "transparent images on white; CMYK and the like converted to RGB")
        lines.append(
            f"up to {MOST_BAD:.0%} of the images are left out if they cannot be used [--allow-bad, --skip-bad]"
        )
    num_classes, text = _classes(found, count)
    say("--num-classes", given.num_classes, text)
    num_classes = _or(given.num_classes, num_classes)
    if model is not None:
        dropped = 0.1 if num_classes else 0.0
        unet = dataclasses.replace(model.unet, image_size=size, num_classes=num_classes, label_dropout=dropped)
        lr, diffusion = model.train.lr, model.diffusion
    else:
        network = given.network or _network(machine, count)
        say("--network", given.network, f"network {network}: {_network_reason(machine, count)}")
        unet, lr = unet_of(network, size, channels, num_classes), NETWORK_SIZES[network].lr
        diffusion = _process(machine)
    accumulate = _or(given.accumulate, 1)
    batch, text = _batch(unet, machine, count, max(1, accumulate))
    say("--batch", given.batch, text)
    train = TrainConfig(
        batch=_or(given.batch, batch),
        accumulate=accumulate,
        lr=lr,
        decay="cosine",
        flip=True if model is None else model.train.flip,
        precision="bf16" if machine.device == "cuda" else "fp32",
    )
    if train.flip:
        lines.append("images are also shown mirrored [--no-flip]")
    if minutes is not None:
        say(
            "--minutes, --steps",
            given.minutes,
            f"{counted(minutes, 'minutes')}: the steps are measured before the first",
        )
    guidance = 2.0 if num_classes else 1.0
    sample = (
        SampleConfig("ddim", min(50, diffusion.timesteps), guidance=guidance, count=36)
        if machine.device == "cpu"
        else SampleConfig(steps=min(250, diffusion.timesteps), guidance=guidance)
    )
    preset = with_steps(Preset(NAME, unet, diffusion, train, sample), _or(given.steps, 1000))
    reading = (
        RunOptions(source) if packed else RunOptions(source, resize=resize, background="white", allow_bad=MOST_BAD)
    )
    return Chosen(preset, reading, minutes, tuple(lines))


def _or(given: T | None, chosen: T) -> T:
    return chosen if given is None else given


def with_steps(preset: Preset, steps: int) -> Preset:
    """Return `preset` for a run of `steps` steps.

    In a configuration that was chosen from the data, the average (EMA), warm-up, and the steps between log lines,
    checkpoints and previews fit that length: the average spans the last tenth, 1 / (1 - ema) = steps / 10, with at most
    the paper's 0.9999.
    """
    train = dataclasses.replace(preset.train, steps=steps)  # raises UsageError unless steps are positive
    if preset.name == NAME:
        quarter = max(1, min(5000, -(-steps // 4)))
        train = dataclasses.replace(
            train,
            ema=min(0.9999, round(max(0.0, 1 - 10 / steps), 5)),
            warmup=min(1000, steps // 10),
            log_every=max(1, min(50, steps // 20)),
            save_every=quarter,
            preview_every=quarter,
        )
    return dataclasses.replace(preset, train=train)


# One choice each: its value, and the line that gives the reason


def _channels(found: "Findings", packed: "Preprocessing | None", background: str | None) -> tuple[int, str]:
    if packed is not None:
        return packed.channels, f"{packed.channels} channels, as packed"
    modes: Counter[str] = Counter()
    for kind, number in found.kinds.items():
        modes[kind.rpartition(" ")[2]] += number
    colour = sum(number for mode, number in modes.items() if mode not in _GREY)
    looked_at = f"{found.good:,} images" + (" looked at" if found.good + found.bad < found.images else "")
    if found.good and not colour and background is not None and modes.keys() & _TRANSPARENT and _is_colour(background):
        return 3, f"3 channels: {looked_at} are grey, and transparent ones are put on {background}"
    if found.good and not colour:
        return 1, f"1 channel: all of {looked_at} are grey"
    return 3, f"3 channels: {colour:,} of {looked_at} are stored in colour; grey is repeated"


def _is_colour(background: str) -> bool:
    from PIL import ImageColor

    return len(set(ImageColor.getrgb(background))) > 1


def _image_size(
    found: "Findings", machine: Machine, minutes: float | None, packed: "Preprocessing | None"
) -> tuple[ImageSize, str]:
    if packed is not None:
        return packed.image_size, f"{size_text(packed.image_size)} pixels, as packed"
    limit = largest_size(machine, MINUTES if minutes is None else minutes)
    side = _side(found.sides)
    size = max((size for size in SIZES if size <= min(side, limit)), default=SIZES[0])
    if side < SIZES[0]:
        return size, f"{size}x{size} pixels: enlarged, because nine of ten images reach only {side} on the shorter side"
    reason = "the most for this device and time"
    if size < limit:
        reason = f"nine of ten images have at least {side} on their shorter side"
    return size, f"{size}x{size} pixels: {reason}"


def largest_size(machine: Machine, minutes: float) -> int:
    """Return the largest image size that a device trains to pictures in so many minutes (docs/data.md)."""
    if machine.device == "cpu":
        return 32 if minutes < 5 else 64
    by_time = 64 if minutes < 60 else 128 if minutes < 600 else 256
    by_memory = 64 if machine.free_bytes < 8 * _GIB else 128 if machine.free_bytes < 16 * _GIB else 256
    return min(by_time, by_memory)


def _side(sides: Counter[int]) -> int:
    """Return the shorter side that `LARGE_ENOUGH` of the images reach; 0 without images."""
    left = LARGE_ENOUGH * sides.total()
    for side, number in sorted(sides.items(), reverse=True):
        left -= number
        if left <= 0:
            return side
    return 0


def _classes(found: "Findings", count: int) -> tuple[int, str]:
    if not found.classes:
        return 0, "no classes: the images have no labels"
    number, median = len(found.classes), sorted(found.classes.values())[len(found.classes) // 2]
    if number < 2:
        return 0, "no classes: all images have one label"
    if median < LEAST_OF_A_CLASS:
        return (
            0,
            f"no classes: the median of {number:,} labels has fewer than {LEAST_OF_A_CLASS} images ({median})",
        )
    most = max(found.classes) + 1
    if most > min(count, _MOST_CLASSES):
        return 0, f"no classes: the labels are numbers up to {most - 1:,}"
    names = [name if name.isprintable() else ascii(name) for name in found.class_names[:4]]
    shown = f" ({', '.join(names)}{', ..' if len(found.class_names) > 4 else ''})" if names else ""
    return most, f"{most:,} classes{shown}, {median:,} images in the median one, with guidance 2"


def _process(machine: Machine) -> DiffusionConfig:
    """Return the paper's process on a GPU. In the few steps of a CPU, x_0 is learned sooner than eps or v."""
    if machine.device == "cpu":
        return DiffusionConfig(schedule="cosine", prediction="x0", variance="fixedsmall", loss="min_snr")
    return DiffusionConfig(variance="fixedsmall")


def _network(machine: Machine, count: int) -> NetworkSize:
    return "tiny" if machine.device == "cpu" else "base" if count >= MANY_IMAGES else "small"


def _network_reason(machine: Machine, count: int) -> str:
    if machine.device == "cpu":
        return "the one for a CPU"
    return f"the one for a GPU and {'' if count < MANY_IMAGES else 'at least '}{min(count, MANY_IMAGES):,} images"


def _batch(unet: UNetConfig, machine: Machine, count: int, accumulate: int) -> tuple[int, str]:
    """Return the largest power of two that the limits allow, divisible among the processes and micro-batches."""
    at_once = 0.5 * machine.free_bytes / (2 * bytes_per_image(unet))  # half of the memory, and as much for gradients
    by_memory = at_once * accumulate * (machine.processes if machine.device == "cuda" else 1)
    usual = 128 if machine.device != "cpu" else 16 if max(unet.image_shape[1:]) <= 32 else 8
    most = max(1, int(min(usual, count, by_memory)))
    batch, unit = 1 << (most.bit_length() - 1), machine.processes * accumulate
    batch = max(unit, batch // unit * unit)
    reason = f"usual for this size on a {'CPU' if machine.device == 'cpu' else 'GPU'}" if most == usual else (
        f"there are {count:,} images" if most == count else "as memory allows"
    )  # fmt: skip
    return batch, f"batch {batch}: {reason}"
