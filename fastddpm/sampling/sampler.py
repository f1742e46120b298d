"""The sampler: ancestral sampling (Algorithm 2 of the paper), DDIM and DPM-Solver++."""

import functools
import hashlib
import numbers
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.config import EngineConfig, Method
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.runtime.checks import check_chain, check_seed
from fastddpm.runtime.network import checksum, device_of, evaluate, interface_of, precision_of_weights
from fastddpm.storage.documents import to_dict

from .chain import ChainTables, ReverseChain, StartState
from .cuda_graph import padded
from .engine import Network, is_current, precision_of, prepare
from .guidance import CondFn, Guidance
from .isolation import evaluating, isolated
from .seeds import image_labels, image_seeds
from .spacing import choose_timesteps
from .step_table import MULTISTEP, first_order, of_x0, step_table

Callback = Callable[[int, int, Tensor, Tensor], None]

_KEPT_CHAINS = 2  # batch sizes whose chains are kept for the next batch


@dataclass(frozen=True)
class State:
    """The state of a chain after `step`, 0..steps-1, which was taken at timestep `t`.

    `x`: the step's result, x_{t-1} if no timestep is skipped. `x0`: the x_0 prediction that it was computed from. Both
    are float32 (N, C, H, W) and are overwritten by the next step.
    """

    step: int
    t: int
    x: Tensor
    x0: Tensor


