"""The codec on images: its lengths beside the bound and other codecs', and its speed.

python benchmarks/compression.py CHECKPOINT [--count 1000] [--steps 50 100 1000] [--lossy 5 20 60] [--out FILE.json]

The images are evenly spread embedded digits. For each number of steps the measured length stands beside the bound of
the same timesteps and beside that of all timesteps, both computed here, in float64, from one noise draw for each image
and timestep; PNG, WebP, zlib and lzma code the same images. A lossy row has the error beside the rate, and the rate
that the paper's curve (section 4.3) has at that timestep.
"""

import argparse
import io
import json
import lzma
import sys
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

import fastddpm
from fastddpm.codec import decode, encode
from fastddpm.config import CodecOptions
from fastddpm.data import open_dataset

sys.path.insert(0, str(Path(__file__).parent))
import machine

BATCH = 64


class Timed:
    """A network that counts the seconds it takes; the rest is the codec's own."""

    def __init__(self, sampler: fastddpm.Sampler) -> None:
        self.seconds, self._denoise = 0.0, fastddpm.Sampler.denoise

    def __enter__(self) -> "Timed":
        def denoise(sampler: fastddpm.Sampler, *arguments: Any) -> torch.Tensor:
            start = perf_counter()
            out = self._denoise(sampler, *arguments)
            self.seconds += perf_counter() - start
            return out

        fastddpm.Sampler.denoise = denoise
        return self

    def __exit__(self, *_: object) -> None:
        fastddpm.Sampler.denoise = self._denoise


