"""The layers are the folders: imports point down only, and there is no circle among the files."""

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train",
    "classifier",
    "sample",
    "evaluate",
    "average",
    "inpaint",
    "compress",
    "ablation",
    "page",
    "curves",
    "doctor",
    "convert",
    "export",
    "data.__main__",
}
LAYERS = [
    {"errors"},
    {"kernels", "storage", "runtime"},
    {"ops", "config"},
    {"presets", "unet", "diffusion"},
    {"data"},
    {"metrics", "pretrained"},
    {"sampling"},
    {"training", "codec"},
    {"evaluation"},
    COMMANDS,
]
# The version is no layer's; `fastddpm` itself only hands on the public names, and so does `python -m fastddpm`.
NO_LAYER = {"fastddpm", "fastddpm.__main__"}


def module_of(path: Path) -> str:
    """The dotted name of a file: kernels/ is fastddpm.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fastddpm", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {
    module_of(path): path
    for folder in ("fastddpm", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "fastddpm/kernels" not in path.relative_to(ROOT).as_posix()  # a link to kernels/
}


def imported(source: str, module: str, modules: Mapping[str, object], *, package: bool = False) -> set[str]:
    """The modules of ours that a file imports, wherever in it and whenever that runs."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")
            above = above[: len(above) - node.level + package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= inner & modules.keys()
            if not inner <= modules.keys():
                found.add(base)
    return {name for name in found if name.partition(".")[0] == "fastddpm"}


def floor_of(module: str) -> int:
    """The number of the layer that a module belongs to."""
    inner = module.removeprefix("fastddpm.")
    name = inner if inner in COMMANDS else inner.partition(".")[0]
    return next(number for number, names in enumerate(LAYERS) if name in names)


def upward(source: str, module: str, modules: Mapping[str, object]) -> set[str]:
    """What a file imports from its own layer's other folders, or from a higher one."""
    own = module.split(".")[1]
    return {
        name
        for name in imported(source, module, modules)
        if name == "fastddpm"
        or ((name.split(".")[1] != own or module == "fastddpm.data.__main__") and floor_of(name) >= floor_of(module))
    }


GRAPH = {
    module: imported(path.read_text(), module, PATHS, package=path.name == "__init__.py") - {module}
    for module, path in PATHS.items()
    if module not in NO_LAYER
}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or nothing. A package counts as what its own file imports."""
    done: set[str] = set()
    way: list[str] = []

    def visit(module: str) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        way.append(module)
        for name in sorted(graph.get(module, ())):
            if found := visit(name):
                return found
        done.add(way.pop())
        return []

    return next((found for module in sorted(graph) if (found := visit(module))), [])


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_point_down(module: str) -> None:
    path = PATHS[module]
    source = path.read_text().replace("from fastddpm import __version__", "")
    assert upward(source, module + (".x" if path.name == "__init__.py" else ""), PATHS) == set()


def test_no_circle() -> None:
    assert circle(GRAPH) == []


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("from fastddpm.sampling.sampler import Sampler", "fastddpm.unet", {"fastddpm.sampling.sampler"}),
        ("from .training import trainer", "fastddpm.diffusion", {"fastddpm.training.trainer"}),
        ("from ..unet import UNet", "fastddpm.ops.attention", {"fastddpm.unet"}),
        ("def f():\n    import fastddpm.train", "fastddpm.pretrained.model", {"fastddpm.train"}),
        ("from fastddpm import unet, errors", "fastddpm.ops.attention", {"fastddpm.unet"}),
        ("from ..ops import status", "fastddpm.kernels.native", {"fastddpm.ops"}),
        ("import fastddpm", "fastddpm.unet", {"fastddpm"}),
        ("from fastddpm import UNet", "fastddpm.data.cache", {"fastddpm"}),
        ("from fastddpm.runtime import cli", "fastddpm.storage.files", {"fastddpm.runtime.cli"}),
        ("from .registry import register\nfrom fastddpm.kernels import philox", "fastddpm.ops.attention", set()),
    ],
)
def test_the_check_itself(source: str, module: str, found: set[str]) -> None:
    assert upward(source, module, PATHS) == found


def test_the_search_for_circles_itself() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def libraries(source: str) -> set[str]:
    """First names of what a file imports absolutely, the standard library left out."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found - sys.stdlib_module_names


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_kernels_know_tensors_and_themselves_only(path: Path) -> None:
    assert libraries(path.read_text()) <= {"torch", "numpy", "triton"}


def test_the_check_of_libraries_itself() -> None:
    source = "import os, rich.console\nfrom ..philox import eager\ndef f():\n    from fastddpm.kernels import philox"
    assert libraries(source) == {"rich", "fastddpm"}


def test_beside_the_commands_there_are_sixteen_things_at_most() -> None:
    things = {
        path.stem for path in (ROOT / "fastddpm").iterdir() if path.name[0] not in "_." and path.suffix != ".typed"
    }
    assert len(things - COMMANDS) <= 16, sorted(things - COMMANDS)


def test_the_commands_parse_their_options_without_torch() -> None:
    modules = [f"fastddpm.{name}" for name in ("presets", "data", "pretrained.__main__", *sorted(COMMANDS))]
    program = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
