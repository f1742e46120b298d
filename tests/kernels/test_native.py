"""The compiled library against the NumPy specification, and the choice of backends around it."""

import hashlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
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


# One value; one block; a part of one; a part of the 64 blocks computed together; exactly those; one more; CIFAR's.
@needs_library
@pytest.mark.parametrize("num", [1, 4, 7, 255, 256, 257, 3072])
def test_normals_equal_the_specification_to_the_last_bit_of_float32(num: int) -> None:
    images = torch.tensor([3, 2**31, 17])
    ours = native.random_normal(num, images, torch.tensor(2**40 + 1), torch.tensor(12), 3).numpy()
    words = reference.philox(
        np.arange((num + 3) // 4)[None, :], images.numpy()[:, None], np.array([12]), np.array([3]), 2**40 + 1
    )
    expected = reference.normals(words).reshape(3, -1)[:, :num]
    # Rounding to float32 alone may cost 2^-24 of the value.
    np.testing.assert_allclose(ours, expected, rtol=2.0**-24, atol=1e-10)


@needs_library
def test_normals_have_the_same_bits_on_every_machine() -> None:
    images = torch.tensor([0, 1, 7, 2**31, 2**32 - 1])
    ours = native.random_normal(3 * 64 * 64 + 3, images, torch.tensor(12345678901), torch.tensor(999), 1)
    bits = ours.numpy().astype("<f4").tobytes()
    assert hashlib.sha256(bits).hexdigest() == "7de22a89a8ccae90980d2349bfcb72d800a89b656e028965ba302ca42371295f"


@needs_library
def test_nothing_is_drawn_for_no_image_or_an_empty_one() -> None:
    zero = torch.tensor(0)
    assert native.random_normal(8, torch.arange(0), zero, zero, 1).shape == (0, 8)
    assert native.random_normal(0, torch.arange(3), zero, zero, 1).shape == (3, 0)


@needs_library
def test_strided_images_are_read_in_order() -> None:
    images, zero = torch.arange(20), torch.tensor(0)
    expected = native.random_normal(8, images, zero, zero, 1)[::3]
    assert torch.equal(native.random_normal(8, images[::3], zero, zero, 1), expected)


@needs_library
@pytest.mark.parametrize("images", [torch.arange(3, dtype=torch.int32), torch.arange(3, device="meta")])
def test_images_that_the_library_cannot_read_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be int64 on the CPU; got torch\.int"):
        native.random_normal(4, images, torch.tensor(0), torch.tensor(0), 1)


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(
    not Path("/proc/self/maps").exists() or not (Path(torch.__file__).parent / "lib" / "libgomp.so.1").exists(),
    reason="this torch brings no libgomp to share, or the system does not list what is loaded",
)
def test_it_shares_the_threads_of_torch() -> None:
    program = (
        "import torch\nfrom fastddpm.kernels import native\nassert native.unavailable() is None\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [Path(line).parent.name for line in done.stdout.splitlines()] == ["lib"]


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
    row = torch.tensor([[1.1, -0.4, 0.7, 0.2, 0.0, 0.5, 0.0, 0.0, 0.0]])
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
    with ops.use_backend("cuda"), pytest.raises(UsageError, match="'cuda' was forced, but it does not run on cpu"):
        ops.group_norm_silu(x, one, one, 2)
    with pytest.raises(UsageError, match="does not exist; choose one of auto"), ops.use_backend("gpu"):
        pass


def test_the_environment_variable_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDPM_BACKEND", "reference")
    assert set(ops.status().values()) == {"reference"}
    monkeypatch.setenv("FASTDDPM_BACKEND", "fast")
    with pytest.raises(UsageError, match="'fast' does not exist"):
        ops.status()


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder in which the library is looked for: empty."""
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    native._loaded.cache_clear()
    backend._resolve.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    native._loaded.cache_clear()
    backend._resolve.cache_clear()


def test_a_missing_library_is_done_without_and_reported(nowhere: Path) -> None:
    (nowhere / "_native_missing.txt").write_text("no compiled library: none was built\n")
    assert ops.status()["random_normal"] == "reference (no compiled library: none was built)"
    zero = torch.tensor(0)
    values = ops.random_normal((4,), torch.arange(3), zero, zero, 1)
    words = reference.philox(np.zeros(1), np.arange(3), np.zeros(1), np.ones(1), 0)
    np.testing.assert_allclose(values.numpy(), reference.normals(words), atol=1e-6)
    with pytest.raises(RuntimeError, match="none was built"):
        native.random_normal(4, torch.arange(3), zero, zero, 1)
    with ops.use_backend("cpu"), pytest.raises(UsageError, match="'cpu' was forced, but no compiled library: none was"):
        ops.random_normal((4,), torch.arange(3), zero, zero, 1)


def test_a_forced_backend_that_an_operation_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each CPU operation has all that its device offers; here the device offers one that no operation has.
    monkeypatch.setitem(backend.LADDERS, "cpu", ("tpu", "reference"))
    monkeypatch.setattr(backend, "CHOICES", (*backend.CHOICES, "tpu"))
    backend._resolve.cache_clear()
    try:
        with ops.use_backend("tpu"), pytest.raises(UsageError) as error:
            ops.random_normal((4,), torch.arange(3), torch.tensor(0), torch.tensor(0), 1)
        assert str(error.value).endswith(
            "'tpu' was forced, but random_normal has no tpu implementation; possible here: reference"
        )
        # Chosen by itself it is passed over, and what does not exist is not reported as missing.
        assert set(ops.status().values()) == {"reference"}
    finally:
        backend._resolve.cache_clear()


@pytest.mark.parametrize("note", [None, b"", b"\xff\xfe"])
def test_a_checkout_that_was_never_built_says_what_to_do(nowhere: Path, note: bytes | None) -> None:
    if note is not None:
        (nowhere / "_native_missing.txt").write_bytes(note)
    assert str(native.unavailable()).startswith("no compiled library beside kernels/native.py")


def test_a_broken_library_is_named(nowhere: Path) -> None:
    (nowhere / "_native.abi3.so").write_bytes(b"not a library")
    assert str(native.unavailable()).startswith("_native.abi3.so cannot be loaded")
    assert ops.status()["q_sample"].startswith("reference (_native.abi3.so cannot be loaded")


def test_a_forced_backend_holds_in_other_threads() -> None:
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.chosen_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"] and backend.chosen_backend() == "auto"
