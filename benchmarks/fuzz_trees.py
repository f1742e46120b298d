"""The files that `fuzz.py` damages: small trees with a file of every kind that a command reads, and who reads it."""

import csv
import functools
import importlib
import io
import json
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_foreign
import numpy as np
import torch
from PIL import Image

Line = tuple[str, ...]  # a command: its module in fastddpm, then its arguments, paths relative to the tree

_PYTHON, _BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
_MODEL = (
    "--width", "8", "--groups", "4", "--multipliers", "1", "--blocks", "1", "--image-size", "8", "--timesteps", "20",
    "--attention-resolutions", "4", "--batch", "2", "--sample.count", "0", "--device", "cpu",
)  # fmt: skip
_TRAIN: Line = (
    "train", "--preset", "mnist", *_MODEL, "--sample.steps", "2", "--data", "pictures", "--data-workers", "0",
    "--preview-every", "1", "--preview-steps", "2", "--steps", "1", "--out", "run",
)  # fmt: skip
_BEGIN: Line = (
    "train", "--init", "model.safetensors", "--data", "pictures", "--resize", "area", "--image-size", "8",
    "--data-workers", "0", "--batch", "2", "--sample.count", "0", "--device", "cpu", "--steps", "1", "--out", "begun",
)  # fmt: skip
_GO_ON: Line = ("train", "--resume", "--out", "begun", "--steps", "2", "--device", "cpu", "--data-workers", "0")
_RESUME: Line = ("train", "--resume", "--out", "run", "--steps", "2", "--device", "cpu", "--data-workers", "0")
_SAMPLE: Line = ("sample", "run", "--seeds", "0-7", "--shard-size", "4", "--steps", "2", "--out", "samples")
_PACKED: Line = ("sample", "model.safetensors", "--seeds", "0-1", "--steps", "2")
_PIPELINE: Line = ("sample", "pipeline", "--seeds", "0-1", "--steps", "2", "--out", "drawn")
_EVALUATE: Line = (
    "evaluate", "run", "--data", "pictures", "--samples", "4", "--splits", "1", "--kid-subsets", "2",
    "--kid-subset-size", "4", "--neighbours", "1", "--bits.images", "10", "--bits.every", "5", "--batch", "4",
    "--steps", "2",
)  # fmt: skip
_RESULTS: Line = (*_EVALUATE, "--metrics", "fid,is,kid,pr,bpd", "--features", "digits", "--out", "results")
_PARTS: Line = (*_EVALUATE, "--metrics", "bpd", "--out", "parts")
_DECODE: Line = ("compress", "decode", "run", "coded.fdz", "decoded.npz")
_INPAINT: Line = (
    "inpaint", "run", "--seeds", "0", "--resamplings", "1", "--steps", "2", "--frames", "0", "--out", "filled",
)  # fmt: skip
_REFERENCE: Line = (
    "evaluate", "run", "--samples", "4", "--batch", "4", "--steps", "2", "--metrics", "fid", "--features", "digits",
    "--reference", "statistics.npz", "--out", "compared",
)  # fmt: skip
_PAGE: Line = ("page", "run")
_CURVES: Line = ("curves", "run", "--out", "curves.png")
_ABLATION: Line = (
    "ablation", "--cells", "mean-simple,eps-simple", "--steps", "1", "--timesteps", "4", "--samples", "2",
    "--bits.images", "2", "--bits.every", "1", "--network", "none", "--data", "pictures", "--out", "ablation",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kind of file. `files`: a pattern in the tree `tree`. `lines`: the commands that read it, one of which is run.

    `sealed`: the checksums of the checkpoint that holds it are made to fit again, as a forger would. `written`: a
    command may open the file for writing.
    """

    name: str
    tree: str
    files: str
    lines: tuple[Line, ...]
    sealed: bool = False
    written: bool = False


def _reading(source: str, *, size: int = 8, channels: int = 3) -> tuple[Line, ...]:
    """The commands that read a source of images, and training for which it chooses the configuration."""
    shape = ("--image-size", str(size), "--image-channels", str(channels))
    model = [size if before == "--image-size" else text for before, text in zip(("", *_MODEL), _MODEL, strict=False)]
    train = (
        "--preset", "cifar10", *map(str, model), "--image-channels", str(channels), "--sample.steps", "2",
        "--steps", "1",
    )  # fmt: skip
    chosen = (
        "--image-size", str(size), "--steps", "1", "--batch", "2", "--data-workers", "0", "--sample.count", "0",
        "--preview-every", "0", "--device", "cpu", "--out", "chosen",
    )  # fmt: skip
    return (
        ("data.__main__", "inspect", source),
        ("data.__main__", "verify", source, *(() if source.endswith(".fdpack") else shape)),
        ("data.__main__", "pack", source, "new.fdpack", *shape),
        ("train", *train, "--data", source, "--data-workers", "0", "--out", "new"),
        ("train", "--data", source, *chosen),
    )


def _checkpoint_cases() -> list[Case]:
    found = []
    names = ("model.safetensors", "training.safetensors", "config.json", "state.json", "data.json")
    for name in (*names, "manifest.json", "manifest.sha256"):
        lines = (_RESUME, (*_SAMPLE[:-1], "other"))
        path = f"run/checkpoints/*/{name}"
        found.append(Case(f"checkpoint: {name}", "runs", path, lines))
        if name in names:
            found.append(Case(f"checkpoint, sealed again: {name}", "runs", path, lines, sealed=True))
    return found


CASES: tuple[Case, ...] = (
    Case("run: config.json", "runs", "run/config.json", (_RESUME, _CURVES, _PAGE), written=True),
    Case("run: options.json", "runs", "run/options.json", (_RESUME,), written=True),
    Case("run: environment.json", "runs", "run/environment.json", (_RESUME, _CURVES, _PAGE), written=True),
    Case("run: log.jsonl", "runs", "run/log.jsonl", (_RESUME, _CURVES, _PAGE), written=True),
    Case("run: previews", "runs", "run/previews/*.png", (_PAGE,)),
    Case("run: .lock", "runs", "run/.lock", (_RESUME,), written=True),
    *_checkpoint_cases(),
    Case("checkpoint: origin.json", "runs", "begun/checkpoints/*/origin.json", (_GO_ON,)),
    Case("checkpoint, sealed again: origin.json", "runs", "begun/checkpoints/*/origin.json", (_GO_ON,), sealed=True),
    Case("packed model", "runs", "model.safetensors", ((*_BEGIN[:-1], "new"), (*_PACKED, "--out", "drawn"))),
    Case("FID statistics", "runs", "statistics.npz", (_REFERENCE,)),
    Case("samples: sampling.json", "runs", "samples/sampling.json", (_SAMPLE,), written=True),
    Case("samples: shard-*.npz", "runs", "samples/shard-*.npz", (_SAMPLE, (*_SAMPLE, "--png"))),
    Case("samples: .rank-0.lock", "runs", "samples/.rank-0.lock", (_SAMPLE,), written=True),
    Case("evaluation: metrics.json", "runs", "results/metrics.json", (_RESULTS,), written=True),
    Case("evaluation: bits.npz", "runs", "results/train/bits.npz", (_RESULTS,)),
    Case("evaluation: bits-parts", "runs", "parts/train/bits-parts/s*", (_PARTS,)),
    Case("evaluation: features", "runs", "results/features/digits/s*", (_RESULTS,)),
    Case("evaluation: locks", "runs", "results/**/.*.lock", (_RESULTS,), written=True),
    Case("cache: features, moments", "runs", "cache/fastddpm/reference/*/[sm]*", (_RESULTS,)),
    Case("cache: digits classifier", "runs", "cache/fastddpm/features-digits-*/*", (_RESULTS,)),
    Case("cache: meta.json", "runs", "cache/fastddpm/*/meta.json", (_RESUME,)),
    Case("cache: images, labels.npy", "runs", "cache/fastddpm/*/*.npy", (_RESUME,)),
    Case("feature weights: .pth, .safetensors", "runs", "weights.*", ()),
    Case("diffusers: model_index.json", "runs", "pipeline/model_index.json", (_PIPELINE,)),
    Case("diffusers: configurations", "runs", "pipeline/*/*config.json", (_PIPELINE,)),
    Case("diffusers: weights", "runs", "pipeline/unet/*.safetensors", (_PIPELINE,)),
    Case("diffusers: fastddpm.json", "runs", "pipeline/fastddpm.json", (_PIPELINE,)),
    Case("compressed: .fdz", "runs", "coded.fdz", (_DECODE,)),
    Case("inpainting: .npz", "runs", "images.npz", ((*_INPAINT, "--images", "images.npz"),)),
    Case("inpainting: image, mask", "runs", "[hm]*.png", ((*_INPAINT, "--images", "here.png", "--mask", "mask.png"),)),
    Case("ablation: result.json", "ablation", "ablation/*/result.json", (_ABLATION,), written=True),
    Case("images: folder, PNG", "images", "png/*.png", _reading("png")),
    Case("images: folder, JPEG", "images", "jpeg/*.jpg", _reading("jpeg")),
    Case("images: folder, TIFF", "images", "tiff/*.tiff", _reading("tiff")),
    Case("images: folder, WebP, GIF, BMP", "images", "more/*", _reading("more")),
    Case("images: dataset.json", "images", "edm/dataset.json", _reading("edm")),
    Case("images: metadata.jsonl", "images", "lines/metadata.jsonl", _reading("lines")),
    Case("images: metadata.csv", "images", "table/metadata.csv", _reading("table")),
    Case("images: .zip", "images", "*.zip", _reading("images.zip")),
    Case("images: tar shards", "images", "shards/*.tar", _reading("shards")),
    Case("images: parquet", "images", "*.parquet", _reading("images.parquet")),
    Case("images: LMDB", "images", "lsun/data.mdb", _reading("lsun")),
    Case("images: CIFAR-10, Python", "images", f"{_PYTHON}/data_batch_[1-5]", _reading(_PYTHON, size=32)),
    Case("images: CIFAR-10, binary", "images", f"{_BINARY}/*.bin", _reading(_BINARY, size=32)),
    Case("images: CIFAR-10, .tar.gz", "images", "cifar.tar.gz", _reading("cifar.tar.gz", size=32)),
    Case("images: .fdpack", "images", "images.fdpack", _reading("images.fdpack")),
    *(Case(name, "foreign", files, lines) for name, files, lines in fuzz_foreign.FILES),
)  # fmt: skip


class StandIn(torch.nn.Module):
    """In place of the Inception network, which takes 90 MB: the same weights file in small, the same outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.logits = torch.nn.Linear(3, 2048), torch.nn.Linear(3, 1008)

    def folded(self) -> "StandIn":
        return self.eval()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = images.float().mean((2, 3)) / 255
        return self.features(means), self.logits(means)


def lines_of(case: Case, file: Path) -> tuple[Line, ...]:
    """The commands that read `file`; weights are named on the command line."""
    if case.lines:
        return case.lines
    return ((*_EVALUATE, "--metrics", "is", "--features", file.name, "--out", "scores"),)


def main_of(line: Line) -> Callable[[Sequence[str]], None]:
    main: Callable[[Sequence[str]], None] = importlib.import_module(f"fastddpm.{line[0]}").main
    return main


# Making the trees, in the current directory


def _run(*line: str) -> None:
    main_of(line)(line[1:])


def make_runs() -> None:
    import fastddpm
    from fastddpm.evaluation import likelihood
    from fastddpm.pretrained import compact

    _pictures(Path("pictures"), "L", 8)
    _run(*_TRAIN)
    _run(*_SAMPLE)
    _run(*_RESULTS)
    keep = likelihood._keep
    likelihood._keep = _stop  # as if it were killed: bits-parts stays
    try:
        _run(*_PARTS)
    except KeyboardInterrupt:
        likelihood._keep = keep
    _run(
        *_EVALUATE, "--metrics", "fid", "--features", "digits", "--out", "known", "--write-statistics", "statistics.npz"
    )
    compact.pack("run", "model.safetensors")
    _run(*_BEGIN)
    _run("compress", "encode", "run", "pictures", "coded.fdz", "--count", "2")
    fastddpm.load("run").save_pretrained("pipeline")
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8), dtype=np.uint8)
    np.savez("images.npz", images=images, labels=np.arange(8) % 2)
    Image.fromarray(images[0, 0]).save("here.png")
    Image.fromarray(images[1, 0]).save("mask.png")
    weights = StandIn().state_dict()
    torch.save(weights, "weights.pth")
    import safetensors.torch

    safetensors.torch.save_file(weights, "weights.safetensors")


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def make_ablation() -> None:
    _pictures(Path("pictures"), "L", 16)
    _run(*_ABLATION)


