"""Reads the registers, stack and shared memory of each kernel, which ptxas printed when csrc/build.py compiled it.

python csrc/cuda/resources.py    prints the table of docs/measurements/gpu.md for the kernels in build/native-cuda
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / "build" / "native-cuda"
CHIPS = ("sm_80", "sm_90a", "sm_100a")
_KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """The resources that one kernel needs on one chip."""

    source: str
    kernel: str
    chip: str
    stack: int  # bytes
    spills: int  # bytes
    registers: int
    shared: int  # bytes of static shared memory; dynamic memory is chosen at each call


def kernel_name(mangled: str) -> str:
    """Return the last part of a mangled name: normalize for _ZN8fastddpm10group_norm..9normalizeI.."""
    at, name = len("_ZN"), ""
    while length := re.match(r"\d+", mangled[at:]):
        start = at + length.end()
        at = start + int(length[0])
        name = mangled[start:at]
    return name


def usages(folder: Path = FOLDER) -> list[Usage]:
    found = []
    for file in sorted(folder.glob("*.usage")):
        for mangled, chip, stack, stores, loads, registers, rest in _KERNEL.findall(file.read_text(encoding="utf-8")):
            shared = re.search(r"(\d+) bytes smem", rest)
            found.append(
                Usage(
                    file.name.partition(".")[0], kernel_name(mangled), chip, int(stack), int(stores) + int(loads),
                    int(registers), int(shared[1]) if shared else 0,
                )
            )  # fmt: skip
    return found


def _range(values: Iterable[int]) -> str:
    low, *_, high = sorted([*values] * 2)
    return str(low) if low == high else f"{low}-{high}"


def table(found: list[Usage]) -> str:
    lines = [
        f"| source | kernel | variants | {' | '.join(f'registers, {chip}' for chip in CHIPS)} "
        "| stack | spills | static shared |",
        "|---|---|---|" + "---|" * (len(CHIPS) + 3),
    ]
    for source, kernel in dict.fromkeys((usage.source, usage.kernel) for usage in found):
        of_kernel = [usage for usage in found if (usage.source, usage.kernel) == (source, kernel)]
        by_chip = [[usage.registers for usage in of_kernel if usage.chip == chip] for chip in CHIPS]
        bytes_ = [_range(getattr(usage, name) for usage in of_kernel) for name in ("stack", "spills", "shared")]
        cells = [f"`{source}`", f"`{kernel}`", str(len(by_chip[0])), *map(_range, by_chip), *bytes_]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(usages()))
