"""Encode images to the bytes of a file, and decode them."""

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
"""Takes the number of finished (image, timestep) pairs."""

_FIRST_LANES = 16
_MOST_LANES = 4096
_SHARE_OF_LANES = 0.25  # most of the stack's bits that may be held in lanes
_RESERVE = 1.25  # the next chunk is twice as large if the stack holds this many times the bits that it will need


@dataclass(frozen=True, eq=False)
class Encoded:
    """The bytes of a file and their breakdown; lengths are in bits.

    `net`: bits of the images, on average the variational bound. `initial`: borrowed bits without content that the first
    images were coded with. `overhead`: header, checksum, and the unused bits of the stack's head. `images`: uint8
    (N, C, H, W), the images that decoding returns.
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
        """Bits per dimension of the images alone."""
        return self.net / self.dimensions

    @property
    def gross_bits_per_dim(self) -> float:
        """Bits per dimension of the whole file."""
        return 8 * len(self.data) / self.dimensions


@dataclass(frozen=True, eq=False)
class Decoded:
    """Decoded images, uint8 (N, C, H, W), and their labels, int64 (N,), None if the file has none."""

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
    """Encode `images`, uint8 (N, C, H, W), with the sampler's network: lossless, or lossy if `options.lossy` is set.

    `labels`, int64 (N,): coded too, and the images are coded given their class. Default: a network with classes is
    evaluated with its null label. `options`. Default: `CodecOptions()`. The sampler's own steps and guidance have no
    effect. Raises `UsageError` for images, labels or options that do not suit the network.
    """
    options = CodecOptions() if options is None else options
    _check_images(sampler, images)
    classes, conditioning = _conditioning(sampler, labels, len(images))
    last = options.last(sampler.diffusion.timesteps)
    unguided = sampler.unguided()
    timesteps = best_timesteps(unguided, images, classes, options.steps, last)
    levels, decoder = 256, None
    if options.lossy is not None:
        levels = levels_at(sampler.diffusion, last)
        error = math.sqrt(mean_squared_error(unguided, images, classes, last))
        decoder = max(error, pixel_cells(levels).width / 16)
    coder = _Coder.of(sampler, timesteps, levels, decoder, conditioning)
    encoder = _Encoder(coder, images, classes, options.batch, progress or _silent)
    with coder.sampler.unchanging():
        encoder.run()
        return encoder.finish()


def decode(sampler: Sampler, data: bytes, where: str = "the file", *, progress: Progress | None = None) -> Decoded:
    """Decode the bytes of a file with the network that it was encoded with.

    `where`: the file's name in messages. Raises `DataError` if the file is damaged or foreign, was made by another
    network, or on a machine where the network's outputs differ in the last bits; nothing is decoded then.
    """
    fields, head, words = file_format.unpack(data, where)
    header = Header.of(fields, where)
    expected = sampler.interface.shape
    if header.network != fingerprint.of_network(sampler):
        raise DataError(f"{where} was coded with another model; decode it with exactly the same weights")
    if header.shape != expected or header.timesteps[0] != sampler.diffusion.timesteps - 1:
        raise DataError(f"{where} does not suit the model: images {header.shape}, timestep {header.timesteps[0]}")
    if (header.conditioning == "none") != (not sampler.interface.num_classes):
        raise DataError(f"{where} does not suit the model: conditioning {header.conditioning}")
    # The encoder pushes x_T of each pixel of a chunk, which takes more than one bit. A header that claims larger chunks
    # was not made by it and could only exhaust memory.
    if any(run.size * math.prod(expected) > 16 * len(words) for run in header.runs):
        raise DataError(f"{where} claims larger chunks of images than its {2 * len(words):,} bytes can hold")
    coder = _Coder.of(sampler, list(header.timesteps), header.levels, header.decoder, header.conditioning)
    _check_machine(coder, header, where)
    with coder.sampler.unchanging():
        return _decoded(coder, header, AnsStack(words, head), where, progress or _silent)


@dataclass(frozen=True, eq=False)
class _Coder:
    """The state that encoding and decoding share."""

    sampler: Sampler
    conditionals: ChainConditionals
    decoder: float | None
    conditioning: str

    @staticmethod
    def of(sampler: Sampler, timesteps: list[int], levels: int, decoder: float | None, conditioning: str) -> "_Coder":
        """Return a coder for a chain of `timesteps` and pixels of `levels` levels."""
        chain = sampler.unguided(timesteps)
        return _Coder(chain, ChainConditionals(chain, pixel_cells(levels), decoder), decoder, conditioning)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.sampler.interface.shape

    def labels(self, size: int) -> np.ndarray | None:
        """Return null labels for `size` images if the network has classes and labels are unknown, otherwise None."""
        if self.conditioning != "unknown":
            return None
        return np.full(size, self.sampler.interface.null_label, dtype=np.int64)

    def images(self, symbols: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        """Return the images of cells, uint8 (n, C, H, W); inside coarse cells by the network's x_0 prediction."""
        cells = self.conditionals.cells
        if cells.bins == 256:
            return symbols.astype(np.uint8).reshape(-1, *self.shape)
        t = as_noisy(self.sampler.diffusion, cells)
        prediction = self.conditionals.denoised(cells.centres(symbols), t, labels)
        return reconstruct(symbols, prediction, cells).reshape(-1, *self.shape)