def _pictures(
    folder: Path, mode: str, size: int, kinds: Sequence[str] = ("png",), count: int = 20, classes: bool = True
) -> None:
    """Random pictures, in two folders of classes if asked."""
    draw = np.random.default_rng(1)
    for i in range(count):
        path = folder / (("a", "b")[i % 2] if classes else "") / f"{i:02}.{kinds[i % len(kinds)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).convert(mode)
        picture.save(
            path, **({"compression": ("tiff_lzw", "jpeg", "tiff_deflate", None)[i % 4]} if kinds == ("tiff",) else {})
        )


def make_images() -> None:
    _pictures(Path("png"), "RGB", 8, count=4, classes=False)
    _pictures(Path("jpeg"), "RGB", 8, ("jpg",), count=4, classes=False)
    _pictures(Path("tiff"), "RGB", 8, ("tiff",), count=4, classes=False)
    _pictures(Path("more"), "RGB", 8, ("webp", "gif", "bmp"), count=6, classes=False)
    names = sorted(path.name for path in Path("png").iterdir())
    for folder in ("edm", "lines", "table"):
        _pictures(Path(folder), "RGB", 8, count=4, classes=False)
    labels = [[name, i % 2] for i, name in enumerate(names)]
    Path("edm/dataset.json").write_text(json.dumps({"labels": labels}))
    rows = [{"file_name": name, "label": label} for name, label in labels]
    Path("lines/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open("table/metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "label"), *((name, "cat" if label else "dog") for name, label in labels)])
    with zipfile.ZipFile("images.zip", "w") as archive:
        for name in names:
            archive.write(Path("png") / name, name)
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    _shards(names)
    _databases(names)
    _cifar()
    _run("data.__main__", "pack", "edm", "images.fdpack", "--image-size", "8")


