"""What a wheel and a source archive hold, and that they work away from the checkout, with and without a compiler."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers.native_build import find_nvcc

ROOT = Path(__file__).parents[2]
setuptools = pytest.importorskip("setuptools", "70.1", reason="builds without isolation need setuptools 70.1 or later")
pytest.importorskip("pip")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler; there is none")
DATA = ("fastddpm/data/mnist5k.npz", "fastddpm/pretrained/digits.safetensors")  # what the package holds beside code
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")
NO_NVCC_NOTE = "no compiled library: there was no nvcc when fastddpm was installed, so a GPU runs"


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


@pytest.fixture
def stale_checkout(checkout: Path) -> Path:
    """The same with what an earlier build of other sources left."""
    for name in STALE:
        (checkout / "kernels" / name).write_text("stale")
    return checkout


STALE = ("_native.abi3.so", "_native.cpython-310-old.so", "_native_missing.txt", "_native_cuda_missing.txt")

# What hides the compilers from a build. A folder without nvcc in it keeps a test from compiling for minutes.
NO_NVCC = {"CUDA_HOME": "/nonexistent", "CUDA_PATH": "/nonexistent"}
UNOPTIMIZED = {"CXXFLAGS": "-O0"}  # compiles in a quarter of the time
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false", **NO_NVCC}


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Output of a Python command, which must succeed; without nvcc unless `environment` says otherwise."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={name: value for name, value in (os.environ | NO_NVCC | environment).items() if name != "TRITON_INTERPRET"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(*arguments: str, cwd: Path, **environment: str) -> str:
    return run("-m", "pip", "--disable-pip-version-check", *arguments, *OFFLINE, cwd=cwd, **UNOPTIMIZED | environment)


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


PAGE = {f"fastddpm/training/page/page.{suffix}" for suffix in ("html", "css")}

PROGRAM = """
import fastddpm, fastddpm.data, os
from fastddpm.kernels.philox import reference
for module in (fastddpm, reference):
    assert module.__file__.startswith(os.environ["EXPECTED"]), module.__file__
print(len(fastddpm.data.open_dataset(None, image_size=16, channels=1).images))
assert fastddpm.load("digits").steps == 1000
print(fastddpm.ops.status()["random_normal"])
print(fastddpm.ops.status("cuda")["group_norm_silu"])
"""


def digits_and_status(site: Path, tmp_path: Path) -> list[str]:
    """What an installation in the folder `site` says, run from outside the checkout."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    return run("-c", PROGRAM, cwd=elsewhere, PYTHONPATH=str(site), EXPECTED=str(site)).splitlines()


def check_installs(distribution: Path, tmp_path: Path) -> None:
    """Install a wheel or a source archive into a folder of its own, without nvcc: it has the digits and the kernels."""
    pip("install", "--target", str(tmp_path / "site"), str(distribution), cwd=tmp_path)
    digits, status, cuda_status = digits_and_status(tmp_path / "site", tmp_path)
    assert digits == "5000"
    assert NO_NVCC_NOTE in cuda_status
    if shutil.which("c++"):
        assert status == "cpu"


def editable_status(prefix: Path, checkout: Path) -> tuple[str, str]:
    """What an editable installation in `prefix` of `checkout` says: for the CPU, for CUDA.

    Without site (-S), so that an editable installation beside the dependencies is not found instead.
    """
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    (site,) = {path.parent for path in prefix.rglob("*.pth")}
    program = f"import site, sys; site.addsitedir({str(site)!r}); sys.path += {dependencies}\n" + PROGRAM
    _, cpu, cuda = run("-S", "-c", program, cwd=prefix, EXPECTED=str(checkout)).splitlines()
    return cpu, cuda


