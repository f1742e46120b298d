"""What README.md and docs say can be typed: the programs run, the commands are understood, the links lead somewhere."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastddpm
from fastddpm.runtime import cli
from fastddpm.training import initial

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")})


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> Iterator[Any]:
    for page in PAGES:
        for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            found = re.search(r"python -m fastddpm\.(\w+)(.*)|torchrun .*-m fastddpm\.(\w+)(.*)", line)
            if found:
                module, arguments = found[1] or found[3], found[2] or found[4] or ""
                yield pytest.param(module, shlex.split(arguments, comments=True), id=f"{page.name}: {found[0][:60]}")


class UnderstoodError(Exception):
    """Instead of what the command would do."""


@pytest.mark.parametrize(("module", "arguments"), list(commands()))
def test_commands_are_understood(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = cli.parse

    def only_parse(*given: Any, **options: Any) -> None:
        parse(*given, **options)
        raise UnderstoodError

    monkeypatch.setattr(cli, "parse", only_parse)
    monkeypatch.setattr(initial, "preset_of_model", lambda source: None)  # reads no model
    name = f"fastddpm.{module}.__main__" if module in ("data", "pretrained") else f"fastddpm.{module}"
    with pytest.raises(UnderstoodError):
        importlib.import_module(name).main([argument for argument in arguments if argument != "--resume"])


@pytest.fixture
def beside_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory where the first command has been, with a network that has learned nothing."""
    digits = fastddpm.data.open_dataset(None, image_size=16, channels=1)
    trainer = fastddpm.Trainer(fastddpm.preset("mnist"), digits, torch.device("cpu"))
    trainer.save(tmp_path / "runs" / "mnist", None)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("beside_a_run")
def test_the_programs_of_the_reference_run() -> None:
    """In order, as one program."""
    names: dict[str, Any] = {}
    for program in blocks(ROOT / "docs" / "api.md", "python"):
        exec(compile(program, "docs/api.md", "exec"), names)
    assert torch.equal(names["again"][0], names["images"][2])
    assert names["images"].shape == (4, 1, 16, 16) and names["images"].abs().max() <= 1
    assert names["losses"].shape == (4,) and bool((names["losses"] > 0.5).all())  # an untrained network predicts 0
    x_t, eps, x0 = (names[name].double().numpy() for name in ("x_t", "eps", "x0"))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[names["t"]].reshape(4, 1, 1, 1)
    np.testing.assert_allclose(x_t, np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * eps, atol=1e-6)
    own, same = names["own"].unet.state_dict(), names["same"].unet.state_dict()
    assert own.keys() == same.keys() and all(torch.equal(own[name], same[name]) for name in own)


@pytest.mark.usefixtures("beside_a_run")
def test_the_readme_program_runs(tmp_path: Path) -> None:
    (program,) = blocks(ROOT / "README.md", "python")
    names: dict[str, Any] = {}
    exec(compile(shortened(program), "README.md", "exec"), names)
    assert names["images"].shape == (2, 1, 16, 16)
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def shortened(program: str) -> str:
    """The README's program with 6 steps for 250 and 2 images for 16."""
    for long, short in (("steps=250", "steps=6"), ("range(16)", "range(2)"), ("[0, 100, 249]", "[0, 2, 5]")):
        assert long in program
        program = program.replace(long, short)
    return program


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
