"""csrc/build.py as a module: it lies outside every package."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[2] / "csrc" / "build.py"
_spec = importlib.util.spec_from_file_location("fastddpm_csrc_build", _PATH)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

build, find_nvcc, BuildError = _module.build, _module.find_nvcc, _module.BuildError