class _Encoder:
    """Encodes chunks of images, one after another, onto one stack.

    The first image finds no bits to pop and has to borrow some, as would every image of a large first chunk. The first
    chunk is therefore one image, and a chunk is twice as large as the one before once the stack holds enough bits.
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
        """Encode all images."""
        size, done, chunk = 1, 0, 0
        while done < len(self.source):
            size = min(size, len(self.source) - done)
            self.stack.resize(self._lanes(size))
            self.stack.low = before = self.stack.balance
            self._encode_chunk(slice(done, done + size), chunk)
            self._record_run(size)
            needed = 16 * (before - self.stack.low) / size
            done, chunk = done + size, chunk + 1
            doubled = min(2 * size, self.batch)
            if self._bits() - 64 * self._lanes(doubled) >= _RESERVE * needed * doubled:
                size = doubled

    def finish(self) -> Encoded:
        """Fold the stack into one lane and return the file."""
        self.stack.resize(1)
        coder, stack = self.coder, self.stack
        images = np.concatenate(self.results)
        sizes = {run.size for run in self.runs}
        header = Header(
            shape=coder.shape, levels=coder.conditionals.cells.bins, timesteps=tuple(coder.sampler.timesteps.tolist()),
            runs=tuple(self.runs), decoder=coder.decoder, conditioning=coder.conditioning,
            network=fingerprint.of_network(coder.sampler),
            process=fingerprint.of_process(coder.sampler), outputs=fingerprint.of_outputs(coder.sampler, sizes),
            made=fingerprint.made_by(coder.sampler), pixels=_checksum(images),
        )  # fmt: skip
        data, around = file_format.pack(header.to_dict(), stack.head, stack.words)
        in_head = math.log2(stack.head / EMPTY)  # the head's bits that carry content
        return Encoded(
            data, header, net=16 * stack.balance + in_head, initial=16 * stack.borrowed,
            overhead=8 * around + 64 - in_head, images=images,
        )  # fmt: skip

    def _encode_chunk(self, part: slice, number: int) -> None:
        coder, pixels = self.coder, self.source[part]
        labels = coder.labels(len(pixels)) if self.labels is None else self.labels[part]
        symbols = to_cells(pixels, coder.conditionals.cells).reshape(-1)
        before = part.start * len(coder.conditionals)

        def progress(timesteps: int) -> None:
            self.progress(before + timesteps * len(pixels))

        bits_back.encode(self.stack, coder.conditionals, symbols, labels, RandomPads(number), progress)
        if coder.conditioning == "coded":
            assert labels is not None
            self.stack.push(*Uniform(coder.sampler.interface.num_classes, len(labels)).intervals(labels))
        self.results.append(coder.images(symbols, labels))

    def _record_run(self, size: int) -> None:
        """Record a chunk of `size` images in `runs`, joined with the last run if that is alike."""
        last = self.runs[-1] if self.runs else None
        if last is not None and (last.size, last.lanes) == (size, self.stack.lanes):
            self.runs[-1] = ChunkRun(last.repeats + 1, size, last.lanes)
        else:
            self.runs.append(ChunkRun(1, size, self.stack.lanes))

    def _bits(self) -> float:
        """Return the number of bits on the stack, with 56 for each lane, which holds 48 to 64."""
        return 16 * (self.stack.balance + self.stack.borrowed) + 56 * self.stack.lanes

    def _lanes(self, size: int) -> int:
        """Return the number of lanes for `size` images, a power of two.

        It is small while the stack holds little, because a lane holds 48 bits that cannot be popped.
        """
        most = min(_MOST_LANES, size * math.prod(self.coder.shape), int(_SHARE_OF_LANES * self._bits() / 64))
        return max(_FIRST_LANES, 1 << max(most.bit_length() - 1, 0))


def _decoded(coder: _Coder, header: Header, stack: AnsStack, where: str, progress: Progress) -> Decoded:
    """Decode the chunks, the last one first, and verify the images and the borrowed bits."""
    images, labels, done = [], [], 0
    classes = coder.sampler.interface.num_classes
    number = sum(run.repeats for run in header.runs)
    chunks = (run for run in reversed(header.runs) for _ in range(run.repeats))  # lazily: a hostile header has billions
    for run in chunks:
        number, size = number - 1, run.size
        stack.resize(run.lanes)
        label = coder.labels(size)
        if header.conditioning == "coded":
            label = stack.pop(size, Uniform(classes, size).find)
            labels.append(label)

        def report(timesteps: int, size: int = size, done: int = done) -> None:
            progress(done * len(coder.conditionals) + timesteps * size)

        count = size * math.prod(coder.shape)
        symbols = bits_back.decode(stack, coder.conditionals, count, label, RandomPads(number), report)
        images.append(coder.images(symbols, label))
        done += size
    stack.resize(1)
    found = np.concatenate(images[::-1])
    if stack.head != EMPTY or stack.words.any() or _checksum(found) != header.pixels:
        raise DataError(f"{where} does not give the images that were encoded; it is damaged")
    return Decoded(found, np.concatenate(labels[::-1]) if labels else None, header)


def _check_machine(coder: _Coder, header: Header, where: str) -> None:
    """Raise `DataError` if the chain's tables or the network's outputs differ from the encoder's in any bit."""
    sizes = {run.size for run in header.runs}
    same = header.process == fingerprint.of_process(coder.sampler)
    if not same or header.outputs != fingerprint.of_outputs(coder.sampler, sizes):
        raise DataError(
            f"{where} was coded by {header.made}; here the network's outputs have other last bits, by "
            f"{fingerprint.made_by(coder.sampler)}. Decode it on the machine that made it, with the same versions and "
            "--precision"
        )


