"""Builds the native libraries with ninja, into build/: only what changed is compiled again.

python csrc/build.py [_native | _native_cuda | _native_emulated] [--sanitize]    prints the library's path
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
# These draw noise, which has the same bits on every machine. Elsewhere a * b + c is one instruction.
UNCONTRACTED = {"random_normal", "q_sample", "reverse_step"}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]

NVCC = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
# Code for 90a and 100a runs on those chips alone; the PTX is compiled by the driver of any later one.
CHIPS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100a": "compute_100a", "compute_90": "compute_90"}

EMULATED = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]

SLOWER = {
    "_native": "what the CPU runs is several times slower",
    "_native_cuda": "a GPU runs the Triton kernels or PyTorch's operators",
    "_native_emulated": "the CUDA kernels cannot be tested without a GPU",
}


class BuildError(Exception):
    """Why there is no library, in one line, with what to do."""


class Recipe(NamedTuple):
    """How to make a library."""

    folder: Path  # of the objects and the library
    tool: str  # the compiler
    plan: Iterable[str]  # what ninja reads


def build(name: str, *, sanitize: bool = False, base: Path = ROOT / "build") -> Path:
    """The path of the library `name`, up to date, in a folder of `base`; `BuildError` if that cannot be."""
    ninja = _ninja()
    if ninja is None:
        raise _build_error(name, "there was no ninja", "run `pip install ninja`")
    try:
        recipes = _recipes(name, sanitize, base)
        for recipe in recipes:
            if _made(recipe, name, ninja):
                return recipe.folder / f"{name}.so"
    except (OSError, ValueError) as error:
        raise _build_error(name, f"its build could not run ({error})", "mend that") from error
    raise _build_error(name, f"{recipes[0].tool} could not compile it", "see the compiler's messages")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH if set, else of PATH, else of /usr/local/cuda."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            return shutil.which(str(Path(home).absolute() / "bin" / "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _recipes(name: str, sanitize: bool, base: Path) -> Sequence[Recipe]:
    """The ways to make a library, each to be tried if the one before failed."""
    if name == "_native_cuda":
        return [_cuda(base / "native-cuda")]
    if name == "_native_emulated":
        return [_emulated(base / "native-emulated")]
    folder = base / ("native-sanitize" if sanitize else "native")
    # A compiler without OpenMP still makes a library: one that uses one thread. Its objects have a folder of their own,
    # so trying OpenMP again in the next build does not compile them again.
    serial = folder.with_name(f"{folder.name}-serial")
    return [_cpu(folder, sanitize, "-fopenmp"), _cpu(serial, sanitize, "")]


def _made(recipe: Recipe, name: str, ninja: str) -> bool:
    """Whether ninja brought the library up to date; if not, the compiler's messages are on stderr."""
    if shutil.which(recipe.tool) is None:
        raise _build_error(name, f"there was no compiler ({recipe.tool})", "install one")
    recipe.folder.mkdir(parents=True, exist_ok=True)
    _write_if_changed(recipe.folder / "build.ninja", "\n".join(recipe.plan))
    command = [ninja, "-C", str(recipe.folder), f"{name}.so"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        sys.stderr.write(done.stdout)
    return done.returncode == 0


def _build_error(name: str, cause: str, remedy: str) -> BuildError:
    return BuildError(
        f"no compiled library: {cause} when fastddpm was installed, so {SLOWER[name]}; {remedy}, "
        "then install fastddpm again (pip install -v shows the build)"
    )


def _ninja() -> str | None:
    """The one of the package `ninja`, whose environment need not be active, else of PATH."""
    try:
        from ninja import BIN_DIR  # "" when the package does not find its program
    except ImportError:
        BIN_DIR = ""
    return shutil.which(str(Path(BIN_DIR) / "ninja")) or shutil.which("ninja")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _compiler() -> str:
    return os.environ.get("CXX", "").strip() or "c++"


def _cpu(folder: Path, sanitize: bool, openmp: str) -> Recipe:
    plan = _cpu_lines(folder, openmp, SANITIZE if sanitize else [])
    return Recipe(folder, shlex.split(_compiler())[0], plan)


def _cpu_lines(folder: Path, openmp: str, sanitize: list[str]) -> Iterator[str]:
    flags = " ".join([*COMMON, *sanitize, openmp, os.environ.get("CXXFLAGS", "")])
    yield from _rule("cc", f"{_compiler()} {flags} $options -MMD -MF $out.d -c $in -o $out", depfile=True)
    yield from _rule("link", f"{_compiler()} -shared {openmp} {' '.join(sanitize)} $in -o $out")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        for variant, options in _variants(source.stem, x86).items():
            objects.append(f"{source.stem}.{variant}.o")
            yield f"build {objects[-1]}: cc {_source(source, folder)}\n  options = {' '.join(options)}"
    yield f"build _native.so: link {' '.join(objects)}\n"


def _variants(stem: str, x86: bool) -> dict[str, list[str]]:
    """The options with which a source of csrc/cpu is compiled, once for each instruction set."""
    if stem == "dispatch":
        return {"all": ["-DFASTDDPM_X86"] if x86 else []}
    contraction = "-ffp-contract=" + ("off" if stem in UNCONTRACTED else "fast")
    sets = INSTRUCTION_SETS if x86 else {"baseline": INSTRUCTION_SETS["baseline"]}
    return {isa: [*options, contraction, f"-DFASTDDPM_ISA={isa}"] for isa, options in sets.items()}


def _cuda(folder: Path) -> Recipe:
    nvcc = find_nvcc()
    if nvcc is None:
        raise _build_error("_native_cuda", "there was no nvcc", "to have it, set CUDA_HOME to a CUDA toolkit")
    return Recipe(folder, nvcc, _cuda_lines(folder, nvcc))


def _cuda_lines(folder: Path, nvcc: str) -> Iterator[str]:
    command = (
        f"{shlex.quote(nvcc)} {' '.join([*NVCC, *_chips(nvcc)])} -Xptxas -v $options -MD -MF $out.d -c $in -o $out"
    )
    # What each kernel takes of registers and stack, which ptxas prints, is kept beside the object.
    yield from _rule("cc", f"{command} >$out.usage 2>&1 || (cat $out.usage; exit 1)", depfile=True)
    yield from _rule("link", f"{shlex.quote(nvcc)} -shared -cudart static $in -o $out")
    objects = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        objects.append(f"{source.stem}.o")
        yield f"build {objects[-1]}: cc {_source(source, folder)}"
        if source.stem in UNCONTRACTED:
            yield "  options = -fmad=false"
    yield f"build _native_cuda.so: link {' '.join(objects)}\n"


def _chips(nvcc: str) -> list[str]:
    """The options for those of CHIPS that this nvcc knows."""
    options = [f"-gencode=arch={architecture},code={chip}" for chip, architecture in CHIPS.items()]
    # `nvcc --list-gpu-code` leaves out the variants with a letter; a compilation that is only planned tells.
    known = [option for option in options if _accepts(nvcc, option)]
    return known or options  # none: compiling says why


def _accepts(nvcc: str, option: str) -> bool:
    command = [nvcc, "--dryrun", option, "-x", "cu", "-c", os.devnull]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def _emulated(folder: Path) -> Recipe:
    """The CUDA sources for the CPU: tests only."""
    return Recipe(folder, shlex.split(_compiler())[0], _emulated_lines(folder, _compiler()))


def _emulated_lines(folder: Path, compiler: str) -> Iterator[str]:
    # Jumping between the stacks of a block's threads is what _FORTIFY_SOURCE takes for an attack.
    flags = " ".join([*EMULATED, "-DFASTDDPM_EMULATE", "-U_FORTIFY_SOURCE"])
    yield from _rule("cc", f"{compiler} {flags} -MMD -MF $out.d -x c++ -c $in -o $out", depfile=True)
    yield from _rule("link", f"{compiler} -shared $in -o $out")
    objects = []
    for source in sorted([*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda" / "emulate").glob("*.cpp")]):
        objects.append(f"{source.stem}.o")
        yield f"build {objects[-1]}: cc {_source(source, folder)}"
    yield f"build _native_emulated.so: link {' '.join(objects)}\n"


def _rule(name: str, command: str, *, depfile: bool = False) -> Iterator[str]:
    yield f"rule {name}\n  command = {command}"
    if depfile:
        yield "  depfile = $out.d\n  deps = gcc"


def _source(path: Path, folder: Path) -> str:
    """A source as ninja names it in `folder`: a checkout that is moved or copied with its build is not built again."""
    return Path(os.path.relpath(path, folder.resolve())).as_posix()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(SLOWER), default="_native")
    parser.add_argument("--sanitize", action="store_true", help="the CPU library with AddressSanitizer and UBSan")
    arguments = parser.parse_args()
    try:
        print(build(arguments.name, sanitize=arguments.sanitize))
    except BuildError as problem:
        sys.exit(str(problem))
