"""The operator tests on a build of the CPU library that checks every access to memory and every undefined operation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.native_build import BuildError, build

from fastddpm.kernels import native


def _runtime(name: str) -> str | None:
    """The path of a sanitizer's library, as the compiler that built with it knows it."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    done = subprocess.run([compiler, f"-print-file-name={name}.so"], capture_output=True, text=True)
    path = Path(done.stdout.strip())
    return str(path) if path.is_absolute() and path.exists() else None


RUNTIMES = [_runtime(name) for name in ("libasan", "libubsan")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in RUNTIMES, reason="needs a C++ compiler with AddressSanitizer and UBSan"),
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
]


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return Path(build("_native", sanitize=True))
    except BuildError as problem:
        pytest.skip(str(problem))


def run(library: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "LD_PRELOAD": " ".join(map(str, RUNTIMES)),
        # Python itself never frees all that it has; torch's libraries define some names twice.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "sanitized.py"), str(library), *options],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_operator_tests_run_clean(library: Path) -> None:
    done = run(library)
    assert done.returncode == 0 and "[100%]" in done.stdout, done.stdout[-4000:]


def test_a_write_beyond_an_output_is_seen(library: Path) -> None:
    done = run(library, "--overrun")
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stdout, done.stdout[-4000:]
