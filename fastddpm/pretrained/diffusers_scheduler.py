"""Configurations of diffusers' schedulers as our process and sampling, and back; errors name unsupported fields."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastddpm.config import DiffusionConfig, SampleConfig
from fastddpm.errors import DataError

from .diffusers_fields import VERSION, Needed, build, choice, fields_of, inverse

SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixedsmall",
    "fixed_small_log": "fixedsmall",
    "fixed_large": "fixedlarge",
    "fixed_large_log": "fixedlarge",
    "learned_range": "learned_range",
}
_SPACINGS = {name: name for name in ("linspace", "leading", "trailing")}
_PROCESS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_SPACING: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 0}
_CLIPPING: dict[str, Any] = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_BETAS = {"trained_betas": Needed(None, (None,))}


@dataclass(frozen=True)
class Scheduler:
    """A class of diffusers: our method, the fields that are read with their defaults, and those that must have a value.

    `method` None: the class has none of ours; its process is read, and a warning says that ours samples.
    """

    method: str | None
    read: dict[str, Any]
    needed: dict[str, Needed] = field(default_factory=lambda: _BETAS)


_DDPM = Scheduler("ancestral", _PROCESS | _SPACING | _CLIPPING | {"variance_type": "fixed_small"})
_DDIM = Scheduler(
    "ddim", _PROCESS | _SPACING | _CLIPPING, _BETAS | {"set_alpha_to_one": Needed(default=True, values=(True,))}
)
_DPM = Scheduler(
    "dpm2m",
    _PROCESS
    | {"timestep_spacing": "linspace", "steps_offset": 0, "thresholding": False, "sample_max_value": 1.0}
    | {"dynamic_thresholding_ratio": 0.995, "algorithm_type": "dpmsolver++", "use_karras_sigmas": False}
    | {"variance_type": None},
    _BETAS
    | {
        "solver_order": Needed(2, (2,)),
        "solver_type": Needed("midpoint", ("midpoint",)),
        "lower_order_final": Needed(default=True, values=(True,)),
        "euler_at_final": Needed(default=False, values=(False, True)),  # the last step is of first order in any case
        "final_sigmas_type": Needed("zero", ("zero",)),
        "lambda_min_clipped": Needed(-math.inf, (-math.inf,)),
        "flow_shift": Needed(1.0, (1.0,)),
    }
    | {
        name: Needed(default=False, values=(False,))
        for name in (
            "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting",
        )
    }
    | {"time_shift_type": Needed("exponential", ("exponential",))},
)  # fmt: skip
_OTHER = Scheduler(None, _PROCESS)
SCHEDULERS = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DPMSolverMultistepScheduler": _DPM,
    "HeunDiscreteScheduler": Scheduler(None, _PROCESS | {"beta_start": 0.00085, "beta_end": 0.012}),
} | {
    f"{name}Scheduler": _OTHER
    for name in (
        "DEISMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "KDPM2AncestralDiscrete",
        "KDPM2Discrete", "LMSDiscrete", "PNDM", "RePaint", "UniPCMultistep",
    )
}  # fmt: skip
_DPM_METHODS = {"dpmsolver++": "dpm2m", "sde-dpmsolver++": "dpm2m-sde"}


class Process(NamedTuple):
    """Our process and sampling of a scheduler; `untold`: the fields of ours that its class has none for."""

    diffusion: DiffusionConfig
    sample: SampleConfig
    untold: tuple[str, ...]


def read_scheduler(data: Any, where: str) -> Process:
    """Convert a scheduler's configuration to ours. Raises `DataError`, naming each field that is not supported."""
    name = data.get("_class_name", "DDPMScheduler") if isinstance(data, dict) else None
    if name is not None and (not isinstance(name, str) or name not in SCHEDULERS):
        raise DataError(
            f"{where}: the scheduler must be one of {', '.join(SCHEDULERS)}; got {name!r:.100}, whose process is not "
            "the paper's or whose sampling fastddpm does not know"
        )
    kind = SCHEDULERS[name or "DDPMScheduler"]
    values = fields_of(data, kind.needed, kind.read, where, others=kind.method is None)
    told_variance = values.get("variance_type") is not None
    variance = choice(values, "variance_type", _VARIANCES, where) if told_variance else "fixedsmall"
    sample: dict[str, Any] = {}
    if kind.method is None:
        if data.get("timestep_type", "discrete") != "discrete":
            raise DataError(f"{where}: timestep_type must be 'discrete'; got {data['timestep_type']!r:.100}")
        warnings.warn(
            f"{where}: the process of {name} is read, but fastddpm does not have its method; samples are drawn by "
            "ancestral sampling, or by --method ddim, dpm2m or dpm2m-sde",
            stacklevel=4,
        )
    else:
        sample = _sampling(kind.method, values, where)
    diffusion = build(
        DiffusionConfig,
        where,
        timesteps=values["num_train_timesteps"],
        schedule=choice(values, "beta_schedule", SCHEDULES, where),
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        prediction=choice(values, "prediction_type", _PREDICTIONS, where),
        variance=variance,
        loss="hybrid" if variance == "learned_range" else "simple",
        clip_x0=True if kind.method is None else _clips(values, where),
        zero_terminal_snr=_truth(values, "rescale_betas_zero_snr", where),
    )
    untold = (() if told_variance else ("variance_type",)) + (() if kind.method == "ancestral" else ("clip_sample",))
    return Process(diffusion, build(SampleConfig, where, **sample), untold)


