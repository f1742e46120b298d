"""Builds the native libraries with ninja, into build/native: only what changed is compiled again.

python csrc/build.py [_native | _native_cuda | _native_emulated] [--sanitize]    prints the library's path
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
# No contraction where noise is drawn: it has the same bits on every machine. Elsewhere a * b + c is one instruction.
CONTRACTION = {name: "-ffp-contract=off" for name in ("random_normal", "q_sample", "reverse_step")}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]

NVCC = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
# As CONTRACTION: these draw noise.
NVCC_CONTRACTION = {"random_normal", "q_sample", "reverse_step"}
# Code for 90a and 100a runs on those chips alone; the PTX is compiled by the driver of any later one.
CHIPS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100a,code=sm_100a",
    "-gencode=arch=compute_90,code=compute_90",
]

SLOWER = {
    "_native": "what the CPU runs is several times slower",
    "_native_cuda": "a GPU runs the Triton kernels or PyTorch's operators",
    "_native_emulated": "the CUDA kernels cannot be tested without a GPU",
}


class NotBuilt(Exception):
    """Why there is no library, in one line, with what to do."""


def build(name: str, *, sanitize: bool = False) -> Path:
    """The path of the library `name`, up to date; `NotBuilt` if that cannot be."""
    ninja = _ninja()
    if ninja is None:
        raise NotBuilt(_reason(name, "ninja is not there", "run `pip install ninja`"))
    if name == "_native":
        rules, target = _cpu_rules(sanitize)
        tool, install = shlex.split(os.environ.get("CXX", "c++"))[0], "install a C++ compiler"
    elif name == "_native_emulated":
        rules, target = _emulated_rules()
        tool, install = shlex.split(os.environ.get("CXX", "c++"))[0], "install a C++ compiler"
    else:
        nvcc = find_nvcc()
        if nvcc is None:
            raise NotBuilt(_reason(name, "there was no nvcc", "set CUDA_HOME to a CUDA toolkit"))
        rules, target = _cuda_rules(nvcc)
        tool, install = nvcc, "see the compiler's messages"
    if shutil.which(tool) is None:
        raise NotBuilt(_reason(name, f"there was no compiler ({tool})", install))
    target.parent.mkdir(parents=True, exist_ok=True)
    plans = [rules("-fopenmp"), rules("")] if name == "_native" else [rules("")]
    for plan in plans:
        file = target.parent / "build.ninja"
        if not file.exists() or file.read_text(encoding="utf-8") != plan:
            file.write_text(plan, encoding="utf-8")
        done = subprocess.run([ninja, "-C", str(target.parent), target.name], stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return target
        sys.stderr.write(done.stdout)
    raise NotBuilt(_reason(name, f"{tool} could not compile it", install))


def _reason(name: str, cause: str, remedy: str) -> str:
    return (
        f"no compiled library: {cause} when fastddpm was installed, so {SLOWER[name]}; {remedy}, "
        "then install fastddpm again (pip install -v shows the build)"
    )


def _ninja() -> str | None:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return str(Path(BIN_DIR) / "ninja")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH if set, else of PATH, else of /usr/local/cuda."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home is not None:
            return shutil.which(str(Path(home) / "bin" / "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _cpu_rules(sanitize: bool):  # type: ignore[no-untyped-def]
    compiler = os.environ.get("CXX", "c++")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    folder = ROOT / "build" / ("native-sanitize" if sanitize else "native")
    extra = SANITIZE if sanitize else []

    def rules(openmp: str) -> str:
        flags = [*COMMON, *extra, openmp, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        return "\n".join(_cpu_lines(compiler, flags, openmp, x86, extra))

    return rules, folder / "_native.so"


def _cpu_lines(compiler: str, flags: list[str], openmp: str, x86: bool, extra: list[str]) -> Iterator[str]:
    yield f"rule cc\n  command = {compiler} {' '.join(flags)} $isa -MMD -MF $out.d -c $in -o $out"
    yield "  depfile = $out.d\n  deps = gcc"
    yield f"rule link\n  command = {compiler} -shared {openmp} {' '.join(extra)} $in -o $out"
    objects = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.stem == "dispatch":
            variants = {"": ["-DFASTDDPM_X86"] if x86 else []}
        else:
            names = INSTRUCTION_SETS if x86 else {"baseline": []}
            contraction = CONTRACTION.get(source.stem, "-ffp-contract=fast")
            variants = {isa: [*options, contraction, f"-DFASTDDPM_ISA={isa}"] for isa, options in names.items()}
        for isa, options in variants.items():
            objects.append(f"{source.stem}.{isa or 'all'}.o")
            yield f"build {objects[-1]}: cc {_escaped(source)}\n  isa = {' '.join(options)}"
    yield f"build _native.so: link {' '.join(objects)}\n"


def _cuda_rules(nvcc: str):  # type: ignore[no-untyped-def]
    def rules(_: str) -> str:
        return "\n".join(_cuda_lines(nvcc))

    return rules, ROOT / "build" / "native-cuda" / "_native_cuda.so"


def _cuda_lines(nvcc: str) -> Iterator[str]:
    # What each kernel takes of registers and stack, which ptxas prints, is kept beside the object.
    command = f"{nvcc} {' '.join([*NVCC, *CHIPS])} -Xptxas -v $contraction -MD -MF $out.d -c $in -o $out"
    yield f"rule nvcc\n  command = {command} >$out.usage 2>&1 || (cat $out.usage; exit 1)"
    yield "  depfile = $out.d\n  deps = gcc"
    yield f"rule link\n  command = {nvcc} -shared -cudart static $in -o $out"
    objects = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        objects.append(f"{source.stem}.o")
        yield f"build {objects[-1]}: nvcc {_escaped(source)}"
        if source.stem in NVCC_CONTRACTION:
            yield "  contraction = -fmad=false"
    yield f"build _native_cuda.so: link {' '.join(objects)}\n"


def _emulated_rules():  # type: ignore[no-untyped-def]
    def rules(_: str) -> str:
        return "\n".join(_emulated_lines(os.environ.get("CXX", "c++")))

    return rules, ROOT / "build" / "native-emulated" / "_native_emulated.so"


def _emulated_lines(compiler: str) -> Iterator[str]:
    """The CUDA sources for the CPU: tests only."""
    flags = "-std=c++17 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wno-unknown-pragmas -DFASTDDPM_EMULATE -U_FORTIFY_SOURCE"
    yield f"rule cc\n  command = {compiler} {flags} -MMD -MF $out.d -x c++ -c $in -o $out"
    yield "  depfile = $out.d\n  deps = gcc"
    yield f"rule link\n  command = {compiler} -shared $in -o $out"
    objects = []
    for source in sorted([*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda" / "emulate").glob("*.cpp")]):
        objects.append(f"{source.stem}.o")
        yield f"build {objects[-1]}: cc {_escaped(source)}"
    yield f"build _native_emulated.so: link {' '.join(objects)}\n"


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(SLOWER), default="_native")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    arguments = parser.parse_args()
    try:
        print(build(arguments.name, sanitize=arguments.sanitize))
    except NotBuilt as problem:
        sys.exit(str(problem))
