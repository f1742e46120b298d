"""Which timesteps a short chain takes: against the definitions and against diffusers' schedulers."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.networks import Formula

from fastddpm.config import DiffusionConfig, SampleConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.spacing import spaced_timesteps

METHODS = ["ancestral", "ddim", "dpm2m", "dpm2m-sde"]
MULTISTEP = METHODS[2:]
SPACINGS = ["even", "logsnr", "karras", "linspace", "leading", "trailing"]


def spaced(method: str, steps: int, spacing: str, **config: Any) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spaced_timesteps(Diffusion(DiffusionConfig(**config)), method, steps, spacing).tolist()


@pytest.mark.parametrize(
    ("spacing", "of_one_step", "of_two"),
    [
        ("even", [999, 666, 333, 0], [999, 666, 333, 0]),
        ("linspace", [999, 666, 333, 0], [999, 749, 500, 250]),
        ("leading", [750, 500, 250, 0], [800, 600, 400, 200]),
        ("trailing", [999, 749, 499, 249], [999, 749, 499, 249]),
    ],
)
def test_four_steps(spacing: str, of_one_step: list[int], of_two: list[int]) -> None:
    """Table 2 of Lin et al. 2023, in timesteps from 0; multistep methods of diffusers leave out a last step at 0."""
    for method in METHODS:
        assert spaced(method, 4, spacing) == (of_two if method in MULTISTEP else of_one_step)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_spread_in_noise(spacing: str, schedule: str) -> None:
    """No timestep is nearer to the wanted level of noise than the chosen one."""
    bar = np.cumprod(1 - oracle.betas(schedule, 1000))
    log_sigma = np.log(np.sqrt((1 - bar) / bar))
    high, low = log_sigma[-1], log_sigma[0]
    for steps in (2, 5, 20, 50):
        if spacing == "logsnr":
            wanted = np.linspace(high, low, steps)
        else:
            roots = np.exp(high / 7) + np.arange(steps) / (steps - 1) * (np.exp(low / 7) - np.exp(high / 7))
            wanted = 7 * np.log(roots)
        nearest = np.abs(log_sigma[:, None] - wanted).argmin(0)
        chosen = spaced("ddim", steps, spacing, schedule=schedule)
        assert chosen == sorted(set(nearest.tolist()), reverse=True)
        assert (chosen[0], chosen[-1]) == (999, 0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("method", ["ancestral", "dpm2m"])
def test_every_number_of_steps(method: str, spacing: str) -> None:
    """Descending, in range; all T steps are all timesteps; so also for a schedule whose end has no signal."""
    for config in ({"timesteps": 37}, {"timesteps": 37, "schedule": "jsd", "prediction": "v"}):
        begins_at_0 = method == "ancestral" and spacing in ("linspace", "leading")
        for steps in (*range(1 + begins_at_0, 8), 18, 19, 35, 36, 37):
            chosen = spaced(method, steps, spacing, **config)
            assert chosen == sorted(set(chosen), reverse=True) and chosen[-1] >= 0 and chosen[0] < 37
            assert len(chosen) == steps or (len(chosen) < steps and spacing in ("logsnr", "karras"))
        assert spaced(method, 37, spacing, **config) == list(range(36, -1, -1))
    assert len(spaced(method, 2, spacing, timesteps=2)) == 2


@pytest.mark.parametrize("steps", [2, 7, 20, 33, 48, 250, 999])
def test_those_of_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    for spacing in ("linspace", "leading", "trailing"):
        for name, method in (("DDPMScheduler", "ancestral"), ("DDIMScheduler", "ddim")):
            theirs = getattr(diffusers, name)(timestep_spacing=spacing)
            theirs.set_timesteps(steps)
            assert spaced(method, steps, spacing) == theirs.timesteps.tolist(), name
        theirs = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing, beta_end=0.02, beta_start=1e-4)
        theirs.set_timesteps(steps)
        assert spaced("dpm2m", steps, spacing) == theirs.timesteps.tolist()


@pytest.mark.parametrize(("spacing", "option"), [("logsnr", "use_lu_lambdas"), ("karras", "use_karras_sigmas")])
def test_those_of_diffusers_by_noise(spacing: str, option: str) -> None:
    """They round a timestep that lies between two in log sigma, which is the nearer of the two."""
    diffusers = pytest.importorskip("diffusers")
    for steps in (5, 10, 20, 50):
        theirs = diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, **{option: True})
        theirs.alphas_cumprod = torch.tensor(np.cumprod(1 - oracle.betas("linear", 1000)))  # theirs is float32
        theirs.set_timesteps(steps)
        assert spaced("dpm2m", steps, spacing) == sorted(set(theirs.timesteps.tolist()), reverse=True)


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_one_step_at_timestep_0_is_refused(spacing: str) -> None:
    """diffusers takes it, and returns noise."""
    with pytest.raises(UsageError, match=f"spacing {spacing} of 1 step takes timestep 0, which removes no noise"):
        spaced("ddim", 1, spacing)
    assert spaced("dpm2m", 1, "linspace") == [999]


def test_timesteps_that_come_up_twice_are_taken_once_and_said() -> None:
    network = Formula(lambda x, t, label: x)
    with pytest.warns(UserWarning, match="spacing logsnr gives 17 different timesteps for 20 steps; the chain takes"):
        sampler = Sampler(network, Diffusion(DiffusionConfig(schedule="cosine")), 20, "ddim", spacing="logsnr")
    assert sampler.steps == 17 and len(list(sampler.trajectory([1]))) == 17
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spacing in SPACINGS:
            Sampler(network, Diffusion(), 5, spacing=spacing)
        sampler.guided(1.0)


def test_refuses() -> None:
    network = Formula(lambda x, t, label: x)
    with pytest.raises(
        UsageError, match="spacing must be one of even, logsnr, karras, linspace, leading, trailing; got"
    ):
        Sampler(network, Diffusion(), 5, spacing="quadratic")
    with pytest.raises(UsageError, match=r"give spacing or timesteps, not both; got karras and \[5, 3\]"):
        Sampler(network, Diffusion(), timesteps=[5, 3], spacing="karras")
    with pytest.raises(UsageError, match=r"spacing must be one of even, logsnr, .*; got 'uniform'"):
        SampleConfig(spacing="uniform")  # type: ignore[arg-type]
