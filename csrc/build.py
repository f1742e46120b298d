"""Builds the native libraries with ninja, into build/. Only sources that changed are compiled again.

python csrc/build.py [_native | _native_cuda | _native_emulated] [--sanitize]    prints the library's path
"""

import argparse
import os
import platform
import re
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
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}
# Sources without arithmetic, compiled once.
PLAIN = {"cores", "dispatch", "scratch", "team"}
# Sources with products of bfloat16, for which AVX512-BF16 has an instruction. The others are not compiled for it.
PRODUCTS = re.compile("conv|attention")
# Sources that draw noise, which must have the same bits on every machine. In others a * b + c is one instruction.
UNCONTRACTED = {"random_normal", "q_sample", "reverse_step"}
# At -O1 it compiles in a third of the time, and every access to memory is still the sources' own.
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]

NVCC = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
# Code for 90a and 100a runs on those chips only. The driver of any later chip compiles the PTX (compute_90).
CHIPS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100a": "compute_100a", "compute_90": "compute_90"}

EMULATED = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]

SLOWER = {
    "_native": "operations on the CPU are several times slower",
    "_native_cuda": "a GPU runs the Triton kernels or PyTorch's operators",
    "_native_emulated": "the CUDA kernels cannot be tested without a GPU",
}


class BuildError(Exception):
    """A library could not be built. The message says why, and what to do, in one line."""


class Recipe(NamedTuple):
    """A ninja file and the folder it is for."""

    folder: Path  # for the objects and the library
    tool: str  # the compiler
    plan: Iterable[str]  # the lines of the ninja file


def build(name: str, *, sanitize: bool = False, base: Path = ROOT / "build") -> Path:
    """Build the library `name` in a subfolder of `base` and return its path. Raises BuildError if that fails."""
    ninja = _ninja()
    if ninja is None:
        raise _build_error(name, "there was no ninja", "run `pip install ninja`")
    try:
        recipes = _recipes(name, sanitize, base)
        for recipe in recipes:
            if _made(recipe, name, ninja):
                return recipe.folder / f"{name}.so"
    except (OSError, ValueError) as error:
        raise _build_error(name, f"its build could not run ({error})", "remove the cause") from error
    raise _build_error(name, f"{recipes[0].tool} could not compile it", "see the compiler's messages")


def find_nvcc() -> str | None:
    """Return the path of nvcc: in CUDA_HOME or CUDA_PATH if set, else on PATH, else in /usr/local/cuda; or None."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            return shutil.which(str(Path(home).absolute() / "bin" / "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _recipes(name: str, sanitize: bool, base: Path) -> Sequence[Recipe]:
    """Return the recipes of a library, in the order in which to try them."""
    if name == "_native_cuda":
        return [_cuda(base / "native-cuda")]
    if name == "_native_emulated":
        return [_emulated(base / "native-emulated")]
    folder = base / ("native-sanitize" if sanitize else "native")
    # With a compiler that lacks OpenMP, the library uses one thread. Its objects have a folder of their own, because
    # the next build tries OpenMP again and should not have to compile them again afterwards.
    serial = folder.with_name(f"{folder.name}-serial")
    return [_cpu(folder, sanitize, "-fopenmp"), _cpu(serial, sanitize, "")]


def _made(recipe: Recipe, name: str, ninja: str) -> bool:
    """Run ninja and return whether the library is up to date; if not, write the compiler's messages to stderr."""
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
    """Return the path of ninja: of the package `ninja`, whose environment need not be active, else on PATH; or None."""
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
    """Return the options for a source of csrc/cpu, by instruction set: it is compiled once for each."""
    if stem in PLAIN:
        return {"all": ["-DFASTDDPM_X86"] if x86 else []}
    contraction = "-ffp-contract=" + ("off" if stem in UNCONTRACTED else "fast")
    sets = INSTRUCTION_SETS if x86 else {"baseline": INSTRUCTION_SETS["baseline"]}
    if not PRODUCTS.match(stem):
        sets = {isa: options for isa, options in sets.items() if isa != "avx512bf16"}
    return {isa: [*options, contraction, f"-DFASTDDPM_ISA={isa}"] for isa, options in sets.items()}


def _cuda(folder: Path) -> Recipe:
    nvcc = find_nvcc()
    if nvcc is None:
        raise _build_error("_native_cuda", "there was no nvcc", "if you have a CUDA toolkit, set CUDA_HOME to it")
    return Recipe(folder, nvcc, _cuda_lines(folder, nvcc))


def _cuda_lines(folder: Path, nvcc: str) -> Iterator[str]:
    command = (
        f"{shlex.quote(nvcc)} {' '.join([*NVCC, *_chips(nvcc)])} -Xptxas -v $options -MD -MF $out.d -c $in -o $out"
    )
    # ptxas prints the registers and stack of each kernel; the output is kept beside the object.
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
    """Return the options for those of CHIPS that this nvcc knows."""
    options = [f"-gencode=arch={architecture},code={chip}" for chip, architecture in CHIPS.items()]
    # `nvcc --list-gpu-code` leaves out the variants with a letter, so a dry run of a compilation decides.
    known = [option for option in options if _accepts(nvcc, option)]
    return known or options  # if none is known, compiling fails with nvcc's reason


def _accepts(nvcc: str, option: str) -> bool:
    command = [nvcc, "--dryrun", option, "-x", "cu", "-c", os.devnull]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def _emulated(folder: Path) -> Recipe:
    """Return the recipe of the CUDA sources compiled for the CPU, for tests."""
    return Recipe(folder, shlex.split(_compiler())[0], _emulated_lines(folder, _compiler()))


def _emulated_lines(folder: Path, compiler: str) -> Iterator[str]:
    # _FORTIFY_SOURCE would take the jumps between the stacks of a block's threads for an attack.
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
    """Return a source's path relative to `folder`, so that a checkout moved with its build is not built again."""
    return Path(os.path.relpath(path, folder.resolve())).as_posix()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(SLOWER), default="_native")
    parser.add_argument("--sanitize", action="store_true", help="build the CPU library with AddressSanitizer and UBSan")
    arguments = parser.parse_args()
    try:
        print(build(arguments.name, sanitize=arguments.sanitize))
    except BuildError as problem:
        sys.exit(str(problem))
