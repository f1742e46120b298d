"""Packaging. The kernels live at the top of the repository and are installed as fastddpm.kernels."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "fastddpm" / "__init__.py").read_text()).group(1)
NATIVE = Extension(
    "fastddpm.kernels._native",
    sources=["csrc/random_normal.cpp"],
    depends=["csrc/fastddpm.h", "csrc/philox.h"],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden"],
    optional=True,  # without a compiler the install succeeds, and fastddpm.ops.status() says what is slower
)
KERNELS = ["fastddpm.kernels", *(f"fastddpm.kernels.{name}" for name in find_packages("kernels"))]


class BuildWithThreads(build_ext):
    """Compiles with OpenMP where the compiler has it, else without."""

    def build_extension(self, ext: Extension) -> None:
        plain = list(ext.extra_compile_args)
        try:
            ext.extra_compile_args, ext.extra_link_args = [*plain, "-fopenmp"], ["-fopenmp"]
            super().build_extension(ext)
        except Exception as error:  # each compiler class has its own error; the second try decides
            self.warn(f"building {ext.name} with OpenMP failed ({error}); trying without")
            ext.extra_compile_args, ext.extra_link_args = plain, []
            super().build_extension(ext)


setup(
    name="fastddpm",
    version=VERSION,
    description="Denoising Diffusion Probabilistic Models, exact and fast",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastddpm", "fastddpm.*"], exclude=["fastddpm.kernels*"]), *KERNELS],
    package_dir={"fastddpm.kernels": "kernels"},
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildWithThreads},
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
        "test": [
            "pytest",
            "pytest-benchmark",
            "hypothesis",
            "diffusers>=0.38",
            "pyarrow",
            "scipy",
            "setuptools",
            "ruff",
            "mypy",
        ],
    },
)
