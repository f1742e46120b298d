"""The operator tests run on each implementation that this machine has: the reference, the compiled library with each
instruction set, the Triton kernels (on a GPU, or without one in their interpreter); with --backend, on that one."""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
from helpers.guarded import guarded
from helpers.marks import instruction_sets, on_instruction_set
from helpers.triton_ladder import forget_choices, triton_modules

from fastddpm.kernels import native
from fastddpm.ops import backend, use_backend

# The modules of kernels/ that allocate the compiled library's outputs.
_ALLOCATING = (
    "native",
    "group_norm_silu.native_call",
    "attention.cpu",
    "conv3x3.cpu",
    "linear_bf16.cpu",
    "q_sample.cpu",
    "reverse_step.cpu",
)
# What torch asks of an operator hardly depends on how it is computed: once for the compiled library, once for Triton.
_ONCE = ("opcheck", "compile", "refuses", "export")
_ON_A_GPU = ("triton", "cuda")


def _implementations(config: pytest.Config) -> list[Any]:
    asked = config.getoption("--backend")
    if asked is not None:
        return [asked]
    if torch.cuda.is_available():
        triton = [pytest.param(name, marks=pytest.mark.gpu) for name in _ON_A_GPU]
    else:
        reason = _without_interpreter()
        triton = [pytest.param("triton", marks=pytest.mark.skipif(reason is not None, reason=str(reason)))]
    if config.getoption("--device") != "cpu":
        return ["reference", "auto", *triton]
    if native.unavailable() is not None:
        return ["auto", *triton]
    # The instruction sets below this machine's best run the same sources: with the exhaustive tests only.
    own = instruction_sets()[: native.ISAS.index(native.isa()) + 1]
    return ["reference", *own, *triton]


def _without_interpreter() -> str | None:
    """Return why Triton's kernels cannot run in its interpreter, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton below 3.7 fails with NumPy 2.4 and later"
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" not in metafunc.fixturenames:
        return
    module = metafunc.module.__name__.rpartition(".")[2]
    names = [name for name in _implementations(metafunc.config) if _computes(_name(name), module)]
    if native.ISAS[-1] in names and not module.startswith(("test_conv3x3", "test_linear_bf16", "test_attention")):
        names = [name for name in names if _name(name) != "avx512"]  # the same code but for products of bfloat16
    if module.endswith(("_emulated", "_sdpa")):
        names = ["auto"]
    elif module.endswith("_graph"):
        names = [name for name in names if _name(name) in _ON_A_GPU]
    elif module.startswith("test_triton"):
        names = [name for name in names if _name(name) == "triton"]
    elif _is_once(metafunc.function.__name__) and len(names) > 1:
        names = ["auto", *(name for name in names if _name(name) in _ON_A_GPU)]
    metafunc.parametrize("implementation", names, indirect=True)


def _name(implementation: Any) -> str:
    return implementation if isinstance(implementation, str) else str(implementation.values[0])


def _computes(implementation: str, module: str) -> bool:
    """Whether this test module's operation, if it is of one alone, has this implementation on a GPU."""
    operation = module.removeprefix("test_")
    if operation not in backend.OPERATIONS or implementation not in _ON_A_GPU:
        return True
    return backend._exists(operation, implementation)


def _is_once(test: str) -> bool:
    return any(word in test for word in _ONCE)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend, or of an instruction set of the compiled library."""
    name = request.param
    if name in native.ISAS:
        running = _instruction_set(name, monkeypatch)
    elif name in _ON_A_GPU and torch.cuda.is_available():
        running = _first_on_a_gpu(name, monkeypatch)
    elif name == "triton":
        running = _interpreter(monkeypatch, guard=not _is_once(request.node.name))
    else:
        running = use_backend(name)
    with running:
        yield name


@pytest.fixture
def device(request: pytest.FixtureRequest, implementation: str) -> torch.device:
    if implementation in _ON_A_GPU and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """Not TF32, in which PyTorch convolves float32 on a GPU unless it is told otherwise: 11 bits of each factor. And
    PyTorch's convolutions give the same bits twice."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@contextlib.contextmanager
def _instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    modules = [importlib.import_module(f"fastddpm.kernels.{module}") for module in _ALLOCATING]
    with on_instruction_set(name), guarded(monkeypatch, *modules):
        yield


@contextlib.contextmanager
def _interpreter(monkeypatch: pytest.MonkeyPatch, guard: bool) -> Iterator[None]:
    """What a GPU runs, on the CPU: the Triton kernels, and what they leave to it (float64) the reference.

    Not guarded where torch looks at how an output lies in its memory.
    """
    modules = triton_modules()
    with monkeypatch.context() as patch:
        patch.setitem(backend.LADDERS, "cpu", ("triton", "reference"))
        forget_choices()
        try:
            with guarded(monkeypatch, *modules) if guard else contextlib.nullcontext():
                yield
        finally:
            forget_choices()


@contextlib.contextmanager
def _first_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One kind of kernel, and the reference for what it leaves to others (float64)."""
    reason = backend._problem("group_norm_silu", name)
    if reason is not None:
        pytest.skip(reason)
    with monkeypatch.context() as patch:
        patch.setitem(backend.LADDERS, "cuda", (name, "reference"))
        forget_choices()
        try:
            yield
        finally:
            forget_choices()
