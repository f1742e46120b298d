"""Options and fixtures of the whole suite.

pytest tests/ops --backend reference        the operator tests on one backend of `fastddpm.ops`
pytest tests/ops --device cuda              the operator tests on a GPU
pytest -m gpu                               only what needs a GPU

Where there is no GPU, the Triton kernels run in their interpreter.
"""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.marks import instruction_sets, on_instruction_set

from fastddpm.kernels import native
from fastddpm.ops.backend import CHOICES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=CHOICES, default=None, help="backend that the operator tests run on")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="device that the operator tests run on")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in one process per core, at most 8; `-n 0`: in this one. A GPU's tests share no device."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of those processes, or started by its tests
        return
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    alone = option.usepdb or option.collectonly or torch.cuda.is_available()
    if whole and not alone and config.pluginmanager.hasplugin("xdist") and option.numprocesses is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        option.numprocesses, option.dist, option.loadscopereorder = min(cores, 8), "loadfile", False


def pytest_configure(config: pytest.Config) -> None:
    # The tensors are small: one thread is faster than several, and sums are in the same order on every machine.
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not ask for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first, so that all cores end together; of the slow ones that is the fuzz script's.
    items.sort(key=lambda item: {"benchmarks": "z"}.get(item.path.parent.name, item.path.parent.name), reverse=True)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("large") and "triton" in item.callspec.params.values():  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have bf16 on a CPU computed in it, as where the processor multiplies bfloat16; elsewhere that is slower."""
    monkeypatch.setattr(native, "has_bf16", lambda: True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """The compiled library on each instruction set that this machine has."""
    with on_instruction_set(request.param):
        yield
