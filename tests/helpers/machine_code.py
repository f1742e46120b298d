"""What NVIDIA's machine code (SASS) issues for each element, and how many loads it has in flight; needs no GPU."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

_NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
_WIDE = ("LDG.E.128", "LDS.128", "STG.E.128")  # 16 bytes of global memory, of shared memory, and to global memory


def kernels(cubin: bytes) -> Iterator[tuple[str, list[str], dict[str, int]]]:
    """Yield name, instructions, and the number of the instruction behind each label, of every kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(":")
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in body.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            elif (found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)) and not found[1].startswith("NOP"):
                instructions.append(found[1])
        yield name, instructions, labels


def loops(instructions: list[str], labels: dict[str, int]) -> list[list[str]]:
    """Return the bodies of the innermost loops that move 16 bytes at a time."""
    spans = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if target and labels[target[1]] <= end:
            spans.append((labels[target[1]], end))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [body for start, end in inner if wide(body := instructions[start : end + 1])]


def wide(body: list[str]) -> int:
    """Return how many vectors of 16 bytes one turn of a loop takes."""
    return max(sum(kind in one for one in body) for kind in _WIDE)


def loads_in_flight(instructions: list[str]) -> int:
    """Return the longest run of 16-byte loads of global memory before the first use of any of their results."""
    longest, waiting = 0, set[str]()
    count = 0
    for one in instructions:
        load = re.search(r"LDG\.E\.128\S* R(\d+),", one)
        if load:
            count += 1
            waiting |= {f"R{int(load[1]) + i}" for i in range(4)}
            longest = max(longest, count)
        elif waiting & set(re.findall(r"R\d+", one)):
            count, waiting = 0, set()
    return longest
