"""Commands keep the memory that they free: the next step does not fault its pages in again."""

import os
import platform
import subprocess
import sys

import pytest

from fastddpm.runtime.memory import keep_freed_memory

PROBE = """
import resource, sys
from fastddpm.runtime.memory import keep_freed_memory
import torch

kept = keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(16 << 20), *(torch.ones(1 << 20) for _ in range(16))]  # 64 MB, and 16 times 4 MB
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first, *later = [faults() for _ in range(5)]
print(int(kept), first, sum(later))
"""


def probe(**environment: str) -> tuple[bool, int, int]:
    """Whether memory is kept; page faults of allocating 128 MB the first time, and four times after it."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    surroundings.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=surroundings | environment, capture_output=True, text=True, check=True
    )
    kept, first, later = map(int, done.stdout.split())
    return bool(kept), first, later


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_are_faulted_in_once() -> None:
    kept, first, later = probe()
    assert kept and first > 50 and later < first / 2
    kept, first, later = probe(GLIBC_TUNABLES="glibc.malloc.tcache_count=7")  # glibc's default: the user chooses
    assert not kept and later > first


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
