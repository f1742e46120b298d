"""The network alone, as fast as the sampler evaluates it: the same numbers, kept up to date."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers.engines import arguments, in_float64, network, relative_error
from helpers.networks import TINY, batch, tiny

import fastddpm
from fastddpm.errors import UsageError
from fastddpm.kernels import native
from fastddpm.sampling import captured_network, engine
from fastddpm.sampling import denoiser as denoising


@pytest.mark.parametrize("config", [TINY, tiny(num_classes=5, label_dropout=0.1)], ids=["no classes", "classes"])
def test_numbers_are_the_networks(config: fastddpm.config.UNetConfig) -> None:
    unet = network(config)
    inputs = arguments(3, config)
    denoiser = fastddpm.Denoiser(unet)
    for values in (inputs, tuple(None if value is None else value.flip(0) for value in inputs)):
        assert relative_error(denoiser(*values), in_float64(unet, *values)) <= 1e-5


def test_it_is_the_engine_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever surrounds the call: inference mode, autocast, training mode with dropout."""
    unet = network(tiny(dropout=0.5)).train()
    x_t, t = batch(2)
    denoiser = fastddpm.Denoiser(unet)
    expected = in_float64(unet, x_t, t, None)
    plain = denoiser(x_t, t)
    with torch.inference_mode():
        assert torch.equal(denoiser(x_t, t), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(denoiser(x_t, t), plain)
    assert relative_error(plain, expected) <= 1e-5 and not plain.requires_grad and unet.training
    if native.unavailable() is None:
        monkeypatch.setattr(engine.PreparedUNet, "__call__", lambda self, x, t, label=None: x)
        assert denoiser(x_t, t) is x_t


def test_changed_weights_are_noticed() -> None:
    unet = network(TINY)
    x_t, t = batch(2)
    denoiser = fastddpm.Denoiser(unet)
    denoiser(x_t, t)
    for change in (lambda p: p.mul_(2), lambda p: setattr(p, "data", p.data.clone() + 0.1)):
        with torch.no_grad():
            for parameter in unet.parameters():
                change(parameter)
        assert relative_error(denoiser(x_t, t), in_float64(unet, x_t, t, None)) <= 1e-5


@pytest.mark.usefixtures("bf16_instructions")
def test_the_precision_is_the_engines() -> None:
    unet = network(TINY)
    x_t, t = batch(2)
    half = fastddpm.Denoiser(unet, fastddpm.EngineConfig(precision="bf16"))
    error = relative_error(half(x_t, t), in_float64(unet, x_t, t, None))
    assert 1e-4 < error < 3e-2


def test_another_network_is_called_as_it_is() -> None:
    class Halves(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
            self.drop = torch.nn.Dropout(0.9)

        def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.drop(x_t * self.scale)

    x_t, t = batch(2)
    found = fastddpm.Denoiser(Halves())(x_t, t)
    assert found.dtype == torch.float64 and torch.equal(found, x_t.double() / 2) and not found.requires_grad
    with pytest.raises(UsageError, match=r"must be a torch\.nn\.Module; got function"):
        fastddpm.Denoiser(lambda x_t, t: x_t)  # type: ignore[arg-type]


def test_copies_prepare_their_own() -> None:
    unet = network(TINY)
    x_t, t = batch(2)
    denoiser = fastddpm.Denoiser(unet)
    expected = denoiser(x_t, t)
    for other in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert other.network is not unet and torch.equal(other(x_t, t), expected)


def test_inside_unchanging_the_weights_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = network(TINY)
    x_t, t = batch(2)
    denoiser, counted = fastddpm.Denoiser(unet), []
    is_current = denoising.is_current
    monkeypatch.setattr(denoising, "is_current", lambda *a: counted.append(a) or is_current(*a))
    with denoiser.unchanging():
        denoiser(x_t, t)
        with torch.no_grad():
            unet.conv_out.bias.add_(1)
        denoiser(x_t, t)
        assert not counted
    assert relative_error(denoiser(x_t, t), in_float64(unet, x_t, t, None)) <= 1e-5


class Event:
    """In place of a CUDA event."""

    def record_event(self) -> "Event":
        return self

    def wait_event(self, event: "Event") -> None:
        pass


def test_the_second_call_of_a_shape_is_captured_and_later_ones_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the capture, which runs the evaluation, and does so again at a replay."""
    captures = []

    def capture(step: Callable[[], None], restore: Callable[[], None], device: torch.device) -> Callable[[], None]:
        captures.append(step)
        step()
        return step

    monkeypatch.setattr(captured_network, "capture", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Event())
    unet = network(tiny(num_classes=5, label_dropout=0.1))
    evaluate = captured_network.CapturedNetwork(lambda *a: unet(*a).detach())
    shapes = [arguments(n, unet.config) for n in (3, 2, 3, 2, 3, 3)]
    shapes[3] = (shapes[3][0], torch.tensor([7]).expand(2), shapes[3][2])  # one timestep for all is another shape
    results = [evaluate(values) for values in shapes]
    assert len(captures) == 1
    for values, out in zip(shapes, results, strict=True):
        assert torch.equal(out, unet(*values))


def test_a_failed_capture_is_said_once_and_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(step: Callable[[], None], restore: Callable[[], None], device: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured_network, "capture", capture)
    evaluate = captured_network.CapturedNetwork(lambda x: 2 * x)
    x = torch.ones(2, 3)
    assert torch.equal(evaluate([x]), 2 * x)
    with pytest.warns(UserWarning, match="without a CUDA graph, since it could not be captured: operation not"):
        assert torch.equal(evaluate([x]), 2 * x)
    assert torch.equal(evaluate([x]), 2 * x)


@pytest.mark.gpu
def test_replays_on_a_gpu_give_the_bits_of_the_first_call() -> None:
    unet = network(TINY).cuda()
    values = [v.cuda() for v in arguments(3, TINY) if v is not None]
    denoiser = fastddpm.Denoiser(unet)
    first, second, third = (denoiser(*values) for _ in range(3))
    other = denoiser(values[0] + 1, *values[1:])
    assert torch.equal(first, second) and torch.equal(first, third) and not torch.equal(first, other)


def test_the_promise_ends_with_the_last_block() -> None:
    """Blocks of two threads end in any order."""
    unet = network(TINY)
    x_t, t = batch(2)
    denoiser = fastddpm.Denoiser(unet)
    first, second = denoiser.unchanging(), denoiser.unchanging()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    with torch.no_grad():
        unet.conv_in.weight.mul_(3)
    assert relative_error(denoiser(x_t, t), in_float64(unet, x_t, t, None)) <= 1e-5


def test_autocast_does_not_reach_what_unchanging_prepares() -> None:
    unet = network(TINY)
    x_t, t = batch(2)
    denoiser = fastddpm.Denoiser(unet, fastddpm.EngineConfig(native=False))
    with torch.autocast("cpu", torch.bfloat16), denoiser.unchanging():
        assert relative_error(denoiser(x_t, t), in_float64(unet, x_t, t, None)) <= 1e-5


def test_another_view_at_the_same_address_is_noticed() -> None:
    unet = network(TINY)
    x_t, t = batch(2)
    denoiser = fastddpm.Denoiser(unet)
    denoiser(x_t, t)
    unet.conv_in.weight.data = unet.conv_in.weight.data.transpose(2, 3)
    assert relative_error(denoiser(x_t, t), in_float64(unet, x_t, t, None)) <= 1e-5


def test_a_timestep_without_a_dimension_is_refused_as_by_the_network() -> None:
    unet = network(TINY)
    evaluate = captured_network.CapturedNetwork(unet)
    with pytest.raises(ValueError, match=r"t must be integer \(2,\); got torch.int64 \(\)"):
        evaluate([batch(2)[0], torch.tensor(5)])
