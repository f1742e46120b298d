"""Packaging. The kernels live at the top of the repository and are installed as fastddpm.kernels."""

import re
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "fastddpm" / "__init__.py").read_text(encoding="utf-8")).group(1)
NATIVE = Extension(
    "fastddpm.kernels._native",
    sources=["csrc/random_normal.cpp"],
    depends=["csrc/fastddpm.h", "csrc/philox.h"],
    # No contraction: the noise has the same bits on every machine. No errno: sqrt can be a vector instruction.
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"],
    py_limited_api=True,  # there is no Python in it: one file name for every version
    optional=True,  # without a compiler the install succeeds, and fastddpm.ops.status() says what is slower
)
KERNELS = ["fastddpm.kernels", *(f"fastddpm.kernels.{name}" for name in find_packages("kernels"))]


class BuildNative(build_ext):
    """Compiles with OpenMP where the compiler has it, else without; if neither works, the reason is kept.

    pip hides the output of a build that succeeds, so the reason goes into kernels/_native_missing.txt, which
    fastddpm.ops.status() repeats.
    """

    def run(self) -> None:
        self.problem = ""
        super().run()
        library = Path(self.get_ext_fullpath(NATIVE.name))
        note = library.with_name("_native_missing.txt")
        note.unlink(missing_ok=True)
        for built in library.parent.glob("_native.*"):  # a library of other sources must not be loaded
            if self.problem or built != library:
                built.unlink()
        if self.problem:
            self.mkpath(str(library.parent))
            note.write_text(self.problem + "\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        plain = list(ext.extra_compile_args)
        try:
            ext.extra_compile_args, ext.extra_link_args = [*plain, "-fopenmp"], ["-fopenmp"]
            super().build_extension(ext)
        except Exception:  # each compiler class has its own error; the second try decides
            self.warn(f"building {ext.name} with OpenMP failed; trying without")
            ext.extra_compile_args, ext.extra_link_args = plain, []
            try:
                super().build_extension(ext)
            except Exception:
                self.problem = self.reason()
                self.warn(self.problem)
                raise

    def reason(self) -> str:
        command = getattr(self.compiler, "compiler_so_cxx", None) or getattr(self.compiler, "compiler_so", None)
        name = command[0] if command else "the C++ compiler"
        cause = f"{name} could not compile it" if shutil.which(name) else f"there was no C++ compiler ({name})"
        return (
            f"no compiled library: {cause} when fastddpm was installed, so noise is drawn 5 to 10 times more slowly; "
            "install a C++ compiler, then fastddpm again (pip install -v shows the build)"
        )


setup(
    name="fastddpm",
    version=VERSION,
    description="Denoising Diffusion Probabilistic Models, exact and fast",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastddpm", "fastddpm.*"], exclude=["fastddpm.kernels*"]), *KERNELS],
    package_dir={"fastddpm.kernels": "kernels"},
    ext_modules=[NATIVE],
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
            "ruff",
            "mypy",
        ],
    },
)
