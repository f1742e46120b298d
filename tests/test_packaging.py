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

ROOT = Path(__file__).parent.parent
setuptools = pytest.importorskip("setuptools", "70.1", reason="builds without isolation need setuptools 70.1 or later")
pytest.importorskip("pip")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources as in a clean checkout: links kept, nothing built."""
    target = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(
        ".*", "*.so", "_native_missing.txt", "__pycache__", "build", "dist", "*.egg-info", "runs"
    )
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=ignored))


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Output of a Python command, which must succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
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
    digits, status = digits_and_status(tmp_path / "site", tmp_path)
    assert digits == "5000"
    if shutil.which("c++"):
        assert status == "cpu"


def test_without_a_compiler_it_installs_and_says_what_is_slower(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    log = pip("install", "-v", "--target", str(site), str(checkout), cwd=tmp_path, CC="/bin/false", CXX="/bin/false")
    said = [line for line in log.splitlines() if "noise is drawn 5 to 10 times more slowly" in line]
    assert len(said) == 1
    assert not list(site.rglob("_native*so"))
    digits, status = digits_and_status(site, tmp_path)
    assert digits == "5000"
    assert status.startswith("reference (no compiled library: ") and status[len("reference (") : -1] in said[0]


def test_a_build_in_place_leaves_the_library_or_the_reason_never_both(checkout: Path) -> None:
    def built(**environment: str) -> set[str]:
        run("setup.py", "-q", "build_ext", "--inplace", "--force", cwd=checkout, **environment)
        return {path.name for path in (checkout / "kernels").glob("_native*")}

    missing = {"_native_missing.txt"}
    assert built(CC="/bin/false", CXX="/bin/false") == missing
    if shutil.which("c++"):
        assert built() == {"_native.abi3.so"}
        (checkout / "kernels" / "_native.cpython-310-old.so").touch()
        assert built() == {"_native.abi3.so"}
    assert built(CC="/bin/false", CXX="/bin/false") == missing


def test_the_source_archive_can_be_installed_from(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path / 'dist')!r})"
    run("-c", build, cwd=checkout)
    archive = only_file(tmp_path / "dist")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    assert sources | {"kernels/native.py", "fastddpm/data/mnist5k.npz", "README.md"} <= names
    pip("install", "--target", str(tmp_path / "site"), str(archive), cwd=tmp_path)
    digits, status = digits_and_status(tmp_path / "site", tmp_path)
    assert digits == "5000"
    if shutil.which("c++"):
        assert status == "cpu"
