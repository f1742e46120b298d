"""Imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    4: {"train", "sample", "cli", "dry_run", "doctor", "evaluate", "inpaint", "compress", "ablation", "curves"},
    3: {"trainer", "sampler", "generate", "checkpoint", "manifest", "untrusted", "model", "data", "interchange",
        "figures", "files", "runlog", "device", "selftest", "shards", "batching", "processes", "chain_options",
        "parallel", "sharded", "signals", "finite", "closing", "monitor", "metrics", "evaluation", "codec"},
    2: {"unet", "inference", "chain", "diffusion", "likelihood", "schedules", "noise", "optim", "config", "presets",
        "threads"},
    1: {"ops"},
    0: {"kernels"},
}  # fmt: skip
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
EVERYWHERE = {"errors", "lazy", "__version__"}  # no layer; kernels know nothing of the package at all


def imported(source: str, package: str) -> set[str]:
    """First names below fastddpm that a file of `package` ("fastddpm", "fastddpm.ops", ..) imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            # Through the package itself every public name can be had, whatever its layer.
            names = ["fastddpm.fastddpm" if alias.name == "fastddpm" else alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "fastddpm" else [module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("fastddpm.")}
    return found


def libraries(source: str) -> set[str]:
    """First names of what a file imports absolutely, the standard library left out."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found - sys.stdlib_module_names


def upward_imports(source: str, package: str, home: str) -> set[str]:
    """What a file of the module or package `home` imports from a higher layer, or from no known one."""
    allowed = {name for name, layer in LAYER_OF.items() if layer <= LAYER_OF[home]} | {home}
    if home != "kernels":
        allowed |= EVERYWHERE
    return imported(source, package) - allowed


FILES = [
    path
    for folder in ("fastddpm", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "fastddpm" / "__init__.py" and "fastddpm/kernels" not in path.relative_to(ROOT).as_posix()
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    home = "kernels" if parts[0] == "kernels" else parts[1]
    if parts[-1] == "__main__":  # the command of a package that is otherwise lower
        home = "cli"
    if home in EVERYWHERE:
        assert imported(path.read_text(), "fastddpm") == set()
        return
    package = ".".join(parts[:-1]) if parts[0] == "fastddpm" else ".".join(("fastddpm", *parts[:-1]))
    assert upward_imports(path.read_text(), package, home) == set()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_kernels_know_tensors_and_themselves_only(path: Path) -> None:
    assert libraries(path.read_text()) <= {"torch", "numpy", "triton"}


def test_the_check_of_libraries_itself() -> None:
    source = "import os, rich.console\nfrom ..philox import eager\ndef f():\n    from fastddpm.kernels import philox"
    assert libraries(source) == {"rich", "fastddpm"}


@pytest.mark.parametrize(
    ("source", "package", "home", "found"),
    [
        ("from fastddpm.sampler import Sampler", "fastddpm", "unet", {"sampler"}),
        ("from .trainer import Trainer", "fastddpm", "diffusion", {"trainer"}),
        ("from ..unet import UNet", "fastddpm.ops", "ops", {"unet"}),
        ("def f():\n    import fastddpm.train", "fastddpm", "model", {"train"}),
        ("from fastddpm import checkpoint", "fastddpm", "optim", {"checkpoint"}),
        ("from . import trainer", "fastddpm", "unet", {"trainer"}),
        ("from ..ops import status", "fastddpm.kernels", "kernels", {"ops"}),
        ("import fastddpm", "fastddpm", "unet", {"fastddpm"}),
        ("from fastddpm.errors import UsageError", "fastddpm.kernels.q_sample", "kernels", {"errors"}),
        ("from .registry import register\nfrom fastddpm.kernels import philox", "fastddpm.ops", "ops", set()),
    ],
)
def test_the_check_itself(source: str, package: str, home: str, found: set[str]) -> None:
    assert upward_imports(source, package, home) == found


def test_config_and_data_do_not_load_torch() -> None:
    commands = [f"fastddpm.{name}" for name in sorted(LAYERS[4] - {"dry_run"})]
    program = f"import sys, fastddpm.presets, fastddpm.data, {', '.join(commands)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
