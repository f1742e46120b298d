"""The compiled library gives the same bits with any number of threads, from several of Python's, and after a fork."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import contract
from torch import Tensor

from fastddpm import ops
from fastddpm.config import UNetConfig
from fastddpm.kernels import native
from fastddpm.sampling.engine import PreparedUNet
from fastddpm.unet import UNet

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@pytest.fixture(autouse=True)
def threads_as_asked_for() -> Iterator[None]:
    """Not fewer because other programs run, and afterwards as before."""
    threads = torch.get_num_threads()
    native.most_threads(64)
    yield
    torch.set_num_threads(threads)
    native.most_threads(0)


def images(n: int, c: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, c, size, size).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def outputs_and_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [output, *torch.autograd.grad(output, inputs, torch.randn_like(output))]


def group_norm_silu(dtype: torch.dtype) -> list[Tensor]:
    """Large enough for several tasks; channels 12 to a group across the seam; dropout."""
    x, skip = images(5, 64, 20, dtype), images(5, 32, 20, dtype)
    weight, bias = torch.randn(96, requires_grad=True), torch.randn(96, requires_grad=True)
    temb = torch.randn(5, 96, requires_grad=True)
    key = contract.key_tensors(range(5), 3, 4, torch.device("cpu"))
    y = ops.group_norm_silu(x, weight, bias, 8, skip=skip, temb=temb, dropout=0.2, **key)
    return outputs_and_gradients(y, [x, skip, weight, bias, temb])


def attention(dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (torch.randn(3, 100, 72).to(dtype).requires_grad_() for _ in range(3))
    return outputs_and_gradients(ops.attention(q, k, v), [q, k, v])


def convolution() -> list[Tensor]:
    x = images(3, 40, 30)
    weight, bias = torch.randn(72, 40, 3, 3, requires_grad=True), torch.randn(72, requires_grad=True)
    return outputs_and_gradients(ops.conv3x3(x, weight, bias), [x, weight, bias])


def noise() -> list[Tensor]:
    key = contract.key_tensors(range(40), 3, 4, torch.device("cpu"))
    drawn = ops.random_normal((3, 32, 32), **key, stream=1)
    x0 = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    table = torch.tensor([[0.6, 0.8]])
    x_t, eps = ops.q_sample(x0, torch.zeros(40, dtype=torch.int64), table, **key, flip=torch.rand(40) < 0.5)
    row = torch.tensor([[1.1, -0.4, 0.7, 0.2, 0.0, 0.5, 0.0, 0.0, 0.0]])
    del key["step"]
    previous = ops.reverse_step(x_t.clone(), eps, row, torch.tensor([7]), torch.tensor(0), **key)
    return [drawn, x_t, eps, previous]


OPERATIONS: dict[str, Callable[[], list[Tensor]]] = {
    "group_norm_silu float32": lambda: group_norm_silu(torch.float32),
    "group_norm_silu bfloat16": lambda: group_norm_silu(torch.bfloat16),
    "attention float32": lambda: attention(torch.float32),
    "attention bfloat16": lambda: attention(torch.bfloat16),
    "conv3x3": convolution,
    "noise": noise,
}


def digest(operation: str, threads: int) -> str:
    torch.set_num_threads(threads)
    # Of this thread alone: what other threads draw from the default generator does not matter.
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tensors = OPERATIONS[operation]()
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    data = b"".join(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_threads_do_not_matter(operation: str, instruction_set: None) -> None:
    assert len({digest(operation, threads) for threads in (1, 2, 3, 8)}) == 1


@pytest.mark.parametrize("timesteps", [4, 1000])
def test_threads_of_a_networks_preparation_do_not_matter(timesteps: int) -> None:
    """Its table of time embeddings is a product of PyTorch's, which sums in another order with another number."""
    config = UNetConfig(
        image_size=7, image_channels=4, width=24, multipliers=(1,), attention_resolutions=(7,), dropout=0.0, groups=8
    )
    torch.manual_seed(0)
    unet, x_t, t = UNet(config).eval(), torch.randn(2, 4, 7, 7), torch.tensor([0, 3])
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found = []
    for threads in (1, 2, 3, 6):
        torch.set_num_threads(threads)
        found.append(PreparedUNet(unet, range(timesteps))(x_t, t))
        assert torch.get_num_threads() == threads
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_limit_changes_no_bit(operation: str, instruction_set: None) -> None:
    found = set()
    for most in (1, 2, 3, 8):
        native.most_threads(most)
        found |= {digest(operation, threads) for threads in (1, 2, 8)}
    assert len(found) == 1


