"""What a wheel and a source archive hold, and that they work away from the checkout, with and without a compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as in a clean checkout: links kept, nothing built."""
    target = tmp_path_factory.mktemp("checkout") / "fastddpm"
    ignored = shutil.ignore_patterns(".git", "*.so", "__pycache__", "build", "*.egg-info", "runs", ".*_cache", ".venv")
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignored)
    return target


def build(checkout: Path, kind: str, out: Path, **environment: str) -> Path:
    command = [sys.executable, "-c", "import setuptools, runpy; runpy.run_path('setup.py')", kind, "-d", str(out)]
    done = subprocess.run(command, cwd=checkout, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(checkout / "build", ignore_errors=True)
    (made,) = out.iterdir()
    return made


def in_unpacked(wheel: Path, target: Path, program: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", program], cwd=target, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


PROGRAM = """
import fastddpm, fastddpm.kernels, fastddpm.data, os
assert os.path.dirname(fastddpm.__file__) == os.path.join(os.getcwd(), "fastddpm"), fastddpm.__file__
print(len(fastddpm.data.open_dataset(None, image_size=16, channels=1).images))
print(fastddpm.ops.status()["random_normal"])
"""


def test_the_wheel_holds_everything_and_works_elsewhere(checkout: Path, tmp_path: Path) -> None:
    wheel = build(checkout, "bdist_wheel", tmp_path / "dist")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (top,) = [name for name in names if name.endswith("top_level.txt")]
        assert archive.read(top).decode().split() == ["fastddpm"]
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastddpm").rglob("*.py")}
    tracked |= {f"fastddpm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert tracked <= names
    assert {"fastddpm/data/mnist5k.npz", "fastddpm/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "kernels"))]
    images, status = in_unpacked(wheel, tmp_path / "site", PROGRAM).splitlines()
    assert images == "5000"
    if shutil.which("c++"):
        assert status == "cpu"


def test_without_a_compiler_the_wheel_still_builds_and_says_so(checkout: Path, tmp_path: Path) -> None:
    wheel = build(checkout, "bdist_wheel", tmp_path / "dist", CC="/bin/false", CXX="/bin/false")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    _, status = in_unpacked(wheel, tmp_path / "site", PROGRAM).splitlines()
    assert status.startswith("reference (no compiled library") and "more slowly" in status


def test_the_source_archive_can_be_built_from(checkout: Path, tmp_path: Path) -> None:
    archive = build(checkout, "sdist", tmp_path / "dist")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "source", filter="data")
    assert {"csrc/fastddpm.h", "csrc/philox.h", "csrc/random_normal.cpp", "kernels/native.py"} <= names
    (source,) = (tmp_path / "source").iterdir()
    wheel = build(source, "bdist_wheel", tmp_path / "again")
    assert in_unpacked(wheel, tmp_path / "site", PROGRAM).splitlines()[0] == "5000"
