"""Configurations trained and scored one after another, each once: what the paper's table 2 is made of."""

import dataclasses
import datetime
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm.config import Preset
from fastddpm.data import Dataset
from fastddpm.errors import DataError, DivergedError, UsageError
from fastddpm.metrics import FeatureNetwork, Moments, frechet_distance, inception_score, open_network
from fastddpm.pretrained.model import Model
from fastddpm.runtime.distributed import ProcessGroup
from fastddpm.sampling import batch_size
from fastddpm.sampling.generate import sample_batches, save_pictures
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import to_dict
from fastddpm.storage.files import write_json, write_text
from fastddpm.training.loggers import JsonLines
from fastddpm.training.trainer import Trainer

from .context import EvaluationContext
from .likelihood import measure_bits
from .options import BitsOptions
from .table2 import Cell

Result = dict[str, Any]

_HELD_OUT = 10  # every tenth image is not trained on
_RECORD = "result.json"
_AT_ONCE = 1024  # images given to a feature network
_NUMBERS = ("frechet_distance", "score", "bits_per_dim")


def split(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """What is trained on, and every tenth image, held out for the likelihood."""
    held_out = np.arange(len(dataset.images)) % _HELD_OUT == 0
    parts = []
    for chosen, name in ((~held_out, f"{dataset.name}, 9 of 10"), (held_out, f"{dataset.name}, 1 of 10")):
        labels = None if dataset.labels is None else dataset.labels[chosen]
        parts.append(Dataset.of(dataset.images[chosen], labels, name))
    return parts[0], parts[1]


@dataclass(frozen=True, eq=False)
class Scorer:
    """A feature network, and the moments of the images that samples are compared with: those trained on, as for FID."""

    network: FeatureNetwork
    moments: Moments
    device: torch.device

    @staticmethod
    def of(name: str, dataset: Dataset, device: torch.device) -> "Scorer":
        """The network called `name`, and what it finds in all of `dataset`."""
        network = open_network(
            name, image_size=dataset.images.shape[-1], device=device, report=lambda line: print(line, file=sys.stderr)
        )
        batches = (dataset.images[start : start + _AT_ONCE] for start in range(0, len(dataset.images), _AT_ONCE))
        features = (network(torch.from_numpy(np.array(images)).to(device)).features for images in batches)
        return Scorer(network, Moments.of_batches(features), device)

    def scores(self, images: np.ndarray) -> Result:
        """Of uint8 (N, C, H, W): `frechet_distance`, and `score`, exp of the mean KL divergence of the classes."""
        features, logits = self.network(torch.from_numpy(images).to(self.device))
        found: Result = {"frechet_distance": frechet_distance(Moments.of(features), self.moments)}
        if logits is not None:
            found["score"] = inception_score(logits, splits=1)[0]
        return found


@dataclass(frozen=True, eq=False)
class AblationRunner:
    """Where each configuration leaves its run, what it is trained on and measured with."""

    out: Path
    dataset: Dataset
    held_out: Dataset
    scorer: Scorer | None
    samples: int
    bits: BitsOptions
    device: torch.device

    def result(self, name: str, config: Preset) -> Result:
        """What `config` comes to, from its directory `name` if it has been measured there, else trained and measured.

        `outcome` is "trained", or what went wrong: a run that diverges, and samples that are not numbers, are results.
        A run that was stopped goes on from its checkpoint. Raises `UsageError` where the directory holds another one.
        """
        run = self.out / name
        path, settings = run / _RECORD, self._settings(config)
        record = _read(path) if path.exists() else {}
        if record and record["settings"] != settings:
            raise UsageError(f"{path} is of other settings; choose another --out, or remove {run}")
        if "result" in record:
            found: Result = record["result"]
            return found
        run.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": settings})
        found = self._measure(run, config)
        write_json(path, {"settings": settings, "result": found})
        return found

    def _settings(self, config: Preset) -> Result:
        settings = {
            "config": to_dict(config),
            "data": self.dataset.checksum,
            "samples": self.samples,
            "bits": dataclasses.asdict(self.bits),
            "network": self.scorer.network.checksum if self.scorer else None,
        }
        found: Result = json.loads(json.dumps(settings))
        return found

    def _measure(self, run: Path, config: Preset) -> Result:
        with checkpoint.lock(run):
            trainer = Trainer(config, self.dataset, self.device)
            saved = checkpoint.load_newest(run, lambda line: print(line, file=sys.stderr))
            if saved is not None:
                trainer.resume(saved)
            log = JsonLines(run / "log.jsonl", trainer.step)
            try:
                trainer.run(run, log)
            except DivergedError:
                return {"outcome": f"diverged at step {trainer.step}"}
            finally:
                log.close()
            with trainer.averaged_weights() as unet:
                return self._score(run, Model(unet, trainer.diffusion, config))

    def _score(self, run: Path, model: Model) -> Result:
        sampler = Sampler(model.unet, model.diffusion)
        batch = batch_size.choose(sampler.probe, model.unet.config, self.device)
        found: Result = {"outcome": "trained"}
        try:
            seeds = range(self.samples)
            images = np.concatenate([part.images for part in sample_batches(sampler, seeds, batch=batch)])
        except DataError as error:
            found["outcome"] = f"no samples: {error}"
        else:
            save_pictures(images, seeds, None, [], run)
            found |= {} if self.scorer is None else self.scorer.scores(images)
        context = EvaluationContext(model, sampler, self.held_out, batch, self.device, run, ProcessGroup())
        likelihood = measure_bits(context, self.bits)
        if likelihood["bits_per_dim"] is None and found["outcome"] == "trained":
            found["outcome"] = "bits/dim are not finite"
        return found | {name: likelihood[name] for name in ("bits_per_dim", "standard_error")}


def write_tables(results: Mapping[Cell, Sequence[Result]], runner: AblationRunner, describe: str) -> str:
    """table.md and table.json in the runner's directory, one row for each cell; the Markdown."""
    rows = [_row(cell, found) for cell, found in results.items() if found]
    network = (
        None
        if runner.scorer is None
        else {"name": runner.scorer.network.name, "checksum": runner.scorer.network.checksum}
    )
    document = {
        "rows": rows, "runs": {cell.name: list(found) for cell, found in results.items()}, "settings": describe,
        "network": network, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    write_json(runner.out / "table.json", document)
    text = _markdown(rows, runner, describe)
    write_text(runner.out / "table.md", text)
    return text


def _row(cell: Cell, found: Sequence[Result]) -> Result:
    """Mean and standard deviation over the seeds whose numbers are finite; what went wrong with the others."""
    row: Result = dataclasses.asdict(cell)
    for name in _NUMBERS:
        values = [each[name] for each in found if each.get(name) is not None and math.isfinite(each[name])]
        row[name] = float(np.mean(values)) if values else None
        row[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    row["unstable"] = [each["outcome"] for each in found if each["outcome"] != "trained"]
    return row


def _markdown(rows: Sequence[Result], runner: AblationRunner, describe: str) -> str:
    """Ours beside the paper's; a dash where the paper's training was unstable."""
    fid, score = "Fréchet distance", "classifier score"
    if runner.scorer is not None:
        of_inception = runner.scorer.network.is_inception
        fid, score = ("FID", "IS") if of_inception else (f"{fid} ({runner.scorer.network.name})", score)
    lines = [
        f"| predicts | trained on | {fid} | {score} | bits/dim | | paper: FID | paper: IS | paper: bits/dim |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = [_number(row[name], row[f"{name}_sd"]) for name in _NUMBERS]
        papers = [_number(row[name], None) for name in ("paper_fid", "paper_score", "paper_bits")]
        cells = [row["predicts"], row["objective"], *ours, "; ".join(row["unstable"]), *papers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", describe, ""])


def _number(value: float | None, deviation: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if deviation is None else f"{value:.4g} ± {deviation:.2g}"


def _read(path: Path) -> Result:
    try:
        record: Result = json.loads(path.read_text(encoding="utf-8"))
        record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); remove it to measure again") from error
    return record
