"""docs/architecture.md says what the code is: the tree of files, the layers, and the stops of the walks."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from project.test_layers import LAYERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOPS = sorted(set(re.findall(r"`([\w/]+\.(?:py|cpp|h)):(\w+(?:\.\w+)*)`", PAGE)))


def tree(page: str) -> Iterator[str]:
    """The paths of the page's trees, from their indentation; folders end in /."""
    for block in re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        folders: list[str] = []
        for line in block.splitlines():
            depth = (len(line) - len(line.lstrip())) // 2
            name = line.split()[0]
            yield "".join([*folders[:depth], name])
            if name.endswith("/"):
                folders[depth:] = [name]


def files(folder: Path) -> set[str]:
    """Python files below a folder of the repository; an __init__.py counts if it defines something."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*.py")
        if path.name != "__init__.py" or definitions(path.read_text(encoding="utf-8"))
    }


def definitions(source: str) -> set[str]:
    """Functions and classes of a module, and methods as CLASS.METHOD."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_the_tree_is_the_package() -> None:
    named = list(tree(PAGE))
    assert len(set(named)) == len(named)
    package = {path for path in files(ROOT / "fastddpm") if not path.startswith("fastddpm/kernels/")}
    assert {path for path in named if path.startswith("fastddpm/") and path.endswith(".py")} == package
    kernels = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "kernels").iterdir()}
    kernels = {name for name in kernels if name.endswith((".py", "/")) and name[0] != "_"}
    assert {path.removeprefix("kernels/") for path in named if path.startswith("kernels/")} - {""} == kernels


def test_every_line_of_the_tree_says_something() -> None:
    lines = re.findall(r"^ +[\w/]+\.py.*$", PAGE, re.MULTILINE)
    assert len(lines) > 100 and [line for line in lines if len(line.split()) < 2] == []


def test_the_layers_are_those_that_are_checked() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    named = [(int(number), set(re.findall(r"`([\w.]+)`", names))) for number, names in reversed(rows)]
    assert named == list(enumerate(LAYERS, 1))


@pytest.mark.parametrize(("path", "name"), STOPS, ids=[f"{path}:{name}" for path, name in STOPS])
def test_every_stop_exists(path: str, name: str) -> None:
    file = ROOT / path if path.startswith("csrc/") else ROOT / "fastddpm" / path
    source = file.read_text(encoding="utf-8")
    if path.endswith(".py"):
        assert name in definitions(source)
    else:
        assert re.search(rf"\b{name}\(", source)


def test_there_are_four_walks() -> None:
    assert len(STOPS) > 50


def test_the_readers_of_the_page_themselves() -> None:
    page = "```\na/\n  b.py   one\n  c/\n    d.py  two\n  e.py  three\n```\n"
    assert list(tree(page)) == ["a/", "a/b.py", "a/c/", "a/c/d.py", "a/e.py"]
    assert definitions("def f(): pass\nclass A:\n    def g(self): pass\nX = 1") == {"f", "A", "A.g"}
