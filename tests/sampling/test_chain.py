"""The chain of one batch: memory that stays, nothing for the host to decide, replays, padding, what is watched."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.chains import FUSED, STEPS, chain_of, sampler
from helpers.marks import slow
from helpers.networks import SMALLEST, TINY, Formula, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.config import DiffusionConfig, EngineConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.sampling import chain as chains
from fastddpm.sampling import cuda_graph
from fastddpm.sampling.sampler import Sampler
from fastddpm.unet import network as unet_network


class HostReads(TorchDispatchMode):
    """Notes what would make the host wait for the device, which no CUDA graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("labels", [False, True])
def test_a_step_reads_nothing_on_the_host_and_moves_no_memory(labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA graph needs it; guidance of every kind and labels included. The operators' own kernels: tests/ops."""
    monkeypatch.setattr(unet_network, "_check_range", lambda *_: None)  # it reads values on a CPU only
    config = tiny(num_classes=3, label_dropout=0.1) if labels else TINY
    guided: dict[str, Any] = {"guidance": 2.0, "guidance_rescale": 0.5, "dynamic_threshold": 0.9}
    owner = sampler(config, **(guided if labels else {}))
    chain = chain_of(owner, 2, [5, 6], [0, 2] if labels else None)
    state = {name: value.data_ptr() for name, value in vars(chain).items() if isinstance(value, Tensor)}
    assert len(state) == (7 if labels else 6)
    with HostReads() as reads, torch.no_grad():
        for _ in range(STEPS):
            chain.step(keep_x0=True)
        after = chain.x.clone()
        chain.rewind(STEPS - 1)
        chain.step(keep_x0=True)
        chain.x.copy_(after)
    assert reads.names == []
    assert {name: value.data_ptr() for name, value in vars(chain).items() if isinstance(value, Tensor)} == state
    torch.testing.assert_close(
        chain.x.clamp(-1, 1), owner.sample([5, 6], [0, 2] if labels else None), rtol=0, atol=1e-5
    )


@pytest.fixture
def pretended_graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs on a CPU: a capture takes steps to warm up, as on a GPU, and a replay is the step. Notes both."""
    log: list[str] = []

    def capture(step: chains.Replay, restore: chains.Replay, device: torch.device) -> chains.Replay:
        for _ in range(3):
            step()
            restore()
        log.append("capture")

        def replay() -> None:
            log.append("replay")
            step()

        return replay

    monkeypatch.setattr(chains, "capture", capture)
    return log


def graphed(owner: Sampler, batch: int, images: list[int]) -> chains.ReverseChain:
    chain = chain_of(owner, batch, images)
    chain._graph = True
    return chain


def test_replays_of_one_captured_step_are_the_chain(pretended_graphs: list[str]) -> None:
    """Index, seed, images and counters are read from memory; capturing leaves the state as it was."""
    owner = sampler(TINY)
    plain, replayed = chain_of(owner, 2, [1, 2]), graphed(owner, 2, [1, 2])
    for images in ([1, 2], [9, 4]):
        with torch.no_grad():
            for chain in (plain, replayed):
                chain.begin(torch.tensor(images), None)
            for i in range(STEPS):
                plain.step(keep_x0=True)
                replayed.advance(keep_x0=i == 3)
                assert torch.equal(plain.x, replayed.x)
                assert torch.equal(plain.x0, replayed.x0) == (i == 3)
            for chain in (plain, replayed):
                chain.rewind(STEPS - 2)
            for _ in range(2):
                plain.step(keep_x0=True)
                replayed.advance(keep_x0=False)
                assert torch.equal(plain.x, replayed.x)
    assert pretended_graphs.count("capture") == 2  # with and without the x_0 prediction, once each
    assert pretended_graphs.count("replay") == 2 * (STEPS + 2)


def test_a_step_that_cannot_be_captured_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning with the reason, and the same images."""
    owner = sampler(TINY)
    plain, failing = chain_of(owner, 2, [1, 2]), graphed(owner, 2, [1, 2])

    def capture(step: chains.Replay, restore: chains.Replay, device: torch.device) -> chains.Replay:
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(chains, "capture", capture)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for i in range(STEPS):
            failing.advance(keep_x0=i % 2 == 0)
            plain.step(keep_x0=False)
    assert torch.equal(failing.x, plain.x)
    (message,) = [str(warning.message) for warning in caught]
    assert "without a CUDA graph" in message and message.endswith("not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("batch", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (33, 64), (64, 64), (65, 128), (128, 128), (300, 320)]
)
def test_padded(batch: int, size: int) -> None:
    assert cuda_graph.padded(batch) == size


def test_padding_changes_no_image() -> None:
    owner = sampler(TINY)
    exact, wide = chain_of(owner, 3, [7, 8, 9]), chain_of(owner, 4, [7, 8, 9])
    with torch.no_grad():
        for _ in range(STEPS):
            exact.step(keep_x0=False)
            wide.step(keep_x0=False)
    torch.testing.assert_close(wide.x[:3], exact.x, rtol=0, atol=1e-5)


# Other beginnings


def wave(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    return torch.sin(2 * x_t + 0.01 * t)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_chain_that_starts_in_the_middle_ends_where_the_whole_one_does(batch: int) -> None:
    """Bit for bit, in a batch that was used before and is wider than the images."""
    owner = sampler()
    whole = chain_of(owner, batch, [4, 9])
    with torch.no_grad():
        for _ in range(2):
            whole.step(keep_x0=False)
        start = chains.StartState(whole.x[:2].clone(), 2)
        for _ in range(2, STEPS):
            whole.step(keep_x0=False)
        end = whole.x[:2].clone()
        whole.begin(torch.tensor([4, 9]), None, start)
        for _ in range(2, STEPS):
            whole.step(keep_x0=False)
    assert torch.equal(whole.x[:2], end)
    assert torch.equal(owner.sample([4, 9], start=start), owner.sample([4, 9]))
    assert [state.step for state in owner.trajectory([4, 9], start=start)] == [2, 3, 4, 5]


def test_a_step_taken_again_draws_other_noise() -> None:
    """After r times back, the counter of timestep t is t + r T; a new beginning counts from t again."""
    owner = Sampler(Formula(wave), Diffusion(), STEPS)
    process, bar = oracle.Process.respaced(owner.timesteps), np.cumprod(1 - oracle.betas("linear", 1000))
    chain = chains.ReverseChain(
        lambda x, t, label: wave(x, t.reshape(-1, 1, 1, 1), label), owner.tables(torch.device("cpu")), 2
    )
    for round_ in range(2):
        chain.begin(torch.tensor([4, 9]), None)
        chain.step(keep_x0=False)
        for times in range(3):
            before, t = chain.x.double().numpy(), int(owner.timesteps[1])
            chain.step(keep_x0=False)
            x0 = (before - np.sqrt(1 - bar[t]) * np.sin(2 * before + 0.01 * t)) / np.sqrt(bar[t])
            mean = process.posterior_mean(np.ones(2, int), x0.clip(-1, 1), before)
            z = oracle.normals((1, 2, 2), np.array([4, 9]), 0, t + 1000 * times, 1)
            np.testing.assert_allclose(
                chain.x.numpy(), mean + np.sqrt(process.beta[1]) * z, atol=1e-5, err_msg=str(round_)
            )
            chain.rewind(1)


@pytest.mark.parametrize(
    ("x", "step", "message"),
    [
        (torch.zeros(2, 1, 4, 4), STEPS, r"start.step must be in 0..5; got 6"),
        (torch.zeros(2, 1, 4, 4), -1, r"start.step must be in 0..5; got -1"),
        (torch.zeros(1, 1, 4, 4), 0, r"start.x must be float32 \(2, 1, 4, 4\); got torch.float32 \(1, 1, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4).double(), 0, r"start.x must be float32 \(2, 1, 4, 4\); got torch.float64"),
    ],
)
def test_beginnings_that_cannot_be_are_refused(x: Tensor, step: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler().sample([1, 2], start=chains.StartState(x, step))


def test_steps_before_the_beginning_cannot_be_watched() -> None:
    with pytest.raises(UsageError, match=r"watch must name steps in 3..5; got 2"):
        list(sampler().trajectory([1], watch=[2], start=chains.StartState(torch.zeros(1, 1, 4, 4), 3)))


def test_the_null_label_draws_without_a_class() -> None:
    network = Formula(lambda x, t, label: 0.9 * x + 0.1 * label.reshape(-1, 1, 1, 1), num_classes=3, label_dropout=0.1)
    given = Sampler(network, Diffusion(), STEPS, guidance=2.0).sample([5], labels=[3])
    expected = oracle.reverse_chain(
        lambda x, t: 0.9 * x + 0.1 * 3, Sampler(network, Diffusion(), STEPS).timesteps, np.array([5]), 0
    )
    np.testing.assert_allclose(given.numpy(), expected, atol=1e-4)
    without = Formula(lambda x, t, label: x, num_classes=3)
    with pytest.raises(UsageError, match=r"labels must be in 0..2; got 3"):
        Sampler(without, Diffusion(), STEPS).sample([5], labels=[3])


def test_guided_changes_the_scale_alone() -> None:
    network = Formula(lambda x, t, label: 0.9 * x + 0.1 * label.reshape(-1, 1, 1, 1), num_classes=3, label_dropout=0.1)
    owner = Sampler(network, Diffusion(), method="ddim", eta=0.5, seed=7, timesteps=[900, 300, 20])
    same = Sampler(network, Diffusion(), method="ddim", eta=0.5, seed=7, timesteps=[900, 300, 20], guidance=3.0)
    assert torch.equal(owner.guided(3.0).sample([1, 2]), same.sample([1, 2]))
    assert owner.guided(3.0).settings() == same.settings()


# Engines


SWITCHES = ("channels_last", "time_table", "fused_qkv", "phase_convolutions", "accumulate", "native", "compile")


@pytest.mark.parametrize("switch", [*SWITCHES[:-1], slow(SWITCHES[-1])])
def test_every_switch_gives_the_images_of_the_plain_network(switch: str) -> None:
    """Whole chains, against the network itself with everything off."""
    off = dict.fromkeys(SWITCHES, False)
    config = SMALLEST if switch == "compile" else TINY  # which takes long
    unet = sampler(config).network
    plain = Sampler(
        Formula(lambda x, t, label: unet(x, t.flatten()), **dataclasses.asdict(config)),
        Diffusion(DiffusionConfig(prediction="x0")), STEPS,
    )  # fmt: skip
    ours = sampler(config, engine=EngineConfig(**(off | {switch: True})))
    with torch.no_grad():
        expected = plain.sample([3, 4])
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.sample([3, 4]), expected, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("bf16_instructions")
def test_low_precision_is_near() -> None:
    exact, low = (sampler(TINY, engine=EngineConfig(precision=name)).sample(range(4)) for name in ("fp32", "bf16"))
    difference = (exact - low).abs()
    assert 0 < difference.mean() < 0.03  # of a range of 2


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="precision must be one of auto, fp32, bf16, fp16; got 'fp8'"):
        EngineConfig(precision="fp8")  # type: ignore[arg-type]


# Watching


def test_a_trajectory_shows_what_a_callback_sees() -> None:
    owner, seen = sampler(TINY), []
    images = owner.sample([1, 2], callback=lambda *state: seen.append((*state[:2], *(x.clone() for x in state[2:]))))
    assert len(seen) == STEPS
    for state, (i, t, x, x0) in zip(owner.trajectory([1, 2]), seen, strict=True):
        assert (state.step, state.t) == (i, t)
        assert torch.equal(state.x, x) and torch.equal(state.x0, x0)
    assert torch.equal(state.x.clamp(-1, 1), images)


def test_only_chosen_steps_are_watched() -> None:
    owner = sampler(TINY)
    everything = {state.step: state.x0.clone() for state in owner.trajectory([1])}
    chosen = {state.step: state.x0.clone() for state in owner.trajectory([1], watch=[4, 0])}
    assert list(chosen) == [0, 4] and all(torch.equal(chosen[i], everything[i]) for i in chosen)
    seen: list[int] = []
    images = owner.sample([1], callback=lambda i, *rest: seen.append(i), watch={2})
    assert seen == [2] and torch.equal(images, owner.sample([1]))


@pytest.mark.parametrize("watch", [[STEPS], [-1]])
def test_steps_that_are_not_taken_are_refused(watch: list[int]) -> None:
    with pytest.raises(UsageError, match=rf"watch must name steps in 0..5; got {watch[0]}"):
        list(sampler().trajectory([1], watch=watch))


def test_trajectories_side_by_side_do_not_meet() -> None:
    owner = sampler(TINY)
    alone = [[state.x.clone() for state in owner.trajectory([seed])] for seed in (1, 2)]
    together = zip(owner.trajectory([1]), owner.trajectory([2]), strict=True)
    for i, (first, second) in enumerate(together):
        assert torch.equal(first.x, alone[0][i]) and torch.equal(second.x, alone[1][i])


def test_chains_are_kept_for_the_next_batch_and_bounded() -> None:
    owner = sampler()
    first = owner.sample([1])
    kept = owner._chains[1]
    assert torch.equal(owner.sample([1]), first) and owner._chains[1] is kept
    owner.sample([1, 2])
    owner.sample([1, 2, 3])
    assert list(owner._chains) == [2, 3]
    with torch.no_grad():
        owner.network.conv_in.weight.mul_(2)
    assert not torch.equal(owner.sample([1]), first)
    assert list(owner._chains) == [1]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_give_the_images_of_launched_steps(precision: str) -> None:
    """Bit for bit, in batches that are padded, with a step watched."""
    images, x0 = [], []
    for graph in (True, False):
        owner = sampler(TINY, engine=EngineConfig(precision=precision, graph=graph))  # type: ignore[arg-type]
        owner.network.cuda()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            images.append([owner.sample(seeds) for seeds in ([1, 2, 3, 4], [9, 8, 7, 6])])
            x0.append([state.x0.clone() for state in owner.trajectory([5, 5, 1, 0], watch=[2])])
    assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))
    assert torch.equal(x0[0][0], x0[1][0])


@pytest.mark.gpu
def test_graphs_of_guided_steps_give_the_images_of_launched_ones() -> None:
    """Two graphs, of steps inside and outside the interval, with rescaling and dynamic thresholding in them."""
    images = []
    for graph in (True, False):
        owner = sampler(
            tiny(num_classes=3, label_dropout=0.1), engine=EngineConfig(graph=graph), guidance=4.0,
            guidance_interval=(300, 700), guidance_rescale=0.5, dynamic_threshold=0.9,
        )  # fmt: skip
        owner.network.cuda()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            images.append([owner.sample(seeds) for seeds in ([1, 2, 3, 4], [9, 8, 7, 6])])
    assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))


@pytest.mark.gpu
def test_a_gpu_draws_the_images_of_a_cpu() -> None:
    owner = sampler(TINY, engine=dataclasses.replace(FUSED, precision="fp32"))
    expected = owner.sample([1, 2, 3])
    owner.network.cuda()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 is float32, not TF32
        ours = owner.sample([1, 2, 3])
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=2e-4)
