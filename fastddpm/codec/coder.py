"""Images to a file's bytes and back."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastddpm.config import CodecOptions
from fastddpm.data.dataset import checksum
from fastddpm.errors import DataError, UsageError
from fastddpm.sampling.sampler import Sampler

from . import bits_back, file_format, fingerprint
from .ans import EMPTY, AnsStack
from .bits_back import RandomPads
from .conditionals import ChainConditionals, pixel_cells
from .file_format import MOST_IMAGES, ChunkRun, Header
from .lossy import as_noisy, levels_at, reconstruct, to_cells
from .quantised import Uniform
from .timesteps import best_timesteps, mean_squared_error

Progress = Callable[[int], None]

_FIRST_LANES = 16
_MOST_LANES = 4096
_SHARE_OF_LANES = 0.25  # of the bits on the stack
_RESERVE = 1.25  # of the bits that a group of images needed, before twice as many are tried


@dataclass(frozen=True, eq=False)
class Encoded:
    """A file's bytes, and where they went; lengths in bits.

    `net`: what the images cost, the variational bound but for chance. `initial`: bits of no content that the first
    images were coded with. `overhead`: header, checksum, and what the stack's head holds beyond its content.
    `images`: uint8 (N, C, H, W), what decoding gives.
    """

    data: bytes
    header: Header
    net: float
    initial: float
    overhead: float
    images: np.ndarray

    @property
    def dimensions(self) -> int:
        return self.images.size

    @property
    def bits_per_dim(self) -> float:
        """Of the images alone."""
        return self.net / self.dimensions

    @property
    def gross_bits_per_dim(self) -> float:
        """Of the whole file."""
        return 8 * len(self.data) / self.dimensions


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images, uint8 (N, C, H, W), and their labels, int64 (N,), where the file has some."""

    images: np.ndarray
    labels: np.ndarray | None
    header: Header


