"""Every field of diffusers' schedulers, and the chains that they become: diffusers itself is the reference."""

import hashlib
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.networks import Formula

from fastddpm.codec import fingerprint, quantised
from fastddpm.config import DiffusionConfig, SampleConfig
from fastddpm.diffusion import Diffusion
from fastddpm.errors import DataError, UsageError
from fastddpm.pretrained.diffusers_scheduler import SCHEDULERS, Process, read_scheduler, write_scheduler
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.spacing import spaced_timesteps
from fastddpm.storage.documents import from_dict, to_dict

WITH_METHOD = [name for name, kind in SCHEDULERS.items() if kind.method is not None]
CHAINED = ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"]
BETAS = tuple(np.geomspace(2e-4, 0.08, 60).tolist())  # of no schedule by name
SEEDS = np.array([0, 5, 2**32 - 1])


def read(data: dict[str, Any]) -> Process:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unknown fields")
        warnings.filterwarnings("ignore", message=".*fastddpm does not")
        return read_scheduler(data, "scheduler")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_field_is_known_with_its_default(name: str, tmp_path: Path) -> None:
    """Also as the class writes them itself."""
    scheduler = getattr(pytest.importorskip("diffusers"), name)
    parameters = list(inspect.signature(scheduler.__init__).parameters.values())[1:]
    kind = SCHEDULERS[name]
    assert {parameter.name for parameter in parameters} == {*kind.read, *kind.needed, *kind.own}
    defaults = kind.read | {field: need.default for field, need in kind.needed.items()}
    for parameter in parameters:
        if parameter.name in defaults:
            assert defaults[parameter.name] == parameter.default, parameter.name
    scheduler().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert read(written) == read({"_class_name": name})


# For each field another value, and what else makes it matter.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "num_train_timesteps": (500, {}),
    "beta_start": (0.001, {}),
    "beta_end": (0.03, {}),
    "beta_schedule": ("scaled_linear", {}),
    "trained_betas": (list(BETAS), {"num_train_timesteps": len(BETAS)}),
    "prediction_type": ("v_prediction", {}),
    "rescale_betas_zero_snr": (True, {"prediction_type": "v_prediction"}),
    "timestep_spacing": ("trailing", {}),
    "steps_offset": (1, {"timestep_spacing": "leading"}),
    "clip_sample": (False, {}),
    "clip_sample_range": (2.0, {}),
    "thresholding": (True, {"sample_max_value": 2.0}),
    "dynamic_thresholding_ratio": (0.9, {"thresholding": True, "sample_max_value": 2.0}),
    "sample_max_value": (2.0, {"thresholding": True}),
    "variance_type": ("learned_range", {}),
    "set_alpha_to_one": (False, {}),
    "algorithm_type": ("sde-dpmsolver++", {}),
    "use_karras_sigmas": (True, {}),
    "solver_order": (3, {}),
    "solver_type": ("heun", {}),
    "final_sigmas_type": ("sigma_min", {}),
    "lambda_min_clipped": (-5.1, {}),
    "use_exponential_sigmas": (True, {}),
    "use_beta_sigmas": (True, {}),
    "use_lu_lambdas": (True, {}),
    "use_flow_sigmas": (True, {}),
}
# The last step is of first order in any case; the others are of flow matching, which is refused.
WITHOUT_EFFECT = {"lower_order_final", "euler_at_final", "flow_shift", "use_dynamic_shifting", "time_shift_type"}