def _conditioning(sampler: Sampler, labels: np.ndarray | None, count: int) -> tuple[np.ndarray | None, str]:
    """Return the labels to evaluate the network with, int64 (N,) or None, and the header's `conditioning`."""
    num_classes, null_label = sampler.interface.num_classes, sampler.interface.null_label
    if not num_classes:
        if labels is not None:
            raise UsageError("this network was trained without classes; leave labels out")
        return None, "none"
    if labels is None:
        if null_label is None:
            raise UsageError("this network needs the class of each image; give labels")
        return np.full(count, null_label, dtype=np.int64), "unknown"
    if labels.shape != (count,) or labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(f"labels must be {count} numbers in 0..{num_classes - 1}, one per image")
    return np.ascontiguousarray(labels, dtype=np.int64), "coded"


def _check_images(sampler: Sampler, images: np.ndarray) -> None:
    expected = sampler.interface.shape
    if images.dtype != np.uint8 or images.shape[1:] != expected or not 0 < len(images) <= MOST_IMAGES:
        raise UsageError(
            f"images must be uint8 (N, {', '.join(map(str, expected))}); got {images.dtype} {images.shape}"
        )


def _checksum(images: np.ndarray) -> str:
    return checksum(images, None)[:32]


def _silent(_done: int) -> None:
    pass