def _shards(names: Sequence[str]) -> None:
    Path("shards").mkdir()
    for number in range(2):
        with tarfile.open(f"shards/{number}.tar", "w") as archive:
            for i, name in enumerate(names):
                label = ("cls", b"%d" % (i % 2)) if i % 2 else ("json", json.dumps({"label": i % 2}).encode())
                for ending, data in (("png", (Path("png") / name).read_bytes()), label):
                    info = tarfile.TarInfo(f"{number}{i}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def _databases(names: Sequence[str]) -> None:
    import lmdb
    import pyarrow as pa
    from pyarrow import parquet

    files = [(Path("png") / name).read_bytes() for name in names]
    info = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    table = pa.table(
        {"image": [{"bytes": data, "path": None} for data in files], "label": [i % 2 for i in range(len(files))]}
    )
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), "images.parquet")
    with lmdb.open("lsun", map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for number in range(60):  # more than one leaf; values beside nodes and on pages of their own
            data = files[number % len(files)]
            transaction.put(b"%040d" % number, _long_png(data) if number % 10 == 0 else data)
    Path("lsun/lock.mdb").unlink()


def _long_png(data: bytes) -> bytes:
    """A PNG of more than a page: a comment of 6,000 bytes before its end."""
    chunk = b"tEXt" + b"x\0" + b"y" * 6000
    return data[:-12] + (6002).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[-12:]


def _cifar() -> None:
    draw = np.random.default_rng(2)
    for folder in (_PYTHON, _BINARY):
        Path(folder).mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels, labels = draw.integers(0, 256, (2, 3072), dtype=np.uint8), [1, 2]
        batch = {b"batch_label": b"x", b"labels": labels, b"data": pixels, b"filenames": [b"a.png", b"b.png"]}
        (Path(_PYTHON) / name).write_bytes(pickle.dumps(batch, protocol=2))
        records = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))
        (Path(_BINARY) / f"{name}.bin").write_bytes(records)
    with tarfile.open("cifar.tar.gz", "w:gz") as archive:
        archive.add(_PYTHON)


