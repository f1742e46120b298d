"""How long a cache line takes from one core to another and back, which says whether two cores share a cache."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

# Above, they share none: on an AMD EPYC (Zen 5) it is 70 to 140 ns with a cache in common and 350 to 450 without.
SHARED_NS = 220
SOURCE = r"""
#include <omp.h>
#include <stdio.h>
int main(void) {
    double best = 1e9;
    for (int trial = 0; trial < 3; ++trial) {
        int turn = 0;
        double start = 0;
#pragma omp parallel num_threads(2)
        {
            const int me = omp_get_thread_num();
#pragma omp barrier
            if (me == 0) start = omp_get_wtime();
            for (int i = 0; i < 4000; ++i) {
                while (__atomic_load_n(&turn, __ATOMIC_ACQUIRE) != 2 * i + me) {}
                __atomic_store_n(&turn, 2 * i + me + 1, __ATOMIC_RELEASE);
            }
        }
        const double ns = (omp_get_wtime() - start) / 4000 * 1e9;
        if (ns < best) best = ns;
    }
    printf("%.0f\n", best);
    return 0;
}
"""


@cache
def _program() -> Path | None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="fastddpm-core-pair-"))
    source, program = folder / "pair.c", folder / "pair"
    source.write_text(SOURCE, encoding="utf-8")
    built = subprocess.run([compiler, "-O2", "-fopenmp", source, "-o", program], capture_output=True, check=False)
    return program if built.returncode == 0 else None


def round_trip_ns() -> float | None:
    """The shortest of three trials, each the mean of 4000 round trips; None without a C compiler with OpenMP."""
    program = _program()
    if program is None:
        return None
    return float(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


def kind(before: float | None, after: float | None) -> str | None:
    """Of a turn between two round trips: "shared", "apart", or None where they differ or are not known."""
    if before is None or after is None or (before > SHARED_NS) != (after > SHARED_NS):
        return None
    return "apart" if before > SHARED_NS else "shared"


def turns(
    sides: Mapping[Any, Callable[[], float]], rounds: int, round_trip: Callable[[], float | None] = round_trip_ns
) -> Iterator[tuple[Any, float, str | None]]:
    """Each side in turn, `rounds` times: its name, what it returns, and the kind of its turn."""
    before = round_trip()
    for _ in range(rounds):
        for name, side in sides.items():
            figure, after = side(), round_trip()
            yield name, figure, kind(before, after)
            before = after