@pytest.mark.parametrize("name", WITH_METHOD)
def test_every_field_changes_what_is_read_or_is_refused_by_name(name: str) -> None:
    kind = SCHEDULERS[name]
    refused = set()
    for field in {*kind.read, *kind.needed, *kind.own} - WITHOUT_EFFECT:
        value, others = CHANGES[field]
        before = {"_class_name": name} | others
        try:
            assert read(before | {field: value}) != read(before), field
        except DataError as error:
            assert f"{field} must be" in str(error)
            refused.add(field)
    assert refused == {field for field in kind.needed if field not in WITHOUT_EFFECT} | (
        {"clip_sample_range"} & {*kind.read}
    )


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in WITH_METHOD])
def test_without_a_method_of_ours_the_process_is_read_or_refused(name: str) -> None:
    kind = SCHEDULERS[name]
    process = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"}
    assert process <= {*kind.read}
    for field in {*kind.read, *kind.needed} - {"timestep_type"}:
        value, others = CHANGES[field]
        before = {"_class_name": name} | others
        try:
            assert read(before | {field: value}) != read(before), field
        except DataError as error:
            assert field == "use_flow_sigmas" and "use_flow_sigmas must be False" in str(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trained_betas": 0.1}, "trained_betas must be null or a list of numbers; got 0.1"),
        ({"trained_betas": ["x"]}, r"trained_betas must be null or a list of numbers; got \['x'\]"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must be num_train_timesteps numbers, 1000; got 2"),
        ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, r"betas must be in \(0, 1\), the last may be 1; got"),
        ({"trained_betas": [1, 0.5], "num_train_timesteps": 2}, r"betas must be in \(0, 1\), the last may be 1; got 1"),
        ({"steps_offset": 0.5}, "steps_offset must be an integer; got 0.5"),
        ({"steps_offset": -1}, r"steps_offset must be in 0\.\.100000; got -1"),
        ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value must be 1 or more with thresholding"),
        ({"thresholding": True, "sample_max_value": "x"}, "sample_max_value must be 1 or more with thresholding"),
        (
            {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 1.0},
            r"dynamic_thresholding_ratio must be in \(0, 1\) with thresholding; got 1.0",
        ),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, "otherwise the chain ends at the noise of"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(options)


def test_noise_after_the_last_step_is_said() -> None:
    """That of DDPMScheduler with a larger variance, whose chain ends above timestep 0."""
    for options in ({"timestep_spacing": "trailing"}, {"steps_offset": 1}):
        with pytest.warns(
            UserWarning, match="diffusers adds noise to the finished image with variance_type 'fixed_large'"
        ):
            read_scheduler(options | {"variance_type": "fixed_large"}, "scheduler")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_scheduler(options, "scheduler")


# Whole chains


def formula(x: torch.Tensor, t: torch.Tensor | int) -> torch.Tensor:
    return 0.8 * torch.sin(2 * x + 0.01 * t)


def their_chain(monkeypatch: pytest.MonkeyPatch, scheduler: Any, betas: np.ndarray, steps: int) -> np.ndarray:
    """diffusers' chain in float64 from our noise, with betas that are not rounded to float32."""
    scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - betas))
    scheduler.alpha_t, scheduler.sigma_t = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    scheduler.lambda_t = torch.log(scheduler.alpha_t) - torch.log(scheduler.sigma_t)
    scheduler.set_timesteps(steps)
    shape = (1, 2, 2)
    x = torch.tensor(oracle.normals(shape, SEEDS, 3, 0, 0))
    for t in scheduler.timesteps.tolist():
        noise = torch.tensor(oracle.normals(shape, SEEDS, 3, t, 1))
        if type(scheduler).__name__ == "DDPMScheduler":
            module = inspect.getmodule(type(scheduler))
            monkeypatch.setattr(module, "randn_tensor", lambda *_, noise=noise, **__: noise)
            x = scheduler.step(formula(x, t), t, x).prev_sample
        elif type(scheduler).__name__ == "DDIMScheduler":
            x = scheduler.step(formula(x, t), t, x, use_clipped_model_output=True).prev_sample
        else:
            x = scheduler.step(formula(x, t), t, x, variance_noise=noise).prev_sample
    return x.numpy()