def encode(
    sampler: Sampler,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    options: CodecOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Encoded:
    """Code `images`, uint8 (N, C, H, W), with the sampler's network: exactly, or as coarsely as `options` says.

    `labels`, int64 (N,): coded too, and the images given their class; without them a network with classes is evaluated
    with its null label. The sampler's own steps and guidance do not matter. `progress` is told how many images times
    timesteps are done. Raises `UsageError` for images, labels or options that do not suit the network.
    """
    options = CodecOptions() if options is None else options
    _check_images(sampler, images)
    classes, conditioning = _conditioning(sampler, labels, len(images))
    last = options.last(sampler.diffusion.timesteps)
    plain = Sampler(sampler.unet, sampler.diffusion, engine=sampler.engine)
    timesteps = best_timesteps(plain, images, classes, options.steps, last)
    levels, decoder = 256, None
    if options.lossy is not None:
        levels = levels_at(sampler.diffusion, last)
        error = math.sqrt(mean_squared_error(plain, images, classes, last))
        decoder = max(error, pixel_cells(levels).width / 16)
    coder = _Coder.of(sampler, timesteps, levels, decoder, conditioning)
    encoder = _Encoder(coder, images, classes, options.batch, progress or _silent)
    encoder.run()
    return encoder.finish()


def decode(sampler: Sampler, data: bytes, where: str = "the file", *, progress: Progress | None = None) -> Decoded:
    """The images of a file's bytes, by the network that they were coded with.

    `where` names the file in messages. Raises `DataError` for a file that is damaged or foreign, was made by another
    network, or elsewhere, where the network's outputs have other last bits; nothing is decoded then.
    """
    fields, head, words = file_format.unpack(data, where)
    header = Header.of(fields, where)
    config = sampler.unet.config
    expected = (config.image_channels, config.image_size, config.image_size)
    if header.network != fingerprint.of_network(sampler):
        raise DataError(f"{where} was coded with another model; decoding takes the very weights")
    if header.shape != expected or header.timesteps[0] != sampler.diffusion.timesteps - 1:
        raise DataError(f"{where} does not suit the model: images {header.shape}, timestep {header.timesteps[0]}")
    if (header.conditioning == "none") != (not config.num_classes):
        raise DataError(f"{where} does not suit the model: conditioning {header.conditioning}")
    # Each pixel of a group had its x_T pushed, for more than a bit: who claims larger groups wants memory for nothing.
    if any(run.size * math.prod(expected) > 16 * len(words) for run in header.runs):
        raise DataError(f"{where} claims more images side by side than its {2 * len(words):,} bytes can hold")
    coder = _Coder.of(sampler, list(header.timesteps), header.levels, header.decoder, header.conditioning)
    _check_machine(coder, header, where)
    return _decoded(coder, header, AnsStack(words, head), where, progress or _silent)


@dataclass(frozen=True, eq=False)
class _Coder:
    """What both directions share."""

    sampler: Sampler
    levels: ChainConditionals
    decoder: float | None
    conditioning: str

    @staticmethod
    def of(sampler: Sampler, timesteps: list[int], levels: int, decoder: float | None, conditioning: str) -> "_Coder":
        own = Sampler(sampler.unet, sampler.diffusion, timesteps=timesteps, engine=sampler.engine)
        return _Coder(own, ChainConditionals(own, pixel_cells(levels), decoder), decoder, conditioning)

    @property
    def shape(self) -> tuple[int, int, int]:
        config = self.sampler.unet.config
        return config.image_channels, config.image_size, config.image_size

    def labels(self, size: int) -> np.ndarray | None:
        """For a network with classes and images without."""
        if self.conditioning != "unknown":
            return None
        return np.full(size, self.sampler.unet.null_label, dtype=np.int64)

    def images(self, symbols: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        """uint8 (n, C, H, W) of cells: what they say, and between coarse ones what the network thinks."""
        cells = self.levels.cells
        if cells.bins == 256:
            return symbols.astype(np.uint8).reshape(-1, *self.shape)
        t = as_noisy(self.sampler.diffusion, cells)
        prediction = self.levels.denoised(cells.centres(symbols), t, labels)
        return reconstruct(symbols, prediction, cells).reshape(-1, *self.shape)


class _Encoder:
    """Groups of images, one behind the other onto one stack.

    The first image finds no bits to pop and has to borrow some, and so would every image of a first large group. So the
    first group is one image, and the next is twice as large when the stack holds enough for it.
    """

    def __init__(
        self, coder: _Coder, images: np.ndarray, labels: np.ndarray | None, batch: int, progress: Progress
    ) -> None:
        self.coder, self.labels, self.batch, self.progress = coder, labels, batch, progress
        self.source = images
        self.stack = AnsStack(lending=True)
        self.runs: list[ChunkRun] = []
        self.results: list[np.ndarray] = []

    def run(self) -> None:
        size, done, chunk = 1, 0, 0
        while done < len(self.source):
            size = min(size, len(self.source) - done)
            self.stack.resize(self._lanes(size))
            self.stack.low = before = self.stack.balance
            self._chunk(slice(done, done + size), chunk)
            self._note(size)
            needed = 16 * (before - self.stack.low) / size
            done, chunk = done + size, chunk + 1
            doubled = min(2 * size, self.batch)
            if self._bits() - 64 * self._lanes(doubled) >= _RESERVE * needed * doubled:
                size = doubled

    def finish(self) -> Encoded:
        """Everything onto one lane, and into a file."""
        self.stack.resize(1)
        coder, stack = self.coder, self.stack
        images = np.concatenate(self.results)
        sizes = {run.size for run in self.runs}
        header = Header(
            shape=coder.shape, levels=coder.levels.cells.bins, timesteps=tuple(coder.sampler.timesteps.tolist()),
            runs=tuple(self.runs), decoder=coder.decoder, conditioning=coder.conditioning,
            network=fingerprint.of_network(coder.sampler),
            process=fingerprint.of_process(coder.sampler), outputs=fingerprint.of_outputs(coder.sampler, sizes),
            made=fingerprint.made_by(coder.sampler), pixels=_checksum(images),
        )  # fmt: skip
        data, around = file_format.pack(header.to_dict(), stack.head, stack.words)
        above = math.log2(stack.head / EMPTY)  # of the head's 64 bits those that say something
        return Encoded(
            data, header, net=16 * stack.balance + above, initial=16 * stack.borrowed,
            overhead=8 * around + 64 - above, images=images,
        )  # fmt: skip

    def _chunk(self, part: slice, number: int) -> None:
        coder, pixels = self.coder, self.source[part]
        labels = coder.labels(len(pixels)) if self.labels is None else self.labels[part]
        symbols = to_cells(pixels, coder.levels.cells).reshape(-1)
        before = part.start * len(coder.levels)

        def progress(levels: int) -> None:
            self.progress(before + levels * len(pixels))

        bits_back.encode(self.stack, coder.levels, symbols, labels, RandomPads(number), progress)
        if coder.conditioning == "coded":
            assert labels is not None
            self.stack.push(*Uniform(coder.sampler.unet.config.num_classes, len(labels)).intervals(labels))
        self.results.append(coder.images(symbols, labels))

    def _note(self, size: int) -> None:
        last = self.runs[-1] if self.runs else None
        if last is not None and (last.size, last.lanes) == (size, self.stack.lanes):
            self.runs[-1] = ChunkRun(last.repeats + 1, size, last.lanes)
        else:
            self.runs.append(ChunkRun(1, size, self.stack.lanes))

    def _bits(self) -> float:
        return 16 * (self.stack.balance + self.stack.borrowed) + 56 * self.stack.lanes

    def _lanes(self, size: int) -> int:
        """A power of two; few while there is little on the stack, since a lane holds 48 bits that nobody can pop."""
        most = min(_MOST_LANES, size * math.prod(self.coder.shape), int(_SHARE_OF_LANES * self._bits() / 64))
        return max(_FIRST_LANES, 1 << max(most.bit_length() - 1, 0))


def _decoded(coder: _Coder, header: Header, stack: AnsStack, where: str, progress: Progress) -> Decoded:
    images, labels, done = [], [], 0
    classes = coder.sampler.unet.config.num_classes
    number = sum(run.repeats for run in header.runs)
    backwards = (run for run in reversed(header.runs) for _ in range(run.repeats))  # a list might be endless
    for run in backwards:
        number, size = number - 1, run.size
        stack.resize(run.lanes)
        label = coder.labels(size)
        if header.conditioning == "coded":
            label = stack.pop(size, Uniform(classes, size).find)
            labels.append(label)

        def report(levels: int, size: int = size, done: int = done) -> None:
            progress(done * len(coder.levels) + levels * size)

        count = size * math.prod(coder.shape)
        symbols = bits_back.decode(stack, coder.levels, count, label, RandomPads(number), report)
        images.append(coder.images(symbols, label))
        done += size
    stack.resize(1)
    found = np.concatenate(images[::-1])
    if stack.head != EMPTY or stack.words.any() or _checksum(found) != header.pixels:
        raise DataError(f"{where} does not give the images that were put in; it is damaged")
    return Decoded(found, np.concatenate(labels[::-1]) if labels else None, header)


def _check_machine(coder: _Coder, header: Header, where: str) -> None:
    sizes = {run.size for run in header.runs}
    same = header.process == fingerprint.of_process(coder.sampler)
    if not same or header.outputs != fingerprint.of_outputs(coder.sampler, sizes):
        raise DataError(
            f"{where} was coded by {header.made}; here the network's outputs have other last bits, by "
            f"{fingerprint.made_by(coder.sampler)}. Decode it where it was made, with the same versions and --precision"
        )


def _conditioning(sampler: Sampler, labels: np.ndarray | None, count: int) -> tuple[np.ndarray | None, str]:
    """What the network is told of each image, int64 (N,) or None, and what the header says of that."""
    num_classes, null_label = sampler.unet.config.num_classes, sampler.unet.null_label
    if not num_classes:
        if labels is not None:
            raise UsageError("this network was trained without classes; leave labels out")
        return None, "none"
    if labels is None:
        if null_label is None:
            raise UsageError("this network wants the class of each image; give labels")
        return np.full(count, null_label, dtype=np.int64), "unknown"
    if labels.shape != (count,) or labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(f"labels must be {count} numbers in 0..{num_classes - 1}, one for each image")
    return np.ascontiguousarray(labels, dtype=np.int64), "coded"


def _check_images(sampler: Sampler, images: np.ndarray) -> None:
    config = sampler.unet.config
    expected = (config.image_channels, config.image_size, config.image_size)
    if images.dtype != np.uint8 or images.shape[1:] != expected or not 0 < len(images) <= MOST_IMAGES:
        raise UsageError(
            f"images must be uint8 (N, {', '.join(map(str, expected))}); got {images.dtype} {images.shape}"
        )


def _checksum(images: np.ndarray) -> str:
    return checksum(images, None)[:32]


def _silent(_done: int) -> None:
    pass
