"""What a wheel and a source archive hold, and that they work away from the checkout, with and without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from native_build import find_nvcc

ROOT = Path(__file__).parent.parent
setuptools = pytest.importorskip("setuptools", "70.1", reason="builds without isolation need setuptools 70.1 or later")
pytest.importorskip("pip")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler; there is none")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources as in a clean checkout: links kept, nothing built."""
    target = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(
        ".*", "*.so", "*_missing.txt", "__pycache__", "build", "dist", "*.egg-info", "runs"
    )
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=ignored))


@pytest.fixture
def built_checkout(checkout: Path) -> Path:
    """The same with the objects of this checkout's build, if there was one: compiling them takes long."""
    if (ROOT / "build").is_dir():
        shutil.copytree(
            ROOT / "build", checkout / "build", ignore=shutil.ignore_patterns("*sanitize*", "lib*", "bdist*")
        )
    return checkout


# What hides the compilers from a build. A folder without nvcc in it keeps a test from compiling for minutes.
NO_NVCC = {"CUDA_HOME": "/nonexistent", "CUDA_PATH": "/nonexistent"}
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false", **NO_NVCC}


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Output of a Python command, which must succeed; without nvcc unless `environment` says otherwise."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | NO_NVCC | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(*arguments: str, cwd: Path, **environment: str) -> str:
    return run("-m", "pip", "--disable-pip-version-check", *arguments, *OFFLINE, cwd=cwd, **environment)


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


PROGRAM = """
import fastddpm, fastddpm.data, os
from fastddpm.kernels.philox import reference
for module in (fastddpm, reference):
    assert module.__file__.startswith(os.environ["PYTHONPATH"]), module.__file__
print(len(fastddpm.data.open_dataset(None, image_size=16, channels=1).images))
print(fastddpm.ops.status()["random_normal"])
print(fastddpm.ops.status("cuda")["group_norm_silu"])
"""


def digits_and_status(site: Path, tmp_path: Path) -> list[str]:
    """What an installation in the folder `site` says, run from outside the checkout."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    return run("-c", PROGRAM, cwd=elsewhere, PYTHONPATH=str(site)).splitlines()


def test_the_wheel_holds_everything_and_works_elsewhere(checkout: Path, tmp_path: Path) -> None:
    pip("wheel", "-w", str(tmp_path / "dist"), str(checkout), cwd=tmp_path)
    wheel = only_file(tmp_path / "dist")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        text = {Path(name).name: archive.read(name).decode() for name in names if ".dist-info/" in name}
    assert text["top_level.txt"].split() == ["fastddpm"]
    # Without an upper bound an install replaces a fitting torch by the newest one, with gigabytes of CUDA libraries.
    assert re.search(r"^Requires-Dist: torch<2\.14,>=2\.11$", text["METADATA"], re.MULTILINE)
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastddpm").rglob("*.py")}
    tracked |= {f"fastddpm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert tracked <= names
    assert {"fastddpm/data/mnist5k.npz", "fastddpm/py.typed"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastddpm"}
    pip("install", "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    digits, status, cuda_status = digits_and_status(tmp_path / "site", tmp_path)
    assert digits == "5000"
    assert "there was no nvcc when fastddpm was installed" in cuda_status
    if shutil.which("c++"):
        assert status == "cpu"


def test_without_a_compiler_it_installs_and_says_what_is_slower(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    log = pip("install", "-v", "--target", str(site), str(checkout), cwd=tmp_path, **NO_COMPILER)
    said = [line for line in log.splitlines() if "what the CPU runs is several times slower" in line]
    assert len(said) == 1
    assert not list(site.rglob("_native*so"))
    digits, status, cuda_status = digits_and_status(site, tmp_path)
    assert digits == "5000"
    assert status.startswith("reference (no compiled library: ") and status[len("reference (") : -1] in said[0]
    assert "no compiled library: there was no nvcc" in cuda_status


@needs_compiler
def test_an_editable_install_builds_once(checkout: Path, tmp_path: Path) -> None:
    """With a C++ compiler alone; the second time nothing is compiled, and the library is the same file's content."""
    prefix = ("--prefix", str(tmp_path / "prefix"), "--ignore-installed")
    pip("install", "-e", str(checkout), *prefix, cwd=tmp_path)
    library = checkout / "kernels" / "_native.abi3.so"
    first = library.read_bytes()
    objects = {path: path.stat().st_mtime_ns for path in (checkout / "build").rglob("*.o")}
    assert len(objects) > 20
    log = pip("install", "-v", "-e", str(checkout), *prefix, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (checkout / "build").rglob("*.o")} == objects
    assert "several times slower" not in log and library.read_bytes() == first
    # One source changed: its objects and no others.
    (checkout / "csrc" / "cpu" / "q_sample.cpp").touch()
    pip("install", "-e", str(checkout), *prefix, cwd=tmp_path)
    changed = {path.name for path, time in objects.items() if path.stat().st_mtime_ns != time}
    assert changed and all(name.startswith("q_sample.") for name in changed)
    note = (checkout / "kernels" / "_native_cuda_missing.txt").read_text()
    assert "there was no nvcc when fastddpm was installed" in note


@needs_compiler
def test_the_library_is_replaced_not_overwritten(built_checkout: Path) -> None:
    """A process that has loaded the old one goes on with it."""
    command = ("setup.py", "-q", "build_ext", "--inplace")
    run(*command, cwd=built_checkout)
    library = built_checkout / "kernels" / "_native.abi3.so"
    with library.open("rb") as old:
        inode = os.fstat(old.fileno()).st_ino
        (built_checkout / "csrc" / "cpu" / "q_sample.cpp").touch()
        run(*command, cwd=built_checkout)
        assert library.stat().st_ino != inode and os.fstat(old.fileno()).st_nlink == 0


def test_a_build_in_place_leaves_the_library_or_the_reason_never_both(built_checkout: Path) -> None:
    def built(**environment: str) -> set[str]:
        run("setup.py", "-q", "build_ext", "--inplace", "--force", cwd=built_checkout, **environment)
        return {path.name for path in (built_checkout / "kernels").glob("_native*")}

    no_cuda = "_native_cuda_missing.txt"
    missing = {"_native_missing.txt", no_cuda}
    assert built(**NO_COMPILER) == missing
    if shutil.which("c++"):
        assert built() == {"_native.abi3.so", no_cuda}
        (built_checkout / "kernels" / "_native.cpython-310-old.so").touch()
        assert built() == {"_native.abi3.so", no_cuda}
    assert built(**NO_COMPILER) == missing


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc; there is none")
def test_with_nvcc_both_libraries_are_built(built_checkout: Path) -> None:
    home = str(Path(str(find_nvcc())).parent.parent)
    run("setup.py", "-q", "build_ext", "--inplace", cwd=built_checkout, CUDA_HOME=home)
    assert {path.name for path in (built_checkout / "kernels").glob("_native*")} == {
        "_native.abi3.so",
        "_native_cuda.abi3.so",
    }


def test_the_source_archive_can_be_installed_from(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path / 'dist')!r})"
    run("-c", build, cwd=checkout)
    archive = only_file(tmp_path / "dist")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc"}
    assert sources | {"kernels/native.py", "fastddpm/data/mnist5k.npz", "README.md"} <= names
    pip("install", "--target", str(tmp_path / "site"), str(archive), cwd=tmp_path)
    digits, status, cuda_status = digits_and_status(tmp_path / "site", tmp_path)
    assert digits == "5000"
    assert "there was no nvcc when fastddpm was installed" in cuda_status
    if shutil.which("c++"):
        assert status == "cpu"
