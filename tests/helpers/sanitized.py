"""Run the operator tests on a library with sanitizers, or a wrong call.

    python tests/helpers/sanitized.py LIBRARY [--overrun]

The sanitizers' run time must be preloaded, as tests/kernels/test_native_sanitized.py does.
"""

import ctypes
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastddpm.kernels import interface, native


def overrun() -> None:
    """Tell the library of more memory than there is: it must not go unnoticed."""
    out, images, zero = torch.empty(16), torch.arange(1), torch.tensor(0)
    args = interface.RandomNormal(out=out.data_ptr(), n=1, num=20, key=native.key(images, zero, zero))
    native.library().fastddpm_cpu_random_normal(ctypes.byref(args), 1)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(sys.argv[1], Path(folder) / "_native.abi3.so")
        native._FOLDER = Path(folder)
        assert native.unavailable() is None, native.unavailable()
        if "--overrun" in sys.argv:
            overrun()
            return 0
        tests = str(Path(__file__).parents[1])
        chosen = "numbers or layouts or gradient or precision or batch or nan or dropout"
        options = [
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            "",
            "-k",
            f"({chosen}) and not emulated and not triton and not reference",
        ]
        return int(pytest.main([f"{tests}/ops", f"{tests}/kernels/test_native_threads.py", *options]))


if __name__ == "__main__":
    sys.exit(main())
