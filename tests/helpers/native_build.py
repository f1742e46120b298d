"""csrc/build.py as a module: it lies outside every package."""

from helpers.scripts import load_script

_module = load_script("csrc/build.py", "fastddpm_csrc_build")

build, find_nvcc, BuildError = _module.build, _module.find_nvcc, _module.BuildError
