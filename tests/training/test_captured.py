"""A captured training step: replays of it are the steps that are launched one by one, to the bit.

Where there is no GPU, the capture is a stand-in: it keeps the operators of a step with their tensors, as a CUDA graph
keeps kernels with their addresses, and a replay calls them again. What the host put into the step stays as it was.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.marks import slow
from helpers.training import CPU, noise_images, tiny_preset, whole_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddpm.training import captured
from fastddpm.training.captured import WARM_UP, CapturedStep
from fastddpm.training.trainer import Trainer
from fastddpm.unet import network as unet_network

GPU = torch.device("cuda")
STEPS = WARM_UP + 4


class Operators(TorchDispatchMode):
    """Records operators; `replay` calls them again, with the results where they were. Reading a value is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read on the host")
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for held, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(held, Tensor):
                        held.copy_(value)


def trainer(**options: Any) -> Trainer:
    made = Trainer(tiny_preset(**options), noise_images(), CPU)
    made.optimizer._on_cpu = False  # what a GPU is given to do
    return made


def stand_in(state: Callable[[], dict[str, Tensor]]) -> Any:
    """A capture that leaves `state` as it was, as one on a GPU does, where nothing is computed."""

    def capture(step: Callable[[], None], restore: Any, device: torch.device, *, warm_up: int) -> Callable[[], None]:
        assert warm_up == 0
        before = {name: tensor.clone() for name, tensor in state().items()}
        with Operators() as operators:
            step()
        with torch.no_grad():
            for name, tensor in state().items():
                tensor.copy_(before[name])
        return operators.replay

    return capture


def everything(owner: Trainer) -> dict[str, Tensor]:
    optimizer = owner.optimizer
    averages = {f"ema{decay}.{i}": t for decay, ts in optimizer.averages.items() for i, t in enumerate(ts)}
    return optimizer.state_dict() | averages


@pytest.mark.parametrize(
    "options",
    [
        {"ema": (0.9, 0.5), "ema_ramp": True, "decay": "cosine"},
        slow({"accumulate": 2, "clip_gradient": 0.01}),
        slow({"precision": "bf16", "checkpoint_blocks": True}),
        {"ema_snapshots": True},
    ],
    ids=str,
)
def test_replays_are_the_steps(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments, averages, losses, norms: of every step its own noise, learning rate, shares and images."""
    monkeypatch.setattr(unet_network, "_check_range", lambda *_: None)  # it reads values on a CPU only
    expected, ours = trainer(**options), trainer(**options)
    monkeypatch.setattr(captured, "capture", stand_in(lambda: everything(ours)))
    ours._update = CapturedStep(ours._launch_update, CPU)
    kept = []
    for _ in range(STEPS):
        theirs = expected.train_step()
        kept.append((theirs, ours.train_step()))
    assert ours._update._replay is not None
    for theirs, found in kept:
        assert all(map(torch.equal, theirs, found))
    assert len({float(found[0]) for _, found in kept}) == STEPS
    left, right = whole_state(expected), whole_state(ours)
    assert all(torch.equal(left[name], right[name]) for name in left)
    for length, average in expected.optimizer.power_averages.items():
        assert all(map(torch.equal, average, ours.optimizer.power_averages[length]))
    assert expected.monitor.losses_by_t.read() == ours.monitor.losses_by_t.read()


def test_a_replayed_step_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet_network, "_check_range", lambda *_: None)
    ours = trainer()
    monkeypatch.setattr(captured, "capture", stand_in(lambda: everything(ours)))
    ours._update = CapturedStep(ours._launch_update, CPU)
    for _ in range(WARM_UP + 1):
        ours.train_step()
    weight = ours.optimizer.parameters[0].data.view(-1)
    kept = float(weight[0])
    weight[0] = float("nan")
    before = {name: tensor.clone() for name, tensor in everything(ours).items()}
    assert not ours.train_step()[2]
    assert all(torch.equal(tensor, before[name]) or name.startswith("weight") for name, tensor in
               everything(ours).items())  # fmt: skip
    weight[0] = kept
    assert ours.train_step()[2]


def test_a_step_that_cannot_be_captured_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(step: Any, restore: Any, device: torch.device, *, warm_up: int) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(captured, "capture", refuse)
    expected, ours = trainer(), trainer()
    ours._update = CapturedStep(ours._launch_update, CPU)
    with pytest.warns(
        UserWarning, match="training without a CUDA graph, since a step could not be captured: operation"
    ):
        for _ in range(STEPS):
            assert all(map(torch.equal, expected.train_step(), ours.train_step()))


def test_what_is_not_captured() -> None:
    assert tiny_preset().train.graph
    assert not isinstance(trainer()._update, CapturedStep)  # on a CPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replays_on_a_gpu(precision: str) -> None:
    losses = []
    for graph in (True, False):
        preset = tiny_preset(precision=precision, graph=graph, ema=(0.9, 0.5))
        owner = Trainer(dataclasses.replace(preset), noise_images(), GPU)
        losses.append([[float(number) for number in owner.train_step()] for _ in range(STEPS)])
        assert isinstance(owner._update, CapturedStep) == graph
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-5)
