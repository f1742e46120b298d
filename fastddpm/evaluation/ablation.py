"""Train and score the configurations of the paper's table 2, each once, and write the table."""

import dataclasses
import datetime
import json
import math
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
from fastddpm.runtime.image_size import image_size
from fastddpm.runtime.progress import announced, log
from fastddpm.sampling import batch_size
from fastddpm.sampling.generate import sample_batches, save_pictures
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage import checkpoint
from fastddpm.storage.documents import read_object, to_dict
from fastddpm.storage.files import write_json, write_text
from fastddpm.training.run_log import JsonLines
from fastddpm.training.trainer import Trainer
from fastddpm.unet import UNet

from .context import EvaluationContext
from .likelihood import measure_bits
from .options import BitsOptions
from .table2 import Cell

Result = dict[str, Any]

_HELD_OUT = 10  # every tenth image is held out
_RECORD = "result.json"
_AT_ONCE = 1024  # images that are given to the feature network at a time
_NUMBERS = ("frechet_distance", "score", "bits_per_dim")


def split(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Return the images to train on, and every tenth image, which is held out for the likelihood."""
    held_out = np.arange(len(dataset.images)) % _HELD_OUT == 0
    parts = []
    for chosen, name in ((~held_out, f"{dataset.name}, 9 of 10"), (held_out, f"{dataset.name}, 1 of 10")):
        labels = None if dataset.labels is None else dataset.labels[chosen]
        parts.append(Dataset.of(dataset.images[chosen], labels, name))
    return parts[0], parts[1]


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores samples by a feature network, against `moments`, the features' moments of the training images."""

    network: FeatureNetwork
    moments: Moments
    device: torch.device

    @staticmethod
    def of(name: str, dataset: Dataset, device: torch.device) -> "Scorer":
        """Open the feature network `name` and compute the moments of its features of all images in `dataset`."""
        with announced(f"opening the feature network {name}"):
            network = open_network(name, image_size=image_size(dataset.images.shape[2:]), device=device, report=log)
        batches = (dataset.images[start : start + _AT_ONCE] for start in range(0, len(dataset.images), _AT_ONCE))
        features = (network(torch.from_numpy(np.array(images)).to(device)).features for images in batches)
        with announced(f"computing the features of {len(dataset.images):,} images"):
            return Scorer(network, Moments.of_batches(features), device)

    def scores(self, images: np.ndarray) -> Result:
        """Return the scores of images uint8 (N, C, H, W).

        `frechet_distance`, and `score` if the network has classes: exp(mean KL(p(y|x) || p(y))).
        """
        with announced(f"scoring {len(images):,} samples"):
            features, logits = self.network(torch.from_numpy(images).to(self.device))
            found: Result = {"frechet_distance": frechet_distance(Moments.of(features), self.moments)}
        if logits is not None:
            found["score"] = inception_score(logits, splits=1)[0]
        return found


@dataclass(frozen=True, eq=False)
class AblationRunner:
    """Trains and measures configurations.

    `out`: directory of the runs. `dataset`: the images to train on. `held_out`: the images for the likelihood.
    `scorer`: None to measure only the likelihood. `samples`: images to draw from each configuration.
    """

    out: Path
    dataset: Dataset
    held_out: Dataset
    scorer: Scorer | None
    samples: int
    bits: BitsOptions
    device: torch.device

    def result(self, name: str, config: Preset) -> Result:
        """Return the result of `config`, read from the directory `name` if it is there, otherwise trained and measured.

        `outcome` is "trained" or tells what went wrong; divergence and samples that are not finite are results, too. An
        interrupted run is resumed from its checkpoint. Raises `UsageError` if the directory holds a run with other
        settings.
        """
        found = self.recorded(name, config)
        if found is not None:
            return found
        run, settings = self.out / name, self._settings(config)
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / _RECORD, {"settings": settings})
        found = self._measure(run, config)
        write_json(run / _RECORD, {"settings": settings, "result": found})
        return found

    def recorded(self, name: str, config: Preset) -> Result | None:
        """Return the result of `config` in the directory `name`, None if there is none yet.

        Raises `UsageError` if the directory holds a run with other settings.
        """
        path = self.out / name / _RECORD
        record = _read(path) if path.exists() else {}
        if record and record["settings"] != self._settings(config):
            raise UsageError(f"{path} was measured with other settings; choose another --out, or remove {path.parent}")
        found: Result | None = record.get("result")
        return found

    def _settings(self, config: Preset) -> Result:
        """Return everything that the result depends on, as it reads back from JSON."""
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
        """Train in the directory `run`, or finish the training that is there, and score the result."""
        with checkpoint.lock(run):
            trainer = Trainer(config, self.dataset, self.device)
            saved = checkpoint.load_newest(run, log)
            if saved is not None:
                trainer.resume(saved)
            logger = JsonLines(run / "log.jsonl", trainer.step)
            try:
                trainer.run(run, logger)
            except DivergedError:
                return {"outcome": f"diverged at step {trainer.step}"}
            finally:
                logger.close()
            with trainer.averaged_weights() as unet:
                assert isinstance(unet, UNet)
                return self._score(run, Model(unet, trainer.diffusion, config))

    def _score(self, run: Path, model: Model) -> Result:
        """Draw samples, save them in `run`, score them, and measure the likelihood."""
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
        context = EvaluationContext(model.preset.name, sampler, self.held_out, batch, self.device, run, ProcessGroup())
        likelihood = measure_bits(context, self.bits)
        if likelihood["bits_per_dim"] is None and found["outcome"] == "trained":
            found["outcome"] = "bits/dim are not finite"
        return found | {name: likelihood[name] for name in ("bits_per_dim", "standard_error")}


def write_tables(results: Mapping[Cell, Sequence[Result]], runner: AblationRunner, describe: str) -> str:
    """Write table.md and table.json to the runner's directory, one row per cell, and return the Markdown.

    `describe`: a sentence about the settings, printed below the table.
    """
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
    """Return mean and standard deviation over the seeds with finite numbers, and the outcomes of the other seeds."""
    row: Result = dataclasses.asdict(cell)
    for name in _NUMBERS:
        values = [each[name] for each in found if each.get(name) is not None and math.isfinite(each[name])]
        row[name] = float(np.mean(values)) if values else None
        row[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    row["unstable"] = [each["outcome"] for each in found if each["outcome"] != "trained"]
    return row


def _markdown(rows: Sequence[Result], runner: AblationRunner, describe: str) -> str:
    """Format the table with the paper's numbers beside the measured ones. A dash: the paper has none."""
    fid, score = "Fréchet distance", "classifier score"
    if runner.scorer is not None:
        network = runner.scorer.network
        fid, score = ("FID", "IS") if network.is_inception else (f"{fid} ({network.name})", score)
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
    """Format a number with its standard deviation."""
    if value is None:
        return "-"
    return f"{value:.4g}" if deviation is None else f"{value:.4g} ± {deviation:.2g}"


def _read(path: Path) -> Result:
    """Read a result file. Raises `DataError` if it is damaged."""
    try:
        record: Result = read_object(path)
    except DataError as error:
        raise DataError(f"{error}; remove it to measure again") from None
    result = record.get("result", {"outcome": ""})
    numbers = [result.get(name) for name in _NUMBERS] if isinstance(result, dict) else [""]
    if (
        not isinstance(record.get("settings"), dict)
        or not isinstance(result, dict)
        or not isinstance(result.get("outcome"), str)
        or not all(number is None or type(number) in (int, float) for number in numbers)
    ):
        raise DataError(f"{path} is damaged: it holds no settings and result; remove it to measure again")
    return record
