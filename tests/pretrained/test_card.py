"""The model card: what the hub reads in it, what a reader sees, and that its programs run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import SMALL, TINY, random_model, tiny
from helpers.run_directory import SCORES, session, write_run

import fastddpm
from fastddpm.config import DiffusionConfig, Preset, SampleConfig, TrainConfig
from fastddpm.pretrained.card import markdown, model_card, yaml
from fastddpm.pretrained.facts import Facts, TrainingSet, parameters_of
from fastddpm.pretrained.model import Model
from fastddpm.pretrained.scores import Score
from fastddpm.runtime import network
from fastddpm.sampling.guidance import Guidance
from fastddpm.unet import UNet

DATA = TrainingSet("photos", "ab" * 32, "hf:somebody/photos", ("cat", "dog"), 1234)
SCORE = Score("fid", "train", 12.5, "12.500", "3.17", "100 samples; 7 images", "photos", "2026-01-01", "a distance")
NASTY = '"] x: [1\n---\n# head *a* `b` <script> | [c](http://d) \\ \x00\x85\u2028\ud800\U0001f600 $e$'


def facts(**changes: Any) -> Facts:
    preset = Preset("cifar10", TINY, DiffusionConfig(timesteps=20), TrainConfig(steps=50), SampleConfig(steps=5))
    given = {"preset": preset, "parameters": parameters_of(preset), "steps": 50, "data": DATA, "scores": (SCORE,)}
    return Facts(**given | changes)


def parts(card: str) -> tuple[Any, str]:
    """The front matter as a YAML reader sees it, and the text below."""
    reader = pytest.importorskip("yaml")
    head, front, body = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert head == ""
    return reader.safe_load(front), body


def test_the_front_matter() -> None:
    front, body = parts(model_card(facts()))
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["ddpm", "diffusion", "fastddpm", "pytorch"],
        "datasets": ["somebody/photos"],
        "model-index": [
            {
                "name": "cifar10",
                "results": [
                    {
                        "task": {"type": "unconditional-image-generation"},
                        "dataset": {"type": "photos", "name": "photos", "split": "train"},
                        "metrics": [{"type": "fid", "name": "fid", "value": 12.5}],
                    }
                ],
            }
        ],
    }
    parameters = sum(parameter.numel() for parameter in UNet(TINY).parameters())
    assert f"of {parameters:,} parameters that draws 12×12 colour images, trained on 1,234 images of photos for" in body
    assert "| fid, train | 12.500 | 3.17 | 100 samples; 7 images | a distance |" in body


def test_what_is_unknown_is_left_out() -> None:
    front, body = parts(model_card(facts(steps=None, data=None, scores=())))
    assert set(front) == {"library_name", "pipeline_tag", "tags"}
    assert "trained" not in body.partition("##")[0] and "None is known of these weights" in body
    foreign = facts(preset=Preset("diffusers", TINY), data=None, steps=None)
    assert "| training |" not in model_card(foreign) and "| training |" in model_card(facts())


def test_the_data_set_is_named_as_at_the_hub() -> None:
    """A path is known on one machine only, a name proves nothing, and the embedded digits are known by content."""
    digits = fastddpm.data.open_dataset(None, image_size=16, channels=1).checksum
    for checksum, source, names in (
        (digits, None, ["ylecun/mnist"]),
        ("ab" * 32, None, None),
        ("ab" * 32, "/home/me/digits", None),
        ("ab" * 32, "hf:a/b:train", ["a/b"]),
    ):
        card = model_card(facts(data=TrainingSet("digits", checksum, source)))
        assert parts(card)[0].get("datasets") == names and "/home/me" not in card


def test_a_score_that_is_not_finite_is_not_for_the_hub() -> None:
    for value in (None, float("nan"), float("inf")):
        broken = Score("bpd", "test", value, "not finite", "", "images", "photos", "", "")
        assert "model-index" not in parts(model_card(facts(scores=(broken,))))[0]


def test_the_hub_reads_it() -> None:
    """huggingface_hub's own reader, which finds the scores as evaluation results."""
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(model_card(facts())).data
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("fid", 12.5, "photos")
    assert (data.library_name, data.datasets) == ("diffusers", ["somebody/photos"])


@pytest.mark.parametrize("text", [NASTY, "", "plain", "a: b", "'", "\ufeff\x7f\x9f\uffff", "- x", "&a *b !c"])
def test_yaml_reads_back_every_string(text: str) -> None:
    reader = pytest.importorskip("yaml")
    expected = text.replace("\ud800", "\ufffd")
    assert reader.safe_load(f"name: {yaml([text])}\n") == {"name": [expected]}


@pytest.mark.parametrize("text", [NASTY, "![a](b) | c | ~~d~~ <!-- e -->", "**a** __b__ &lt; http://x"])
def test_markdown_shows_every_string(text: str) -> None:
    """Read by markdown-it, as a paragraph and in a cell: text alone, no markup, no other cell."""
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = " ".join(re.sub("[\x00\x85\u2028\ud800]", " ", text).split())
    for source in (f"x {markdown(text)} y", f"| a | b |\n|---|---|\n| x {markdown(text)} y | z |"):
        inline = [token for token in reader.parse(source) if token.type == "inline"]
        children = [child for token in inline for child in token.children]
        assert {child.type for child in children} <= {"text", "text_special"}
        texts = ["".join(child.content for child in token.children) for token in inline]
        assert f"x {shown} y" in texts and len(texts) in (1, 4)