TREES: dict[str, Callable[[], None]] = {
    "runs": make_runs, "ablation": make_ablation, "images": make_images, "foreign": fuzz_foreign.make_foreign
}  # fmt: skip


def prepare() -> None:
    """Import what the commands use, so that no child has to, and make the classifier of digits quick to train."""
    for name in (
        "train", "sample", "evaluate", "compress", "inpaint", "ablation", "curves", "page", "data.__main__", "codec",
        "training.trainer", "training.samples", "training.environment", "training.loggers", "training.plots",
        "training.profiling", "evaluation.likelihood", "evaluation.quality", "evaluation.report", "evaluation.ablation",
        "evaluation.rate_distortion", "evaluation.figures.draw", "metrics.inception", "metrics.networks",
        "pretrained.run", "pretrained.diffusers", "sampling.generate", "sampling.inpainting", "data.inspect",
        "data.pack.writer", "training.dry_run", "training.page", "pretrained.compact", "metrics.statistics",
        "convert", "pretrained.foreign.conversion", "pretrained.foreign.unpickle_child",
    ):  # fmt: skip
        importlib.import_module(f"fastddpm.{name}")
    for name in ("torch._dynamo", "pyarrow.parquet", "lmdb", "matplotlib.pyplot"):
        importlib.import_module(name)
    Image.init()
    from fastddpm import train
    from fastddpm.data import sources
    from fastddpm.metrics import digits, inception
    from fastddpm.runtime import cli

    fuzz_foreign.unpickle_here()
    digits.SEEDS, digits.EPOCHS = (0,), 1
    inception.InceptionV3 = StandIn  # type: ignore[assignment,misc]
    sources.load_digits = functools.cache(sources.load_digits)
    sources.load_digits(8, 1)
    cli.parse(train.Command, [], program="fastddpm.train")