def test_a_limit_that_changes_between_the_calls_of_a_plan_changes_no_bit() -> None:
    """The plan and its memory are made for one number of threads, and its calls run on others."""
    config = UNetConfig(image_size=16, width=32, multipliers=(1, 2), attention_resolutions=(8,), dropout=0.0, groups=8)
    torch.manual_seed(0)
    unet, x_t, t = UNet(config).eval(), torch.randn(3, 3, 16, 16), torch.tensor([0, 3, 3])
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.set_num_threads(6)
    native.most_threads(6)
    prepared = PreparedUNet(unet, [0, 3])
    expected = prepared(x_t, t)
    for most in (1, 4, 2, 5, 3, 6):
        native.most_threads(most)
        assert torch.equal(prepared(x_t, t), expected)


def test_cores_that_move_between_the_calls_of_a_plan_change_no_bit() -> None:
    """The plan's memory is enough for threads that share what they transform, and for threads that do not."""
    config = UNetConfig(image_size=16, width=96, multipliers=(1, 2), attention_resolutions=(), groups=8)
    torch.manual_seed(0)
    unet, x_t, t = UNet(config).eval(), torch.randn(9, 3, 16, 16), torch.zeros(9, dtype=torch.int64)
    torch.set_num_threads(2)
    native.cores_are_far("near")
    prepared = PreparedUNet(unet, [0])
    expected = prepared(x_t, t)
    native.cores_are_far("far")
    found = prepared(x_t, t)
    native.cores_are_far("measured")
    assert torch.equal(found, expected)


def test_a_network_of_no_images() -> None:
    """As the network itself answers: an empty batch is what is left of a filter, and no reason to end the process."""
    for learned_variance in (False, True):
        config = UNetConfig(
            image_size=8, width=16, multipliers=(1, 2), attention_resolutions=(4,), groups=8,
            learned_variance=learned_variance,
        )  # fmt: skip
        unet, none = UNet(config).eval(), torch.zeros(0, dtype=torch.int64)
        out = PreparedUNet(unet, [5])(torch.zeros(0, 3, 8, 8), none)
        assert out.shape == unet(torch.zeros(0, 3, 8, 8), none).shape == (0, 6 if learned_variance else 3, 8, 8)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_calls_from_two_threads_at_once(operation: str) -> None:
    """Random inputs are drawn before: the generator is shared."""
    torch.set_num_threads(2)
    inputs = [torch.randn(3, 64, 64) for _ in range(3)]
    x = images(3, 64, 16).detach()
    one, zero, weight = torch.ones(64), torch.zeros(64), torch.randn(64, 64, 3, 3)
    key = contract.key_tensors(range(3), 3, 4, torch.device("cpu"))
    work: dict[str, Callable[[], Tensor]] = {
        "group_norm_silu": lambda: ops.group_norm_silu(x, one, zero, 8, dropout=0.1, **key),
        "attention": lambda: ops.attention(inputs[0], inputs[1], inputs[2]),
        "conv3x3": lambda: ops.conv3x3(x, weight),
        "noise": lambda: ops.random_normal((3, 64, 64), **key, stream=1),
    }
    run = work[operation.partition(" ")[0]]
    expected = run()
    wrong: list[int] = []

    def repeat() -> None:
        wrong.extend(i for i in range(20) if not torch.equal(run(), expected))

    threads = [threading.Thread(target=repeat) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork() -> None:
    """A data loader's worker is a fork of a process whose threads have run; the child has none of them."""
    before = {operation: digest(operation, 2) for operation in OPERATIONS}
    assert len(set(before.values())) == len(OPERATIONS)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # PyTorch's own operations need to be told of one thread; the library, asked for two, knows by itself.
            torch.get_num_threads = lambda: 2
            os.write(writing, "\n".join(digest(operation, 1) for operation in OPERATIONS).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read().splitlines() == list(before.values())
    os.waitpid(child, 0)


def test_an_image_does_not_depend_on_its_batch(instruction_set: None) -> None:
    x, weight = images(5, 48, 12).detach(), torch.randn(48, 48, 3, 3)
    one, zero = torch.ones(48), torch.zeros(48)
    q = torch.randn(5, 70, 48)
    for function in (
        lambda n: ops.group_norm_silu(x[n], one, zero, 8),
        lambda n: ops.attention(q[n], q[n], q[n]),
        lambda n: ops.conv3x3(x[n], weight),
    ):
        together = function(slice(None))
        for n in range(5):
            assert torch.equal(function(slice(n, n + 1)), together[n : n + 1])