def test_nasty_names_stay_in_their_places() -> None:
    data = TrainingSet(NASTY, NASTY, f"hf:{NASTY}", (NASTY,), 1)
    score = Score(NASTY, NASTY, 1.0, NASTY, NASTY, NASTY, NASTY, NASTY, NASTY)
    card = model_card(facts(data=data, scores=(score,)))
    front, body = parts(card)
    assert front["datasets"] == [NASTY.partition(":")[0]] and len(front) == 5
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == NASTY.replace("\ud800", "\ufffd")
    assert len(body.splitlines()) == len(parts(model_card(facts()))[1].splitlines())
    assert card.encode()


def program(card: str, heading: str) -> str:
    (code,) = re.findall(rf"^## {heading}\n.*?^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    return str(code)


GUIDED: dict[str, Any] = {
    "guidance": 2.0, "guidance_interval": (1, 2), "guidance_rescale": 0.5, "dynamic_threshold": 0.9,
}  # fmt: skip


def saved(path: Path, **unet: Any) -> str:
    """The card of a model in a pipeline directory at `path`, with short chains."""
    model = random_model(tiny(**unet))
    sample = SampleConfig(steps=2, **(GUIDED if unet else {}))
    preset = Preset("cifar10", model.unet.config, DiffusionConfig(timesteps=4), sample=sample)
    Model(model.unet, fastddpm.Diffusion(preset.diffusion), preset).save_pretrained(path)
    return (path / "README.md").read_text()


@pytest.mark.parametrize("classes", [{}, {"num_classes": 3, "label_dropout": 0.1}], ids=["plain", "classes"])
def test_its_program_for_fastddpm_runs(
    classes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = saved(tmp_path / "pipeline", **classes)
    monkeypatch.chdir(tmp_path / "pipeline")
    names: dict[str, Any] = {}
    exec(program(card, "Draw with fastddpm"), names)
    assert names["images"].shape == (4, 3, 12, 12) and names["sampler"].steps == 2
    assert names["sampler"].guide == (Guidance(*GUIDED.values()) if classes else Guidance())
    table = "ancestral, 2 steps, guidance 2 at t = 1 to 2, rescaled by 0.5, dynamic threshold 0.9"
    assert (table in card) == bool(classes)
    assert ("class-conditional" in parts(card)[0]["tags"]) == bool(classes)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [{}, {"num_classes": 3, "label_dropout": 0.1}], ids=["plain", "classes"])
def test_its_program_for_diffusers_runs(
    classes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    model = random_model(SMALL if not classes else SMALL.__class__(**vars(SMALL) | classes))
    preset = Preset("cifar10", model.unet.config, DiffusionConfig(timesteps=4))
    Model(model.unet, fastddpm.Diffusion(preset.diffusion), preset).save_pretrained(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path / "pipeline")
    names: dict[str, Any] = {}
    code = program((tmp_path / "pipeline" / "README.md").read_text(), "Draw with diffusers")
    exec(code.replace("pipeline(batch_size=4)", "pipeline(batch_size=4, num_inference_steps=4)"), names)
    images = names["images"]
    assert len(images) == 4
    assert images.shape == (4, 3, 8, 8) if classes else images[0].size == (8, 8)


def test_a_model_of_a_run_knows_its_data_and_scores(tmp_path: Path) -> None:
    """Scores of other weights are not its own; the number of images is from environment.json, if it is of that set."""
    digits = fastddpm.data.open_dataset(None, image_size=16, channels=1)
    trainer = fastddpm.Trainer(fastddpm.preset("mnist"), digits, torch.device("cpu"))
    run = tmp_path / "run"
    trainer.save(run, None)
    started = {"name": "digits", "checksum": digits.checksum, "source": None, "images": 5000}
    write_run(run, sessions=[session(data=started)], preset=trainer.preset)
    model = fastddpm.load(run)
    assert (model.run, model.steps) == (run, 0) and model.data is not None
    assert (model.data.name, model.data.images, model.data.source) == ("digits", 5000, None)
    model.save_pretrained(tmp_path / "other")
    assert "None is known" in (tmp_path / "other" / "README.md").read_text()
    own = SCORES | {"checkpoint": SCORES["checkpoint"] | {"network": network.checksum(model.unet)}}
    (run / "evaluation" / "metrics.json").write_text(json.dumps(own))
    model.save_pretrained(tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text()
    assert "| fid, train | 12.346 |" in card and "5,000 images of digits" in card
    (run / "environment.json").write_text(json.dumps({"sessions": [session()]}))  # of another data set
    assert fastddpm.load(run).data == TrainingSet("digits", digits.checksum, None, digits.classes)
    again = fastddpm.load(tmp_path / "own")
    assert (again.run, again.steps, again.data) == (None, None, None)
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), model.unet.parameters(), strict=True))
