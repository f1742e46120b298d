"""Packaging. The kernels live at the top of the repository and are installed as fastddpm.kernels."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "fastddpm" / "__init__.py").read_text()).group(1)
KERNELS = ["fastddpm.kernels", *(f"fastddpm.kernels.{name}" for name in find_packages("kernels"))]

setup(
    name="fastddpm",
    version=VERSION,
    description="Denoising Diffusion Probabilistic Models, exact and fast",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastddpm", "fastddpm.*"], exclude=["fastddpm.kernels*"]), *KERNELS],
    package_dir={"fastddpm.kernels": "kernels"},
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
