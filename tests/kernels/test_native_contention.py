"""How many threads the compiled library uses while other programs take the cores."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastddpm.kernels import native

needs_library = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
HEADER = Path(__file__).parents[2] / "csrc" / "cpu" / "contention.h"
MS = 1_000_000
PROGRAM = f"""
#include <cstdio>
#include "{HEADER}"
int main() {{
    fastddpm::Contention contention;
    long long now, waited;
    int threads;
    while (std::scanf("%lld %lld %d", &now, &waited, &threads) == 3) {{
        contention.look(now, waited, threads);
        std::printf("%d %lld\\n", contention.most(), static_cast<long long>(contention.next_look() - now));
    }}
}}
"""


@dataclass(frozen=True)
class Look:
    """`ms` after the last one, in which on average `waiting` of `threads` were waiting for a core."""

    ms: float
    waiting: float
    threads: int = 2


@pytest.fixture(scope="module")
def decide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler; there is none")
    folder = tmp_path_factory.mktemp("contention")
    (folder / "decide.cpp").write_text(PROGRAM)
    command = ["c++", "-std=c++17", "-Wall", "-Werror", str(folder / "decide.cpp"), "-o", str(folder / "decide")]
    subprocess.run(command, check=True)
    yield folder / "decide"


def decisions(program: Path, looks: Sequence[Look]) -> list[tuple[int, float]]:
    """The limit (0: none) after each look, and the ms until the next. A first look long after boot precedes them."""
    now, waited = 10**12, 5 * 10**9
    lines = [f"{now} {waited} 2"]
    for look in looks:
        now, waited = now + int(look.ms * MS), waited + int(look.ms * look.waiting * MS)
        lines.append(f"{now} {waited} {look.threads}")
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    assert found[0] == ["0", str(20 * MS)]
    return [(int(most), int(ns) / MS) for most, ns in found[1:]]


@pytest.mark.parametrize(
    ("threads", "waiting", "most"),
    [
        (2, 0.0, 0),  # nobody waits
        (2, 0.24, 0),  # one thread waits for less than a quarter of the time: two are still faster than one
        (2, 0.5, 1),  # a program shares a core with one of two threads
        (2, 1.0, 1),  # one on each core
        (8, 0.5, 7),  # one program, which stays on one of eight cores
        (8, 8 / 9, 6),  # one program, which goes round the eight cores: each of nine waits a ninth of the time
        (8, 1.5, 5),  # three programs
        (8, 4.0, 1),  # one on each core
        (8, 7.5, 1),  # many
    ],
)
def test_as_many_threads_fewer_as_cores_are_taken(decide: Path, threads: int, waiting: float, most: int) -> None:
    found = decisions(decide, [Look(20, waiting, threads), Look(20, waiting, threads)])
    assert [limit for limit, _ in found] == [0, most]


def test_a_moments_disturbance_changes_nothing(decide: Path) -> None:
    assert decisions(decide, [Look(20, 1.0), Look(20, 0), Look(20, 1.0), Look(20, 0)]) == [(0, 20)] * 4


def test_a_short_disturbance_is_short(decide: Path) -> None:
    short = [Look(20, 0.5), Look(20, 0.5), Look(20, 0), Look(20, 0)]
    assert decisions(decide, short) == [(0, 20), (1, 20), (0, 20), (0, 20)]
    # Again, after a time without: the pause is as short as the first.
    assert decisions(decide, short + short)[-4:] == [(0, 20), (1, 20), (0, 20), (0, 20)]


def test_all_threads_are_tried_again_and_ever_more_rarely(decide: Path) -> None:
    """One program on one of two cores does not hinder one thread: only a trial shows that it is still there."""
    looks, pauses = [Look(20, 0.6)], [(0, 20)]
    for pause in (20, 40, 80, 160, 320, 640, 1280, 1280):
        looks += [Look(20, 0.6), Look(pause, 0.0)]
        pauses += [(1, pause), (0, 20)]
    assert decisions(decide, looks) == pauses


def test_there_is_no_trial_while_even_the_limited_threads_wait(decide: Path) -> None:
    looks = [Look(20, 1.0), Look(20, 1.0), Look(20, 0.4), Look(40, 0.4), Look(80, 0.4), Look(160, 0.1)]
    assert decisions(decide, looks) == [(0, 20), (1, 20), (1, 40), (1, 80), (1, 160), (0, 20)]


def test_a_limit_is_lowered_further(decide: Path) -> None:
    found = decisions(decide, [Look(20, 1.0, 8), Look(20, 1.0, 8), Look(20, 0.5, 8), Look(40, 2.0, 8)])
    assert [most for most, _ in found] == [0, 6, 5, 1]


def test_a_thread_that_ends_takes_its_waiting_along(decide: Path) -> None:
    """The sum over threads falls: nothing is concluded from that."""
    assert decisions(decide, [Look(20, -50.0), Look(20, 0.0)]) == [(0, 20), (0, 20)]


def test_a_pause_of_the_process_is_no_contention(decide: Path) -> None:
    assert decisions(decide, [Look(60_000, 0.001), Look(20, 0.0)]) == [(0, 20), (0, 20)]


@pytest.fixture
def free_choice() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    native.most_threads(0)
    torch.set_num_threads(threads)


@needs_library
def test_the_limit_is_told(free_choice: None) -> None:
    assert native.most_threads(3) == 3 and native.most_threads() == 3
    native.most_threads(0)
    assert native.most_threads() in (None, 1)  # 1: other programs run beside this test


SAMPLE = """
import sys, time
import torch
from fastddpm import ops
from fastddpm.kernels import native
torch.set_num_threads(2)
x, weight = torch.randn(2, 64, 32, 32).contiguous(memory_format=torch.channels_last), torch.randn(64, 64, 3, 3)
expected = ops.conv3x3(x, weight)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end and native.most_threads() is None:
    assert torch.equal(ops.conv3x3(x, weight), expected)
print(native.most_threads())
"""


@needs_library
@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists() or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores, and a system that counts how long threads wait for them",
)
@pytest.mark.parametrize(("policy", "seconds", "most"), [("active", 60, "1"), ("passive", 2, "None")])
def test_programs_on_all_cores_are_noticed(policy: str, seconds: int, most: str) -> None:
    """The times are far more than it takes. Threads that sleep while they wait are left as they are."""
    programs = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * len(os.sched_getaffinity(0)))
    ]
    try:
        command = [sys.executable, "-c", SAMPLE, str(seconds)]
        environment = os.environ | {"OMP_WAIT_POLICY": policy}
        assert subprocess.check_output(command, env=environment, text=True) == f"{most}\n"
    finally:
        for program in programs:
            program.kill()
            program.wait()