class Sampler:
    """Draws images from a network: `Sampler(unet, diffusion, steps=250).sample(range(64))`.

    `network`: a `UNet`, or any module that follows the protocol in runtime/network.py. `shape`, (C, H, W), and
    `num_classes` are needed for a network that does not have them as attributes.
    `steps`: number of reverse steps, 1..T, spread over the timesteps as `spacing` says (`spaced_timesteps`): "even",
    both ends included, "logsnr", "karras", "linspace", "leading", with `steps_offset`, or "trailing". Default: all T.
    `timesteps`: the timesteps themselves, descending, instead of `steps`. `method`: "ancestral"; "ddim" with `eta` in
    [0, 1]; "dpm2m" or "dpm2m-sde", DPM-Solver++(2M) without and with noise. `guidance`: scale of classifier-free
    guidance, 0 or more; 1 means none. A learned variance is not scaled. `guidance_interval`, `guidance_rescale`,
    `dynamic_threshold`, `dynamic_threshold_max` and `cond_fn`: those of `Guidance`; outside the interval, and with
    guidance 1, the network is evaluated once. With `cond_fn` no CUDA graph is captured, because it may do anything.
    `seed`: 64-bit key of the noise of all images of this sampler, -2^63..2^63-1. `engine`: how the network is
    evaluated. Default: `EngineConfig()`. Raises `UsageError` for values outside these ranges, and for a network that
    cannot be called as the protocol says.
    """

    def __init__(
        self,
        network: nn.Module,
        diffusion: Diffusion,
        steps: int | None = None,
        method: str = "ancestral",
        eta: float = 0.0,
        *,
        spacing: str = "even",
        steps_offset: int = 0,
        guidance: float = 1.0,
        guidance_interval: tuple[int, int] | None = None,
        guidance_rescale: float = 0.0,
        dynamic_threshold: float | None = None,
        dynamic_threshold_max: float | None = None,
        cond_fn: CondFn | None = None,
        seed: int = 0,
        timesteps: Sequence[int] | None = None,
        engine: EngineConfig | None = None,
        shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.interface = interface_of(network, shape=shape, num_classes=num_classes)
        if method not in typing.get_args(Method):
            raise UsageError(f"method must be one of {', '.join(typing.get_args(Method))}; got {method!r}")
        if isinstance(eta, numbers.Real) and not 0 <= eta <= 1:
            raise UsageError(f"eta must be in [0, 1]; got {eta}")
        check_chain(method, eta, guidance)
        check_seed(seed)
        self.network, self.diffusion, self.method, self.eta = network, diffusion, method, eta
        self.seed, self.engine = seed, engine or EngineConfig()
        self.guide = Guidance(
            guidance, guidance_interval, guidance_rescale, dynamic_threshold, cond_fn, dynamic_threshold_max
        )
        self.timesteps = choose_timesteps(diffusion, method, steps, spacing, timesteps, steps_offset)
        self.guide.check(diffusion, self.timesteps, method, self.interface.shape)
        self.multistep = method in MULTISTEP
        self.table = np.stack(step_table(diffusion, self.timesteps, method, eta), axis=1)
        if guidance != 1 and self.interface.null_label is None:
            raise UsageError("guidance needs a network trained with label_dropout > 0, which has a null label")
        self._prepared: Network | None = None
        self._held = False
        self._places: list[int] = []
        self._chains: dict[int, ReverseChain] = {}

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return device_of(self.network)

    @property
    def steps(self) -> int:
        """The number of steps of a chain. Each evaluates the network once, or with guidance twice, for an image."""
        return len(self.timesteps)

    @property
    def guidance(self) -> float:
        """The scale of classifier-free guidance."""
        return self.guide.scale

    @property
    def guided_steps(self) -> np.ndarray:
        """Whether each step takes classifier-free guidance, and so evaluates the network twice: bool (steps,)."""
        return self.guide.inside(self.timesteps) & (self.guidance != 1)

    def sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        callback: Callback | None = None,
        watch: Collection[int] | None = None,
        start: StartState | None = None,
    ) -> Tensor:
        """Draw one image for each seed; return float32 (N, C, H, W) in [-1, 1].

        An image depends on its seed (0..2^32-1), its label and the sampler, not on the rest of the batch.
        `labels`: (N,), each in 0..num_classes-1 or the network's null label. Default: seed modulo num_classes, if the
        network takes labels. If it takes none, any integers may be given for `cond_fn`. `callback(step, t, x, x0)` is
        called with the fields of `State` after each step in `watch` (0..steps-1). Default of `watch`: all steps.
        `start`: the states x_t, float32 (N, C, H, W), to start from. Default: noise. The same states and seeds give the
        same images. Raises `UsageError` for seeds, labels or a start out of range.
        """
        first = 0 if start is None else start.step
        watched = _watched(first, self.steps, watch) if callback else set()
        with self.chain(seeds, labels, start) as chain:
            for state in self._states(chain, len(seeds), first, watched):
                assert callback is not None
                callback(state.step, state.t, state.x, state.x0)
            return chain.x[: len(seeds)].clamp(-1, 1)

    def trajectory(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        watch: Collection[int] | None = None,
        start: StartState | None = None,
    ) -> Iterator[State]:
        """Draw images as `sample` does, and yield the state after each step in `watch`. Default of `watch`: all steps.

        The steps in between run at full speed. The x of the last step, clamped to [-1, 1], are the images.
        """
        first = 0 if start is None else start.step
        watched = _watched(first, self.steps, watch)
        with self.chain(seeds, labels, start) as chain:
            yield from self._states(chain, len(seeds), first, watched)

    @contextmanager
    def chain(
        self, seeds: Sequence[int], labels: Sequence[int] | None = None, start: StartState | None = None
    ) -> Iterator[ReverseChain]:
        """Provide the chain of a batch at its first step, to be advanced inside the block; arguments as for `sample`.

        Its first len(seeds) images belong to `seeds`; on a GPU the others are padding. Each `advance` takes the next of
        `timesteps`.
        """
        chain = self._begin(seeds, labels, start)
        network = self._prepared
        yield chain
        if network is self._prepared:  # if the weights changed meanwhile, the chain evaluates the old ones
            self._keep(chain)

    def guided(self, guidance: float) -> "Sampler":
        """Return a sampler that differs from this one only in its scale of guidance."""
        return Sampler(
            self.network, self.diffusion, None, self.method, self.eta,
            guidance=guidance, guidance_interval=self.guide.interval, guidance_rescale=self.guide.rescale,
            dynamic_threshold=self.guide.dynamic_threshold, dynamic_threshold_max=self.guide.dynamic_threshold_max,
            cond_fn=self.guide.cond_fn, seed=self.seed,
            timesteps=self.timesteps.tolist(), engine=self.engine, shape=self.interface.shape,
            num_classes=self.interface.num_classes,
        )  # fmt: skip

    def unguided(self, timesteps: Sequence[int] | None = None) -> "Sampler":
        """Return a sampler of the same network that takes the trained process: ancestral, of seed 0, without guidance.

        `timesteps`: descending. Default: all T.
        """
        return Sampler(
            self.network, self.diffusion, timesteps=timesteps, engine=self.engine,
            shape=self.interface.shape, num_classes=self.interface.num_classes,
        )  # fmt: skip

    def _begin(self, seeds: Sequence[int], labels: Sequence[int] | None, start: StartState | None) -> ReverseChain:
        """Return a chain at its first step, a kept one if there is one of this batch size.

        It is removed from the kept chains, so that no other caller advances it.
        """
        if start is not None:
            start.check(self.steps, (len(seeds), *self.interface.shape))
        device = self.device
        images = torch.tensor(image_seeds(seeds), dtype=torch.int64, device=device)
        classes = self.labels_for(seeds, labels)
        label = None if classes is None else torch.tensor(classes, dtype=torch.int64, device=device)
        with isolated(device):
            network = self._network()  # drops the kept chains if the network is new
            graph = self.engine.graph and device.type == "cuda" and self.guide.cond_fn is None
            batch = padded(len(seeds)) if graph else len(seeds)
            chain = self._chains.pop(batch, None)
            if chain is None or chain.labels != (label is not None):
                predict = functools.partial(self._predict, network)
                plain, has = functools.partial(predict, guided=False), label is not None
                chain = ReverseChain(predict, self.tables(device), batch, plain=plain, labels=has, graph=graph)
            chain.begin(images, label, start)
        return chain

    def _keep(self, chain: ReverseChain) -> None:
        """Keep a chain for the next batch of its size. The oldest one is dropped, to bound the memory."""
        self._chains[chain.batch] = chain
        while len(self._chains) > _KEPT_CHAINS:
            del self._chains[next(iter(self._chains))]

    def tables(self, device: torch.device) -> ChainTables:
        """Return the tensors and constants that all chains of this sampler share, on `device`."""
        learned = self.method == "ancestral" and self.diffusion.config.learned_variance
        correction = self.guide.correction(self.diffusion, self.timesteps, self.method, device)
        table = of_x0(self.table) if correction is not None and correction.gives_x0 else self.table

        def on_device(table: np.ndarray) -> Tensor:
            return torch.tensor(table, dtype=torch.float32, device=device)

        return ChainTables(
            table=on_device(table),
            timesteps=torch.tensor(self.timesteps, device=device),
            total=self.diffusion.timesteps,
            seed=torch.tensor(self.seed, dtype=torch.int64, device=device),
            shape=self.interface.shape,
            clip=1.0 if self.diffusion.config.clip_x0 else 0.0,
            variance=self.diffusion.config.variance if learned else "fixed",
            first_order=on_device(first_order(table)) if self.multistep else None,
            guided=tuple(self.guided_steps.tolist()),
            correction=correction,
        )

    def _states(self, chain: ReverseChain, num_images: int, first: int, watched: Collection[int]) -> Iterator[State]:
        for i, t in enumerate(self.timesteps[first:].tolist(), first):
            with isolated(chain.x.device):
                chain.advance(i in watched)
            if i in watched:
                yield State(i, t, chain.x[:num_images], chain.x0[:num_images])

    def denoise(self, x_t: Tensor, t: Tensor | int, label: Tensor | None = None) -> Tensor:
        """Return the network's prediction for `x_t`, with classifier-free guidance alone, as in a step of `sample`.

        `x_t`: float32 (N, C, H, W). `t`: int64 (N,), or one timestep for all. `label`: int64 (N,) if the network takes
        labels. Returns (N, C, H, W), or (N, 2C, H, W) with a learned variance: eps, or what else the network predicts.
        Raises ValueError for other shapes, for a missing label, and for a label that the network does not take.
        """
        if isinstance(t, int):
            t = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        with isolated(x_t.device):
            network = self._network()
            if self.guide.interval is None:
                return self._predict(network, x_t, t, label)
            inside = self.guide.inside(t)
            if inside.all() or not inside.any():
                return self._predict(network, x_t, t, label, guided=bool(inside[0]))
            guided, plain = (self._predict(network, x_t, t, label, guided=guided) for guided in (True, False))
            return torch.where(inside.reshape(-1, 1, 1, 1), guided, plain)

    def probe(self, x_t: Tensor) -> Tensor:
        """Evaluate the network as `sample` does in its first guided step, to measure time or memory.

        `x_t`: (N, C, H, W). Without guidance it is the first step. Labels are 0 if the network takes labels.
        """
        classes = self.interface.num_classes
        label = torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device) if classes else None
        return self.denoise(x_t, int(self.timesteps[self.guided_steps.argmax()]), label)

    def settings(self) -> dict[str, Any]:
        """Return all that determines an image besides its seed and label, for a JSON file beside the images."""
        # Methods of one step are described as before the last column was added, so that their files can be continued.
        table = self.table if self.multistep else self.table[:, :-1]
        return {
            "network": checksum(self.network),
            "timesteps": hashlib.sha256(self.timesteps.tobytes()).hexdigest(),
            "diffusion": to_dict(self.diffusion.config),
            "method": self.method,
            "coefficients": hashlib.sha256(table.tobytes()).hexdigest(),
            "steps": self.steps,
            "guidance": self.guidance,
            **self.guide.settings(),
            "noise_seed": self.seed,
            "precision": str(precision_of(self.network, self.engine)).removeprefix("torch."),
            "fp8": self.engine.fp8,
            "device": self.device.type,
        }

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """Promise that the network does not change inside the block: it is compared once, not at every `denoise`."""
        self._network()
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle a sampler without what it has prepared; a copy prepares its own."""
        return self.__dict__ | {"_prepared": None, "_chains": {}, "_held": False}

    def _network(self) -> Network:
        """Return the network prepared for inference; prepare it again if it or the chosen backend has changed."""
        if self._held and self._prepared is not None:
            return self._prepared
        if self._prepared is None or not is_current(self._prepared, self.network, self.engine):
            self._prepared = prepare(self.network, self.timesteps.tolist(), self.engine)
            self._chains.clear()
        if isinstance(self._prepared, nn.Module):  # a captured step reads its tensors where they were
            places = [tensor.data_ptr() for tensor in (*self.network.parameters(), *self.network.buffers())]
            if places != self._places:
                self._places = places
                self._chains.clear()
        return self._prepared

    def _predict(self, network: Network, x: Tensor, t: Tensor, label: Tensor | None, *, guided: bool = True) -> Tensor:
        if isinstance(network, nn.Module) and any(module.training for module in network.modules()):
            with evaluating(network):
                return self._predict(network, x, t, label, guided=guided)
        if isinstance(network, nn.Module):  # run as it is, in the precision of its weights
            x = x.to(precision_of_weights(network))
        if not self.interface.num_classes and self.guide.cond_fn is not None:
            label = None  # it is the classifier's alone
        learned = self.diffusion.config.learned_variance
        if self.guidance == 1 or not guided:
            return evaluate(network, x, t, label, learned_variance=learned)
        if label is None:
            raise ValueError("guidance needs a label for each image; got none")
        assert self.interface.null_label is not None
        none = torch.full_like(label, self.interface.null_label)
        twice = t[:1].expand(2 * len(x)) if t.stride(0) == 0 else torch.cat([t, t])
        both = evaluate(network, torch.cat([x, x]), twice, torch.cat([label, none]), learned_variance=learned)
        return self.guide.combine(both, x.shape[1])

    def labels_for(self, seeds: Sequence[int], labels: Sequence[int] | None = None) -> list[int] | None:
        """Return the class of each seed: `labels` if given, otherwise seed modulo num_classes; None without classes.

        Those of the network, or if it has none, of the classifier. A `cond_fn` may have labels although the network has
        no classes. Raises `UsageError` for a wrong number of labels, and for one neither in range nor the null label.
        """
        return image_labels(
            labels, seeds, self.interface,
            classes=self.interface.num_classes or self.guide.classes, any_label=self.guide.cond_fn is not None,
        )  # fmt: skip


def _watched(first: int, steps: int, watch: Collection[int] | None) -> set[int]:
    """Return the steps in `watch`. None: all steps. Raises `UsageError` for one that the chain does not take."""
    if watch is None:
        return set(range(first, steps))
    wrong = [step for step in watch if not first <= step < steps]
    if wrong:
        raise UsageError(f"watch must name steps in {first}..{steps - 1}; got {wrong[0]}")
    return set(watch)
