"""python -m fastddpm, the public names of the packages, and what a type checker is told of them."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

import fastddpm
from fastddpm.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGES = ("fastddpm", "fastddpm.codec", "fastddpm.metrics")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastddpm", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_every_command_is_named() -> None:
    sources = [*(ROOT / "fastddpm").glob("*.py"), *(ROOT / "fastddpm").glob("*/__main__.py")]
    commands = {path.parent.name if path.stem == "__main__" else path.stem for path in sources
                if "cli.run(" in path.read_text(encoding="utf-8")}  # fmt: skip
    assert set(COMMANDS) == commands


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)], ids=str)
def test_without_a_command_it_lists_them(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == list(COMMANDS)


def test_version() -> None:
    assert run("--version").stdout == f"fastddpm {fastddpm.__version__}\n"


def test_a_name_that_is_no_command_exits_with_2() -> None:
    done = run("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no command 'trian'\nusage: ")


def test_a_command_gets_its_arguments_and_gives_its_exit_code() -> None:
    short, long = run("train", "--steps", "-1"), [sys.executable, "-m", "fastddpm.train", "--steps", "-1"]
    expected = subprocess.run(long, cwd=ROOT, capture_output=True, text=True)
    assert expected.returncode == 2 and "steps" in expected.stderr
    assert (short.returncode, short.stdout, short.stderr) == (2, expected.stdout, expected.stderr)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_can_be_had(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_names_that_are_imported_when_first_used_are_listed() -> None:
    assert dir(fastddpm) == sorted(fastddpm.__all__)


def test_type_checkers_are_told_the_same_names() -> None:
    """Those imported under TYPE_CHECKING, each from the module where it is found when the program runs."""
    (branch,) = [node for node in _tree(fastddpm).body if isinstance(node, ast.If)]
    told = _imported(branch.body)
    assert told == fastddpm._HOMES
    assert set(fastddpm.__all__) - {"__version__"} == set(told)


@pytest.mark.parametrize("package", ["fastddpm.codec", "fastddpm.metrics"])
def test_a_package_hands_on_what_it_imports(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == set(_imported(_tree(module).body))


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))


def _imported(body: Sequence[ast.stmt]) -> dict[str, str | None]:
    """The names that statements import, each with the module below the package that it is from."""
    found: dict[str, str | None] = {}
    for node in body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name: f".{node.module}" if node.module else None for alias in node.names}
    return found
