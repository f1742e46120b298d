"""The sampler: images/s of the 1000-step chain, by some of its steps and by one whole chain, ours and the peers'."""

import contextlib
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from harness import DEVICE, DTYPE, ON_GPU, forward_flop, record, synchronised_timer

import fastddpm
from fastddpm.config import EngineConfig
from fastddpm.kernels import native

pytestmark = pytest.mark.benchmark(timer=synchronised_timer, min_rounds=3, max_time=2.0, warmup=True,
                                   warmup_iterations=1)  # fmt: skip
T = 1000
STEPS = 50 if ON_GPU else 10  # of the chain, by which a chain is timed
BATCHES = (1, 16, 128, 256, 512) if ON_GPU else (1, 8)
CASES = [("cifar10", batch) for batch in BATCHES] + [("celebahq256", batch) for batch in (1, 8, 64) if ON_GPU]
# The last of diffusers' is its best on a GPU: its layout kept, compiled, every step replayed as a CUDA graph.
BEST_OF_DIFFUSERS = "diffusers, layout patched, compiled, CUDA graph"
PEERS = ("fastddpm", "fastddpm, fp8", "fastddpm, no graph", "fastddpm, torch.compile",
         "diffusers", "diffusers, compiled", BEST_OF_DIFFUSERS, "lucidrains")  # fmt: skip
ON_A_GPU = ("fastddpm, fp8", "fastddpm, no graph", BEST_OF_DIFFUSERS)

# Words in the names of kernels.
KERNELS = {
    "group_norm_silu": ("group_norm",),
    "attention": ("attention",),
    "convolution": ("conv", "xmma", "cudnn", "implicit", "fprop"),
    "matrix product": ("gemm", "cutlass", "cublas", "nvjet"),
    "elementwise": ("elementwise", "copy", "fill", "index", "cat"),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("preset", "batch"), CASES)
def test_chain_by_some_steps(
    benchmark: Any, request: pytest.FixtureRequest, preset: str, batch: int, peer: str
) -> None:
    if peers.is_slow_to_start(peer) and not request.config.getoption("--all-peers"):
        pytest.skip(f"{peer} takes minutes to start on a CPU: --all-peers")
    if peer in ON_A_GPU and not ON_GPU:
        pytest.skip("there are neither CUDA graphs nor 8-bit floats on a CPU")
    benchmark.group = f"chain {preset} batch {batch}, by {STEPS} steps"
    run, versions = chain(peer, preset, batch, STEPS)
    benchmark(run)
    steps = {"steps_timed": STEPS, "chain_images_per_s": rate(benchmark, batch * STEPS / T)}
    record(benchmark, peer, images=batch * STEPS / T, flop=STEPS * forward_flop(preset, batch), preset=preset,
           batch=batch, **steps, **versions)  # fmt: skip


def test_a_whole_chain(benchmark: Any) -> None:
    """All 1000 steps, once: the CIFAR-10 network on a GPU, the digits' on a CPU."""
    preset, batch = ("cifar10", 128) if ON_GPU else ("mnist", 1)
    run, _ = chain("fastddpm", preset, batch, T)
    benchmark.group = f"chain {preset} batch {batch}, whole"
    benchmark.pedantic(run, rounds=1, warmup_rounds=0)
    record(benchmark, "fastddpm", images=batch, flop=T * forward_flop(preset, batch), preset=preset, batch=batch,
           steps_timed=T)  # fmt: skip


@pytest.mark.parametrize("batch", BATCHES[:3])
def test_where_the_time_goes(benchmark: Any, batch: int) -> None:
    """One evaluation of the CIFAR-10 network, split by operation."""
    network = peers.unet("cifar10")
    sampler = fastddpm.Sampler(network, fastddpm.Diffusion(fastddpm.preset("cifar10").diffusion))
    x = torch.randn(batch, 3, 32, 32, device=DEVICE)
    benchmark.group = f"split of an evaluation cifar10 batch {batch}"
    benchmark(sampler.denoise, x, 500)
    split = split_on_a_gpu(sampler, x) if ON_GPU else split_on_a_cpu(batch)
    record(benchmark, "fastddpm", images=batch, flop=forward_flop("cifar10", batch), preset="cifar10", batch=batch,
           split_ms=split)  # fmt: skip


def split_on_a_cpu(batch: int) -> dict[str, float]:
    """Milliseconds of each kind of call of the compiled library; all in one where there is none."""
    if native.unavailable() is not None:
        return {"PyTorch's operators": 1.0}
    from inference_profile import measure

    return {kind: total["ms"] for kind, total in measure(batch, rounds=5)["kinds"].items()}


def split_on_a_gpu(sampler: fastddpm.Sampler, x: torch.Tensor) -> dict[str, float]:
    """Milliseconds on the device by what the kernels are named for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sampler.denoise(x, 500)
        torch.cuda.synchronize()
    split: dict[str, float] = {}
    for event in profile.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in KERNELS.items() if any(word in name for word in words)), "other")
        split[kind] = split.get(kind, 0.0) + event.self_device_time_total / 1e3
    return split


def rate(benchmark: Any, images: float) -> float:
    return images / benchmark.stats.stats.median if benchmark.stats else float("nan")


def chain(peer: str, preset: str, batch: int, steps: int) -> tuple[Callable[[], object], dict[str, str]]:
    """A call that takes `steps` steps, and versions."""
    if peer == "lucidrains":
        return _lucidrains(preset, batch, steps)
    network = peers.unet(preset)
    diffusion = fastddpm.Diffusion(fastddpm.preset(preset).diffusion)
    if peer.startswith("fastddpm"):
        engine = EngineConfig(
            graph=peer != "fastddpm, no graph", compile=peer.endswith("torch.compile"), fp8=peer.endswith("fp8")
        )
        sampler = fastddpm.Sampler(network, diffusion, steps, engine=engine)
        return lambda: sampler.sample(range(batch)), {}
    theirs = peers.diffusers_unet(network, preset).to(DTYPE)
    mode = "reduce-overhead" if peer == BEST_OF_DIFFUSERS else "default"
    called = torch.compile(theirs, dynamic=False, mode=mode) if "compiled" in peer else theirs
    patched = peers.kept_layout if "patched" in peer else contextlib.nullcontext
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=T)
    generator = torch.Generator(DEVICE).manual_seed(0)
    config = fastddpm.preset(preset).unet
    shape = (batch, config.image_channels, config.image_size, config.image_size)

    def run() -> None:
        scheduler.set_timesteps(steps)
        x = torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), patched():
            for t, there in zip(scheduler.timesteps, scheduler.timesteps.to(DEVICE), strict=True):
                torch.compiler.cudagraph_mark_step_begin()  # the output of the step before is not needed any more
                x = scheduler.step(called(x, there).sample, t, x, generator=generator).prev_sample

    return run, {"diffusers": peers.version("diffusers")}


def _lucidrains(preset: str, batch: int, steps: int) -> tuple[Callable[[], object], dict[str, str]]:
    """denoising-diffusion-pytorch as its README has it, at the preset's width: another network of the same kind."""
    version = peers.version("denoising-diffusion-pytorch")
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    config = fastddpm.preset(preset).unet
    network = Unet(dim=config.width, dim_mults=config.multipliers, channels=config.image_channels)
    diffusion = GaussianDiffusion(network, image_size=config.image_size, timesteps=steps).to(DEVICE)

    def run() -> None:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            diffusion.sample(batch_size=batch)

    return run, {"denoising-diffusion-pytorch": version}