@pytest.mark.slow
def test_the_wheel_holds_everything_and_works_elsewhere(stale_checkout: Path, tmp_path: Path) -> None:
    pip("wheel", "-w", str(tmp_path / "dist"), str(stale_checkout), cwd=tmp_path)
    wheel = only_file(tmp_path / "dist")
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]  # there is no Python in the libraries
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        text = {Path(name).name: archive.read(name).decode() for name in names if ".dist-info/" in name}
    assert text["top_level.txt"].split() == ["fastddpm"]
    assert "fastddpm = fastddpm.__main__:main" in text["entry_points.txt"]
    # Without an upper bound an install replaces a fitting torch by the newest one, with gigabytes of CUDA libraries.
    assert re.search(r"^Requires-Dist: torch>=2\.11$", text["METADATA"], re.MULTILINE)
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastddpm").rglob("*.py")}
    tracked |= {f"fastddpm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert tracked <= names
    assert {*DATA, *PAGE, "fastddpm/py.typed"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastddpm"}
    built = "_native.abi3.so" if shutil.which("c++") else "_native_missing.txt"
    made = {"fastddpm/kernels/_native_cuda_missing.txt", f"fastddpm/kernels/{built}"}
    assert {name for name in names if "/_native" in name} == made
    check_installs(wheel, tmp_path)


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_says_what_is_slower(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    log = pip("install", "-v", "--target", str(site), str(checkout), cwd=tmp_path, **NO_COMPILER)
    said = [line for line in log.splitlines() if "operations on the CPU are several times slower" in line]
    assert len(said) == 1
    assert not list(site.rglob("_native*so"))
    digits, status, cuda_status = digits_and_status(site, tmp_path)
    assert digits == "5000"
    assert status.startswith("reference (no compiled library: ") and status[len("reference (") : -1] in said[0]
    assert NO_NVCC_NOTE in cuda_status


@pytest.mark.slow
def test_a_wheel_without_a_compiler_is_for_any_platform_and_the_build_says_so(checkout: Path, tmp_path: Path) -> None:
    log = pip("wheel", "-v", "-w", str(tmp_path / "dist"), str(checkout), cwd=tmp_path, **NO_COMPILER)
    wheel = only_file(tmp_path / "dist")
    assert wheel.name.split("-")[2:] == ["py3", "none", "any.whl"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        lines = archive.read(name).decode().splitlines()
        assert set(DATA) <= set(archive.namelist())
    assert "Tag: py3-none-any" in lines and "Root-Is-Purelib: true" in lines
    assert log.count("this wheel has no compiled library") == 1
    assert log.count("operations on the CPU are several times slower") == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_without_a_compiler_says_what_is_slower(
    stale_checkout: Path, tmp_path: Path, mode: str
) -> None:
    prefix = tmp_path / "prefix"
    options = ("--prefix", str(prefix), "--ignore-installed", "--config-settings", f"editable_mode={mode}")
    pip("install", "-e", str(stale_checkout), *options, cwd=tmp_path, **NO_COMPILER)
    cpu, cuda = editable_status(prefix, stale_checkout)
    assert cpu.startswith("reference (no compiled library: /bin/false could not compile it when fastddpm was installed")
    assert NO_NVCC_NOTE in cuda


@pytest.mark.slow
@needs_compiler
def test_an_editable_install_builds_once(checkout: Path, tmp_path: Path) -> None:
    """With a C++ compiler alone; the second time nothing is compiled, and the library is the same file's content."""
    prefix = ("--prefix", str(tmp_path / "prefix"), "--ignore-installed")
    pip("install", "-e", str(checkout), *prefix, cwd=tmp_path)
    cpu, cuda = editable_status(tmp_path / "prefix", checkout)
    assert cpu == "cpu" and NO_NVCC_NOTE in cuda
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
    assert not (checkout / "build" / "native-serial").exists()


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc; there is none")
def test_with_nvcc_both_libraries_are_built(built_checkout: Path) -> None:
    home = str(Path(str(find_nvcc())).parent.parent)
    run("setup.py", "-q", "build_ext", "--inplace", cwd=built_checkout, CUDA_HOME=home)
    assert {path.name for path in (built_checkout / "kernels").glob("_native*")} == {
        "_native.abi3.so",
        "_native_cuda.abi3.so",
    }


# Compiles nothing: notes how it was called, refuses what it is told to, makes an empty file that needs a source and
# a header.
COMPILER = """#!/bin/sh
case "$*" in *"$REFUSED"*) echo "unknown: $REFUSED"; exit 1;; esac
echo "$*" >>"$0.log"
case "$*" in *--dryrun*) exit 0;; esac
while [ $# -gt 0 ]; do
    case "$1" in
        -MF) echo "object: $HEADER" >"$2";;
        -o) : >"$2";;
    esac
    shift
done
"""


class FakeCompiler:
    """Stands for c++ and, in a CUDA_HOME, nvcc: what is asked of a compiler, in no time."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        (folder / "bin").mkdir(parents=True)
        for name in ("c++", "nvcc"):
            (folder / "bin" / name).write_text(COMPILER)
            (folder / "bin" / name).chmod(0o755)

    def build(self, name: str, checkout: Path, refused: str = "nothing", header: str = "") -> list[str]:
        """How it was called, without refusals, by a build of a library, which must succeed."""
        log = self.home / "bin" / ("nvcc.log" if name == "_native_cuda" else "c++.log")
        log.unlink(missing_ok=True)
        path = f"{self.home / 'bin'}{os.pathsep}{os.environ['PATH']}"
        home = str(self.home)
        answer = run(
            "csrc/build.py", name, cwd=checkout, PATH=path, CXX="", CUDA_HOME=home, REFUSED=refused, HEADER=header
        )
        assert Path(answer.splitlines()[-1]).is_file()
        return [line for line in log.read_text().splitlines() if "--dryrun" not in line] if log.exists() else []


@pytest.fixture
def fake(tmp_path: Path) -> FakeCompiler:
    return FakeCompiler(tmp_path / "home")


def test_without_openmp_a_library_of_one_thread_is_built_once(fake: FakeCompiler, checkout: Path) -> None:
    calls = fake.build("_native", checkout, refused="-fopenmp")
    assert len(calls) > 20 and not any("-fopenmp" in call for call in calls)
    assert fake.build("_native", checkout, refused="-fopenmp") == []
    assert all("-fopenmp" in call for call in fake.build("_native", checkout))


@pytest.mark.parametrize("refused", ["sm_100a", "sm_90a", "nothing"])
def test_chips_that_nvcc_does_not_know_are_left_out(fake: FakeCompiler, checkout: Path, refused: str) -> None:
    options = {f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in ("80", "90a", "100a")}
    options = {option for option in options if refused not in option} | {"-gencode=arch=compute_90,code=compute_90"}
    compiling = [call for call in fake.build("_native_cuda", checkout, refused) if " -c " in call]
    assert len(compiling) == len(list((checkout / "csrc" / "cuda").glob("*.cu")))
    for call in compiling:
        assert {option for option in call.split() if option.startswith("-gencode")} == options


@pytest.mark.parametrize("name", ["_native", "_native_cuda", "_native_emulated"])
def test_a_checkout_that_is_moved_is_not_built_again(fake: FakeCompiler, checkout: Path, name: str) -> None:
    assert len(fake.build(name, checkout)) > 5
    assert fake.build(name, checkout) == []
    assert fake.build(name, checkout.rename(checkout.with_name("moved"))) == []


def test_a_header_that_is_gone_is_no_obstacle(fake: FakeCompiler, checkout: Path) -> None:
    header = checkout / "csrc" / "cpu" / "old.h"
    header.touch()
    calls = fake.build("_native", checkout, header=str(header))
    assert fake.build("_native", checkout) == []
    header.unlink()
    assert sorted(fake.build("_native", checkout)) == sorted(calls)


def in_place(checkout: Path, **environment: str) -> str:
    """Why there is no CPU library after a build in place, which must succeed."""
    run("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, **environment)
    return (checkout / "kernels" / "_native_missing.txt").read_text()


@pytest.mark.parametrize("module", ["raise ImportError", "BIN_DIR = ''"])
def test_without_ninja_the_reason_is_kept(checkout: Path, tmp_path: Path, module: str) -> None:
    """The second is what the package says in an environment that sees those of another, where its program is."""
    (tmp_path / "ninja.py").write_text(module)
    reason = in_place(checkout, PATH="/nonexistent", PYTHONPATH=str(tmp_path))
    assert reason.startswith("no compiled library: there was no ninja") and "run `pip install ninja`" in reason


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "'unbalanced"])
def test_without_the_compiler_that_was_named_the_reason_is_kept(checkout: Path, compiler: str) -> None:
    reason = in_place(checkout, CXX=compiler)
    assert reason.startswith("no compiled library: ") and "install fastddpm again" in reason


def test_a_folder_that_cannot_be_made_does_not_stop_the_install(checkout: Path) -> None:
    (checkout / "build").mkdir()
    (checkout / "build" / "native").touch()
    assert "its build could not run" in in_place(checkout)


@pytest.mark.slow
def test_the_source_archive_can_be_installed_from(stale_checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path / 'dist')!r})"
    run("-c", build, cwd=stale_checkout)
    archive = only_file(tmp_path / "dist")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc"}
    assert {Path(name).parent.as_posix() for name in sources} == {"csrc", "csrc/cpu", "csrc/cuda", "csrc/cuda/emulate"}
    assert sources | {"kernels/native.py", *DATA, *PAGE, "README.md"} <= names
    for folder in ("tests", "benchmarks", "docs", "examples"):  # so that what is built of it can be tested
        files = [path for path in (ROOT / folder).rglob("*.[pjm][ysd]*") if path.suffix != ".pyc"]
        assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert not [name for name in names if Path(name).name in STALE or name.startswith("build")]
    check_installs(archive, tmp_path)


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `pip install -e .` would install here: the metadata of each package."""
    report = tmp_path_factory.mktemp("pip") / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--report", str(report), "--quiet", "--no-index",
               "--no-build-isolation", "--editable", str(ROOT)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [package["metadata"] for package in json.loads(report.read_text())["install"]]


@pytest.mark.slow
def test_an_install_changes_no_package_of_the_environment(resolved: list[dict[str, Any]]) -> None:
    """Whatever versions are here, from the lowest on: the resolver would install fastddpm and nothing else."""
    assert [package["name"] for package in resolved] == ["fastddpm"]


def test_the_constraints_are_of_what_is_required(resolved: list[dict[str, Any]]) -> None:
    """Every requirement, of the package and of its tests, has a version that the tests ran with, and no upper bound."""
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    required = [text for text in resolved[0]["requires_dist"] if "extra" not in text or 'extra == "test"' in text]
    assert {re.split(r"[^A-Za-z0-9_.-]", text)[0].lower() for text in required} == pinned
    assert not [text for text in required if re.search(r"<|==|~=", text.partition(";")[0])]