CHAINS: dict[str, dict[str, Any]] = {
    "trained_betas": {"trained_betas": list(BETAS), "num_train_timesteps": len(BETAS)},
    "trained_betas, no signal": {
        "trained_betas": list(BETAS), "num_train_timesteps": len(BETAS), "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "steps_offset": {"timestep_spacing": "leading", "steps_offset": 3},
    "sample_max_value": {"thresholding": True, "sample_max_value": 1.3, "dynamic_thresholding_ratio": 0.6},
    "all": {
        "trained_betas": list(BETAS), "num_train_timesteps": len(BETAS), "timestep_spacing": "leading",
        "steps_offset": 2, "thresholding": True, "sample_max_value": 1.3, "dynamic_thresholding_ratio": 0.6,
    },
    "last steps": {"lower_order_final": False, "euler_at_final": True},
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
@pytest.mark.parametrize("name", CHAINED)
def test_chains_are_those_of_diffusers(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    of_solver = name == "DPMSolverMultistepScheduler"
    if (case == "last steps") != of_solver and case in ("last steps", "trained_betas, no signal"):
        pytest.skip("not of this class, or its last timestep has a signal of 2^-12 there")
    kinds = ("dpmsolver++", "sde-dpmsolver++") if of_solver else (None,)
    for kind in kinds:
        scheduler = getattr(diffusers, name)(**CHAINS[case] | ({"algorithm_type": kind} if kind else {}))
        process = read(json.loads(scheduler.to_json_string()))
        sample, diffusion = process.sample, Diffusion(process.diffusion)
        sampler = Sampler(
            Formula(lambda x, t, label: formula(x, t)), diffusion, 10, sample.method, seed=3,
            **sample.spacing_options(), **sample.guidance_options(),
        )  # fmt: skip
        *_, last = sampler.trajectory(SEEDS.tolist())
        expected = their_chain(monkeypatch, scheduler, diffusion.betas, 10)
        assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
        scale = max(20.0, np.abs(expected).max())  # DPM-Solver without a threshold does not clip
        np.testing.assert_allclose(last.x.numpy(), expected, rtol=0, atol=1e-6 * scale)
        if "trained_betas" in CHAINS[case] and not diffusion.config.zero_terminal_snr:
            np.testing.assert_array_equal(diffusion.betas, BETAS)
        if "sample_max_value" in CHAINS[case]:
            scheduler.register_to_config(thresholding=False)
            other = their_chain(monkeypatch, scheduler, diffusion.betas, 10)
            assert np.abs(last.x.numpy() - other).max() > 0.01


@pytest.mark.parametrize("steps", [2, 7, 33, 99])
def test_offset_timesteps_are_those_of_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    for offset in (1, 4):
        for name, method in zip(CHAINED, ("ancestral", "ddim", "dpm2m"), strict=True):
            theirs = getattr(diffusers, name)(timestep_spacing="leading", steps_offset=offset)
            theirs.set_timesteps(steps)
            ours = spaced_timesteps(Diffusion(), method, steps, "leading", offset)
            assert ours.tolist() == theirs.timesteps.tolist(), name


def test_offsets_that_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"steps_offset must be in 0\.\.4, below the distance of the timesteps of 200"):
        spaced_timesteps(Diffusion(), "ddim", 200, "leading", 5)
    with pytest.raises(UsageError, match="steps_offset is of spacing leading, even has none; got 1"):
        spaced_timesteps(Diffusion(), "ddim", 200, "even", 1)
    network = Formula(lambda x, t, label: x)
    with pytest.raises(UsageError, match=r"give spacing or timesteps, not both"):
        Sampler(network, Diffusion(), timesteps=[5, 3], steps_offset=1)
    assert Sampler(network, Diffusion(), spacing="leading", steps_offset=1).steps == 1000  # all timesteps


# Stored


def test_given_betas_are_written_and_read_again() -> None:
    config = DiffusionConfig(timesteps=len(BETAS), betas=BETAS, variance="fixedsmall")
    written = write_scheduler(config)
    assert written["trained_betas"] == list(BETAS)
    assert read(written).diffusion == config
    assert from_dict(DiffusionConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert DiffusionConfig(timesteps=len(BETAS), betas=np.array(BETAS)).betas == BETAS  # type: ignore[arg-type]


def test_documents_are_without_fields_that_came_later() -> None:
    """So that those of earlier versions, and their checksums, are those of this one."""
    assert not {"zero_terminal_snr", "betas"} & {*to_dict(DiffusionConfig())}
    assert not {"steps_offset", "dynamic_threshold_max"} & {*to_dict(SampleConfig())}
    changed = SampleConfig(steps_offset=1, spacing="leading", dynamic_threshold_max=2.0)
    assert from_dict(SampleConfig, to_dict(changed)) == changed


def test_the_process_of_coded_images_is_named_as_before() -> None:
    """Files of 0.1.0 hold a checksum of this text, whose fields are those of then."""
    text = (
        "DiffusionConfig(timesteps=20, schedule='linear', beta_start=0.0001, beta_end=0.02, prediction='eps', "
        "variance='fixedlarge', loss='simple', hybrid_weight=0.001, min_snr_gamma=5.0, clip_x0=True)"
    )
    sampler = Sampler(Formula(lambda x, t, label: x), Diffusion(DiffusionConfig(timesteps=20)))
    settings = sampler.settings()
    digest = hashlib.sha256(f"{settings['timesteps']} {settings['coefficients']}".encode())
    digest.update(np.cumprod(1 - np.linspace(1e-4, 0.02, 20)).tobytes() + text.encode())
    for table in (quantised.NORMAL, quantised.RELEASED):
        digest.update(table.values.tobytes())
    assert fingerprint.of_process(sampler) == digest.hexdigest()[:32]
    assert "zero_terminal_snr" not in settings["diffusion"]
    betas = DiffusionConfig(timesteps=20, betas=(0.01,) * 20)
    given = Sampler(Formula(lambda x, t, label: x), Diffusion(betas))
    assert fingerprint.of_process(given) != fingerprint.of_process(sampler)
    assert given.settings()["diffusion"]["betas"] == [0.01] * 20
