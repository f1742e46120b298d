"""Packaging. The kernels live at the top of the repository and are installed as fastddpm.kernels."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "fastddpm" / "__init__.py").read_text(encoding="utf-8")).group(1)
KERNELS = ["fastddpm.kernels", *(f"fastddpm.kernels.{name}" for name in find_packages("kernels"))]


def library(name: str) -> Extension:
    """A compiled library; csrc/build.py knows how. There is no Python in it: one file name for every version."""
    return Extension(f"fastddpm.kernels.{name}", sources=[], py_limited_api=True, optional=True)


def build_module() -> ModuleType:
    """csrc/build.py; an isolated build does not have the checkout on its path."""
    spec = importlib.util.spec_from_file_location("fastddpm_csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Builds each library by ninja; without a compiler the install succeeds and the reason is kept.

    pip hides the output of a build that succeeds, so the reason goes into kernels/<library>_missing.txt, which
    fastddpm.ops.status() repeats.
    """

    def run(self) -> None:
        self.problems: dict[str, str] = {}
        super().run()
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            name = ext.name.rpartition(".")[2]
            problem = self.problems.get(ext.name)
            for old in [*target.parent.glob(f"{name}.*"), *target.parent.glob(f"{name}_missing.txt")]:
                if problem or old != target:  # a library of other sources must not be loaded
                    old.unlink()
            if problem:
                self.mkpath(str(target.parent))
                target.with_name(f"{name}_missing.txt").write_text(f"{problem}\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        csrc = build_module()
        target = Path(self.get_ext_fullpath(ext.name))
        self.mkpath(str(target.parent))
        try:
            library = csrc.build(ext.name.rpartition(".")[2])
        except csrc.BuildError as problem:
            self.problems[ext.name] = str(problem)
            self.warn(str(problem))
            return
        # Written elsewhere and renamed: a process that has the old file loaded keeps it.
        new = target.with_name(f"{target.name}.new")
        shutil.copyfile(library, new)
        new.chmod(0o755)
        new.replace(target)


setup(
    name="fastddpm",
    version=VERSION,
    description="Denoising Diffusion Probabilistic Models, exact and fast",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastddpm", "fastddpm.*"], exclude=["fastddpm.kernels*"]), *KERNELS],
    package_dir={"fastddpm.kernels": "kernels"},
    ext_modules=[library("_native"), library("_native_cuda")],
    cmdclass={"build_ext": BuildNative},
    package_data={"fastddpm": ["py.typed"], "fastddpm.data": ["mnist5k.npz"]},
    install_requires=[
        # Bounded: an open range would replace a fitting build by the newest one and its gigabytes.
        "torch>=2.11,<2.14",
        "numpy",
        "pillow>=12.3",
        "safetensors",
        "rich",
        "tyro",
    ],
    extras_require={
        "parquet": ["pyarrow"],
        "diffusers": ["diffusers>=0.42.1"],  # to run an exported pipeline; earlier versions have security advisories
        "test": [
            "pytest",
            "pytest-benchmark",
            "hypothesis",
            "diffusers>=0.42.1",
            "pyarrow",
            "scipy",
            "setuptools",
            "ninja",
            "ruff",
            "mypy",
        ],
    },
)
