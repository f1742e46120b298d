"""The model card: README.md of a pipeline directory, with the front matter that the Hugging Face hub reads."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from fastddpm import __version__
from fastddpm.errors import UsageError

from .facts import Facts, TrainingSet
from .scores import Score

# By their checksums: the embedded digits at 16x16, which are a part of that set.
_HUB_SETS = {"239c9111985941a7a52ffb4d9890889e8798739d6dbf3292344fb4eda0e4849a": "ylecun/mnist"}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NOT_PRINTABLE = re.compile("[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def check_license(license: str | None) -> None:
    """Raise `UsageError` unless `license` is None or of the form of the hub's identifiers, as apache-2.0."""
    if license is not None and not (isinstance(license, str) and _LICENSE.fullmatch(license)):
        raise UsageError(
            f"license must be an identifier of the Hugging Face hub, as apache-2.0, mit or other; got {license!r:.100}"
        )


def model_card(facts: Facts, license: str | None = None) -> str:
    """Return the model card of a model in a `DDPMPipeline` directory, as Markdown with YAML front matter.

    `license`: an identifier that `check_license` takes. Default: none is stated, because none is known. Of a path only
    the last part is told, as the rest is of one machine.
    """
    if facts.data is not None:
        data = dataclasses.replace(facts.data, name=PurePath(facts.data.name).name or facts.data.name)
        facts = dataclasses.replace(facts, data=data)
    title = facts.preset.name if facts.data is None else facts.data.name
    missing = "<!-- Before you publish this, state a license in the lines above, as in license: apache-2.0 -->"
    parts = [
        _front_matter(facts, license),
        *([missing] if license is None else []),
        f"# DDPM of {markdown(title)}",
        markdown(facts.sentence),
        _table(("", ""), facts.rows()),
        "## Draw with fastddpm",
        _fastddpm_code(facts),
        "## Draw with diffusers",
        _diffusers_code(facts),
        "## Scores",
        _scores(facts.scores),
        f"Written by fastddpm {__version__}. `fastddpm.json` in this directory holds the whole configuration.",
    ]
    return "\n\n".join(parts) + "\n"


def markdown(text: str) -> str:
    """Return text as one line of Markdown that shows exactly these characters, also in a cell of a table."""
    line = " ".join(_NOT_PRINTABLE.sub(" ", text).split())
    return re.sub(r"([\\`*_\[\]<>|&~$#])", r"\\\1", line)


def yaml(value: Any) -> str:
    """Return a JSON value as YAML, whose flow style contains JSON, with characters that YAML does not take escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_PRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return "\\uFFFD" if 0xD800 <= code < 0xE000 else f"\\u{code:04X}"  # half of a character has no meaning alone


def _front_matter(facts: Facts, license: str | None) -> str:
    tags = ["ddpm", "diffusion", "fastddpm", "pytorch"]
    if facts.preset.unet.num_classes:
        tags.append("class-conditional")
    fields: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": tags,
    }
    if license is not None:
        fields["license"] = license
    if facts.data is not None and (name := _hub_name(facts.data)) is not None:
        fields["datasets"] = [name]
    results = [_result(score) for score in facts.scores if score.value is not None and math.isfinite(score.value)]
    if results:
        fields["model-index"] = [{"name": facts.preset.name, "results": results}]
    lines = [f"{name}: {yaml(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _hub_name(data: TrainingSet) -> str | None:
    """Return the name of a training set at the hub; None if it has none that is known."""
    if data.source is not None and data.source.startswith("hf:"):  # hf:NAME or hf:NAME:SPLIT
        return data.source.split(":")[1]
    return _HUB_SETS.get(data.checksum)


def _result(score: Score) -> dict[str, Any]:
    return {
        "task": {"type": "unconditional-image-generation"},
        "dataset": {"type": score.data_name, "name": score.data_name, "split": score.split},
        "metrics": [{"type": score.name.partition("[")[0], "name": score.name, "value": score.value}],
    }


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(markdown, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _scores(scores: tuple[Score, ...]) -> str:
    if not scores:
        return "None is known of these weights. `python -m fastddpm.evaluate RUN` measures them."
    rows = [(f"{s.name}, {s.split}", s.measured, s.paper, s.data, s.definition) for s in scores]
    return _table(("metric, split", "measured", "paper", "on", "definition"), rows)


def _fastddpm_code(facts: Facts) -> str:
    sample, diffusion = facts.preset.sample, facts.preset.diffusion
    options = [f"steps={sample.steps or diffusion.timesteps}"]
    if sample.method != "ancestral":
        options.append(f'method="{sample.method}"' + (f", eta={sample.eta:g}" if sample.method == "ddim" else ""))
    if sample.spacing != "even":
        options.append(f'spacing="{sample.spacing}"')
        if offset := sample.spacing_options()["steps_offset"]:
            options.append(f"steps_offset={offset}")
    if sample.guidance != 1:
        options.append(f"guidance={sample.guidance:g}")
        if sample.guidance_interval is not None:
            options.append(f"guidance_interval={sample.guidance_interval}")
        if sample.guidance_rescale:
            options.append(f"guidance_rescale={sample.guidance_rescale:g}")
    if sample.dynamic_threshold is not None:
        options.append(f"dynamic_threshold={sample.dynamic_threshold:g}")
        if sample.dynamic_threshold_max is not None:
            options.append(f"dynamic_threshold_max={sample.dynamic_threshold_max:g}")
    labels = ", labels=[0] * 4" if facts.preset.unet.num_classes else ""
    return _python(
        "import fastddpm",
        "",
        'model = fastddpm.load(".")  # this directory',
        f"sampler = fastddpm.Sampler(model.unet, model.diffusion, {', '.join(options)})",
        f"images = sampler.sample(seeds=range(4){labels})  # float32 (N, C, H, W) in [-1, 1]",
    )


def _diffusers_code(facts: Facts) -> str:
    unet = facts.preset.unet
    if not unet.num_classes:
        return _python(
            "from diffusers import DDPMPipeline",
            "",
            'pipeline = DDPMPipeline.from_pretrained(".")  # this directory, or its name on the hub',
            "images = pipeline(batch_size=4).images",
        )
    code = _python(
        "import torch",
        "from diffusers import DDPMScheduler, UNet2DModel",
        "",
        'network = UNet2DModel.from_pretrained(".", subfolder="unet")  # this directory, or its name on the hub',
        'scheduler = DDPMScheduler.from_pretrained(".", subfolder="scheduler")',
        f"x = torch.randn(4, {', '.join(map(str, unet.image_shape))})",
        "labels = torch.zeros(4, dtype=torch.int64)",
        "for t in scheduler.timesteps:",
        "    with torch.no_grad():",
        "        output = network(x, t, class_labels=labels).sample",
        "    x = scheduler.step(output, t, x).prev_sample",
        "images = (x.clamp(-1, 1) + 1) / 2  # (N, C, H, W) in [0, 1]",
    )
    null = f" Label {unet.num_classes} stands for no class." if unet.label_dropout else ""
    return f"`DDPMPipeline` passes no class, so the loop is written out.{null}\n\n{code}"


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