class Bound:
    """Terms of the bound, bits per dimension, for eps, x_0 or v and the variance fixedsmall or fixedlarge."""

    def __init__(self, sampler: fastddpm.Sampler, images: np.ndarray) -> None:
        self.sampler, self.images = sampler, images
        self.bar = np.cumprod(1 - sampler.diffusion.betas)
        self.errors: dict[int, float] = {}
        self.decoder = 0.0

    def of(self, timesteps: Sequence[int]) -> float:
        """L_T + the KL divergences + the decoder's term, over descending `timesteps` that end in 0."""
        large = self.sampler.diffusion.config.variance == "fixedlarge"
        total = self._prior()
        for t, s in pairwise(timesteps):
            bar, prev = self.bar[t], self.bar[s]
            beta = 1 - bar / prev
            posterior = beta * (1 - prev) / (1 - bar)
            variance = beta if large else posterior
            mean = (np.sqrt(prev) * beta / (1 - bar)) ** 2 * self.error(t)
            total += 0.5 * (posterior / variance - 1 - np.log(posterior / variance) + mean / variance)
        self.error(0)
        return float(total / np.log(2) + self.decoder)

    def rate(self, t: int) -> float:
        """The paper's rate at t: all terms above it."""
        above = self.of([*range(len(self.bar) - 1, t - 1, -1), 0])
        return above - self.of([t, 0]) + float(self._prior() / np.log(2))

    def error(self, t: int) -> float:
        """Mean squared error of the clipped x_0 prediction."""
        if t not in self.errors:
            rng = np.random.default_rng(t)
            parts = [self._error(t, self.images[i : i + BATCH], rng) for i in range(0, len(self.images), BATCH)]
            self.errors[t] = float(np.concatenate(parts).mean())
        return self.errors[t]

    def _error(self, t: int, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        sampler, bar = self.sampler, self.bar[t]
        x0 = images / 127.5 - 1
        x_t = np.sqrt(bar) * x0 + np.sqrt(1 - bar) * rng.normal(size=x0.shape)
        null = sampler.interface.null_label
        label = None if null is None else torch.full((len(x0),), null)
        out = sampler.denoise(torch.tensor(x_t, dtype=torch.float32), t, label).double().numpy()
        prediction = sampler.diffusion.config.prediction
        if prediction == "eps":
            out = (x_t - np.sqrt(1 - bar) * out) / np.sqrt(bar)
        elif prediction == "v":
            out = np.sqrt(bar) * x_t - np.sqrt(1 - bar) * out
        out = np.clip(out, -1, 1)
        if t == 0:
            self.decoder += self._decoder_bits(x0, out) / self.images.size
        return np.square(out - x0)

    def _decoder_bits(self, x0: np.ndarray, mean: np.ndarray) -> float:
        deviation = np.sqrt(self.sampler.diffusion.posterior_variance[1])

        def cdf(z: np.ndarray) -> np.ndarray:
            return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

        upper = np.where(x0 > 0.999, 1.0, cdf((x0 - mean + 1 / 255) / deviation))
        lower = np.where(x0 < -0.999, 0.0, cdf((x0 - mean - 1 / 255) / deviation))
        return float(-np.log2(np.maximum(upper - lower, 1e-12)).sum())

    def _prior(self) -> float:
        bar, x0 = self.bar[-1], self.images / 127.5 - 1
        return float(0.5 * (bar * np.square(x0).mean() - bar - np.log1p(-bar)))


def others(images: np.ndarray) -> dict[str, float]:
    """Bits per dimension of general codecs: one picture for each image, all in one picture, all as one string."""
    columns = next(n for n in range(int(len(images) ** 0.5), 0, -1) if len(images) % n == 0)
    n, _, height, width = images.shape
    rows = images[:, 0].reshape(-1, columns, height, width).transpose(0, 2, 1, 3)
    one = rows.reshape(n // columns * height, columns * width)
    raw = images.tobytes()
    lengths = {
        "PNG, one for each": sum(picture(image[0], "PNG", optimize=True) for image in images),
        "PNG, all in one": picture(one, "PNG", optimize=True),
        "WebP lossless, one for each": sum(picture(i[0], "WEBP", lossless=True, quality=100, method=6) for i in images),
        "WebP lossless, all in one": picture(one, "WEBP", lossless=True, quality=100, method=6),
        "zlib -9, all": len(zlib.compress(raw, 9)),
        "lzma -9e, all": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * length / images.size for name, length in lengths.items()}


def picture(pixels: np.ndarray, kind: str, **options: Any) -> int:
    """Bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return len(file.getvalue())


def measure(sampler: fastddpm.Sampler, images: np.ndarray, options: CodecOptions, bound: Bound) -> dict[str, Any]:
    """One row: lengths in bits per dimension, and images/s."""
    with Timed(sampler) as network:
        start = perf_counter()
        coded = encode(sampler, images, None, options)
        encoding, in_network = perf_counter() - start, network.seconds
        start = perf_counter()
        decoded = decode(sampler, coded.data)
        decoding = perf_counter() - start
        share = network.seconds / (encoding + decoding)
    if not np.array_equal(decoded.images, coded.images):
        raise RuntimeError("decoding gave other images")
    row: dict[str, Any] = {
        "steps": len(coded.header.timesteps), "net": coded.bits_per_dim, "gross": coded.gross_bits_per_dim,
        "initial": coded.initial / coded.dimensions, "overhead": coded.overhead / coded.dimensions,
        "bytes": len(coded.data), "encode_images_per_s": len(images) / encoding,
        "decode_images_per_s": len(images) / decoding, "network_share": share,
        "network_share_encoding": in_network / encoding, "timesteps": list(coded.header.timesteps),
    }  # fmt: skip
    if options.lossy is None:
        if not np.array_equal(decoded.images, images):
            raise RuntimeError("a lossless file gave other images")
        return row | {"bound": bound.of(coded.header.timesteps)}
    error = np.sqrt(np.square(coded.images.astype(float) - images).mean())
    return row | {
        "t": options.lossy, "levels": coded.header.levels, "rmse": float(error),
        "paper_rate": bound.rate(options.lossy), "paper_rmse": 127.5 * bound.error(options.lossy) ** 0.5,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--steps", type=int, nargs="*", default=[50, 100, 1000])
    parser.add_argument("--lossy", type=int, nargs="*", default=[5, 20, 60])
    parser.add_argument("--lossy-steps", type=int, default=50)
    parser.add_argument("--bound-images", type=int, default=256, help="images that the bounds are computed for")
    parser.add_argument("--out", type=Path, help="write what is measured as JSON, too")
    options = machine.parse(parser, arguments)
    model = fastddpm.load(options.checkpoint)
    sampler = fastddpm.Sampler(model.unet, model.diffusion)
    config = model.unet.config
    dataset = open_dataset(None, image_size=config.image_size, channels=config.image_channels)
    total = len(dataset.images)
    images = np.ascontiguousarray(dataset.images[np.arange(options.count) * total // options.count])
    chosen = images[np.arange(options.bound_images) * len(images) // options.bound_images]
    bound = Bound(sampler, chosen if len(chosen) < len(images) else images)
    rows: list[dict[str, Any]] = []
    document = {
        "machine": machine.description() | {"numpy": np.__version__, "pillow": PIL.__version__},
        "model": model.preset.name, "parameters": sum(p.numel() for p in model.unet.parameters()),
        "training_steps": model.preset.train.steps, "images": len(images), "bound_images": len(bound.images),
        "others": others(images), "rows": rows,
    }  # fmt: skip
    print("\n".join(f"  {name:30} {bits:.3f}" for name, bits in document["others"].items()), flush=True)
    document["full_bound"] = bound.of(range(model.diffusion.timesteps - 1, -1, -1))
    print(f"bound of all timesteps: {document['full_bound']:.4f} bits/dim", flush=True)
    wanted = [CodecOptions(steps=steps, batch=BATCH) for steps in options.steps]
    wanted += [CodecOptions(steps=options.lossy_steps, batch=BATCH, lossy=t) for t in options.lossy]
    for each in wanted:
        rows.append(measure(sampler, images, each, bound))
        print({name: value for name, value in rows[-1].items() if name != "timesteps"}, flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