def _sampling(method: str, values: dict[str, Any], where: str) -> dict[str, Any]:
    spacing = choice(values, "timestep_spacing", _SPACINGS, where)
    if spacing == "leading" and values["steps_offset"] != 0:
        raise DataError(
            f"{where}: steps_offset must be 0 with timestep_spacing 'leading'; got {values['steps_offset']!r:.100}"
        )
    if method == "dpm2m":
        method = choice(values, "algorithm_type", _DPM_METHODS, where)
        spacing = "karras" if _truth(values, "use_karras_sigmas", where) else spacing
    return {"method": method, "spacing": spacing}


def _clips(values: dict[str, Any], where: str) -> bool:
    """Return whether x_0 is clipped to [-1, 1]. Thresholding to at most 1 (their default) is just that."""
    if _truth(values, "thresholding", where):
        if values["sample_max_value"] != 1:
            raise DataError(
                f"{where}: sample_max_value must be 1 with thresholding, which then clips to [-1, 1]; got "
                f"{values['sample_max_value']!r:.100}. For dynamic thresholding turn thresholding off there, and give "
                f"--dynamic-threshold {values['dynamic_thresholding_ratio']!r:.20} when sampling, which has no largest "
                "value"
            )
        return True
    clips = "clip_sample" in values and _truth(values, "clip_sample", where)
    if clips and values["clip_sample_range"] != 1:
        raise DataError(f"{where}: clip_sample_range must be 1; got {values['clip_sample_range']!r:.100}")
    return clips


def _truth(values: dict[str, Any], name: str, where: str) -> bool:
    if not isinstance(values[name], bool):
        raise DataError(f"{where}: {name} must be true or false; got {values[name]!r:.100}")
    return values[name]


def write_scheduler(config: DiffusionConfig) -> dict[str, Any]:
    """Convert our process to a DDPMScheduler configuration. Raises `UsageError` if diffusers cannot express it."""
    values = {name: needed.values[0] for name, needed in _DDPM.needed.items()} | _DDPM.read
    values |= {
        "num_train_timesteps": config.timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": inverse(SCHEDULES, "schedule", config.schedule),
        "variance_type": inverse(_VARIANCES, "variance", config.variance),
        "prediction_type": inverse(_PREDICTIONS, "prediction", config.prediction),
        "clip_sample": config.clip_x0,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
    }
    return {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION} | dict(sorted(values.items()))
