"""The compiled library against the NumPy specification, and the choice of backends around it."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastddpm import ops
from fastddpm.errors import UsageError
from fastddpm.kernels import native
from fastddpm.kernels.philox import reference
from fastddpm.ops import backend

needs_library = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
SEEDS = [0, 1, 2**62 + 12345, -7]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_it_is_built_where_there_is_a_compiler() -> None:
    installed = Path(native.__file__).parent
    if not list(installed.glob("_native*")):
        pytest.skip("this is a bare checkout, nothing was installed")
    assert native.unavailable() is None


@needs_library
@pytest.mark.parametrize("seed", SEEDS)
def test_words_equal_the_specification_bit_for_bit(seed: int) -> None:
    images = torch.tensor([0, 5, 2**32 - 1])
    words = native.philox_words(1000, images, torch.tensor(seed), torch.tensor(999), 2049)
    expected = reference.philox(
        np.arange(1000)[None, :], images.numpy()[:, None], np.array([999]), np.array([2049]), seed
    )
    np.testing.assert_array_equal(words.numpy(), np.stack(expected, axis=-1))


@needs_library
@pytest.mark.parametrize("num", [1, 4, 7, 3072])
def test_normals_equal_the_specification(num: int) -> None:
    images = torch.tensor([3, 2**31, 17])
    ours = native.random_normal(num, images, torch.tensor(2**40 + 1), torch.tensor(12), 3).numpy()
    words = reference.philox(
        np.arange((num + 3) // 4)[None, :], images.numpy()[:, None], np.array([12]), np.array([3]), 2**40 + 1
    )
    expected = reference.normals(words).reshape(3, -1)[:, :num]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


@needs_library
def test_the_number_of_threads_does_not_matter() -> None:
    images, zero = torch.arange(40), torch.tensor(0)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native.random_normal(3072, images, zero, zero, 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_library
def test_every_operation_that_draws_noise_agrees_with_its_reference() -> None:
    images, seed, step = torch.arange(5), torch.tensor(9), torch.tensor(4)
    x0 = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    table = torch.tensor([[0.6, 0.8]])
    out = torch.randn(5, 3, 8, 8)
    row = torch.tensor([[1.1, -0.4, 0.7, 0.2, 0.0, 0.5, 0.0, 0.0]])
    results = {}
    for name in ("cpu", "reference"):
        with ops.use_backend(name):
            x_t, eps = ops.q_sample(x0, torch.zeros(5, dtype=torch.int64), table, images, seed, step)
            x = ops.random_normal((3, 8, 8), images, seed, step, 1)
            ops.reverse_step(x, out, row, torch.tensor([7]), torch.tensor(0), images, seed)
            results[name] = (x_t, eps, x)
    for ours, expected in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    x, one = torch.randn(1, 4, 2, 2), torch.ones(4)
    with ops.use_backend("triton"), pytest.raises(UsageError, match="'triton' was forced, but it does not run on cpu"):
        ops.group_norm_silu(x, one, one, 2)
    with ops.use_backend("cpu"), pytest.raises(UsageError, match="group_norm_silu has no cpu implementation"):
        ops.group_norm_silu(x, one, one, 2)
    with pytest.raises(UsageError, match="does not exist; choose one of auto"), ops.use_backend("gpu"):
        pass


def test_the_environment_variable_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDPM_BACKEND", "reference")
    assert set(ops.status().values()) == {"reference"}
    monkeypatch.setenv("FASTDDPM_BACKEND", "fast")
    with pytest.raises(UsageError, match="'fast' does not exist"):
        ops.status()


def test_a_missing_library_is_done_without_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no compiled library: none was built"
    monkeypatch.setattr(native, "_loaded", lambda: reason)
    monkeypatch.setattr(backend, "_resolve", backend._resolve.__wrapped__)
    monkeypatch.setattr("fastddpm.kernels.random_normal.cpu.unavailable", lambda: reason)
    assert ops.status()["random_normal"] == f"reference ({reason})"
    zero = torch.tensor(0)
    values = ops.random_normal((4,), torch.arange(3), zero, zero, 1)
    words = reference.philox(np.zeros(1), np.arange(3), np.zeros(1), np.ones(1), 0)
    np.testing.assert_allclose(values.numpy(), reference.normals(words), atol=1e-6)
    with pytest.raises(RuntimeError, match="none was built"):
        native.random_normal(4, torch.arange(3), zero, zero, 1)


def test_a_forced_backend_holds_in_other_threads() -> None:
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.chosen_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"] and backend.chosen_backend() == "auto"
