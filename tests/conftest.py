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

from fastddpm.kernels import native
from fastddpm.ops.backend import CHOICES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=CHOICES, default=None, help="backend that the operator tests run on")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="device that the operator tests run on")


def pytest_configure(config: pytest.Config) -> None:
    # The tensors are small: one thread is faster than several, and sums are in the same order on every machine.
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(params=native.ISAS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """The compiled library on each instruction set that this machine has."""
    before = native.isa()
    if native.isa(request.param) != request.param:
        native.isa(before)
        pytest.skip(f"this machine has no {request.param}")
    yield
    native.isa(before)
