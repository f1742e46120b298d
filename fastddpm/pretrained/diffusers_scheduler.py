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
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_SPACING: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 0}
_THRESHOLDING: dict[str, Any] = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_CLIPPING: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0} | _THRESHOLDING
_OFF = Needed(default=False, values=(False,))
_NO_FLOW = {"use_flow_sigmas": _OFF}  # flow matching is another process than the paper's


@dataclass(frozen=True)
class Scheduler:
    """A class of diffusers: our method, the fields that are read with their defaults, and those that must have a value.

    `method` None: the class has none of ours; its process is read, and a warning says that ours samples. `own`: the
    fields of that method alone, which then do not matter.
    """

    method: str | None
    read: dict[str, Any]
    needed: dict[str, Needed] = field(default_factory=dict)
    own: tuple[str, ...] = ()


_DDPM = Scheduler("ancestral", _PROCESS | _SPACING | _CLIPPING | {"variance_type": "fixed_small"})
_DDIM = Scheduler(
    "ddim",
    _PROCESS | _SPACING | _CLIPPING,
    {
        "set_alpha_to_one": Needed(
            default=True, values=(True,), why="otherwise the chain ends at the noise of timestep 0, and not without any"
        )
    },
)
_DPM = Scheduler(
    "dpm2m",
    _PROCESS
    | _THRESHOLDING
    | {"timestep_spacing": "linspace", "steps_offset": 0, "variance_type": None}
    | {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False},
    {
        "solver_order": Needed(2, (2,)),
        "solver_type": Needed("midpoint", ("midpoint",)),
        # With final_sigmas_type "zero" the last step is of first order whatever these two are.
        "lower_order_final": Needed(default=True, values=(False, True)),
        "euler_at_final": Needed(default=False, values=(False, True)),
        "final_sigmas_type": Needed("zero", ("zero",)),
        "lambda_min_clipped": Needed(-math.inf, (-math.inf,)),
        "use_exponential_sigmas": _OFF,
        "use_beta_sigmas": _OFF,
        "use_lu_lambdas": _OFF,
    }
    | _NO_FLOW,
    ("flow_shift", "use_dynamic_shifting", "time_shift_type"),  # of flow matching
)
# What the classes without a method of ours have of their own.
_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_STEPS = ("timestep_spacing", "steps_offset")
_SOLVER = (
    *("solver_order", "solver_type", "lower_order_final", *_THRESHOLDING, *_SIGMAS),
    *("flow_shift", "use_dynamic_shifting", "time_shift_type"),
)
_UNIPC = (
    *("predict_x0", "disable_corrector", "solver_p", "final_sigmas_type", "sigma_min", "sigma_max", "shift_terminal"),
)
_KARRAS_ENDS = {"beta_start": 0.00085, "beta_end": 0.012}
_UNSCALED = {name: value for name, value in _PROCESS.items() if name != "rescale_betas_zero_snr"}
_KDPM2 = Scheduler(None, _UNSCALED | _KARRAS_ENDS, own=(*_SIGMAS, *_STEPS))
SCHEDULERS = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DPMSolverMultistepScheduler": _DPM,
    "HeunDiscreteScheduler": Scheduler(
        None, _UNSCALED | _KARRAS_ENDS, own=(*_SIGMAS, *_STEPS, "clip_sample", "clip_sample_range")
    ),
    "DEISMultistepScheduler": Scheduler(None, _UNSCALED, _NO_FLOW, (*_SOLVER, *_STEPS, "algorithm_type")),
    "DPMSolverSinglestepScheduler": Scheduler(
        None,
        _UNSCALED | {"variance_type": None},
        _NO_FLOW,
        (*_SOLVER, "algorithm_type", "final_sigmas_type", "lambda_min_clipped"),
    ),
    "EulerAncestralDiscreteScheduler": Scheduler(None, _PROCESS, own=_STEPS),
    "EulerDiscreteScheduler": Scheduler(
        None,
        _PROCESS,
        {"timestep_type": Needed("discrete", ("discrete",))},
        (*_SIGMAS, *_STEPS, "interpolation_type", "sigma_min", "sigma_max", "final_sigmas_type"),
    ),
    "KDPM2AncestralDiscreteScheduler": _KDPM2,
    "KDPM2DiscreteScheduler": _KDPM2,
    "LMSDiscreteScheduler": Scheduler(None, _UNSCALED, own=(*_SIGMAS, *_STEPS)),
    "PNDMScheduler": Scheduler(None, _UNSCALED, own=("skip_prk_steps", "set_alpha_to_one", *_STEPS)),
    "RePaintScheduler": Scheduler(
        None,
        {name: value for name, value in _UNSCALED.items() if name != "prediction_type"},
        own=("eta", "clip_sample"),
    ),
    "UniPCMultistepScheduler": Scheduler(
        None,
        _PROCESS,
        _NO_FLOW,
        (*_SOLVER, *_STEPS, *_UNIPC),
    ),
}
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
    values = _PROCESS | fields_of(data, kind.needed, kind.read, where, own=kind.own)
    told_variance = values.get("variance_type") is not None
    variance = choice(values, "variance_type", _VARIANCES, where) if told_variance else "fixedsmall"
    sample: dict[str, Any] = {}
    if kind.method is None:
        warnings.warn(
            f"{where}: the process of {name} is read, but fastddpm does not have its method; samples are drawn by "
            "ancestral sampling, or by --method ddim, dpm2m or dpm2m-sde",
            stacklevel=4,
        )
    else:
        sample = _sampling(kind.method, values, where) | _threshold(values, where)
    diffusion = build(
        DiffusionConfig,
        where,
        timesteps=values["num_train_timesteps"],
        **_betas(values, where),
        prediction=choice(values, "prediction_type", _PREDICTIONS, where),
        variance=variance,
        loss="hybrid" if variance == "learned_range" else "simple",
        clip_x0=True if kind.method is None else _clips(values, where),
        zero_terminal_snr=_truth(values, "rescale_betas_zero_snr", where),
    )
    if (
        kind.method == "ancestral"
        and variance != "fixedsmall"
        and (sample["spacing"] == "trailing" or sample["steps_offset"])
    ):
        warnings.warn(
            f"{where}: diffusers adds noise to the finished image with variance_type {values['variance_type']!r} and a "
            "last timestep above 0, as this timestep_spacing or steps_offset gives; fastddpm does not",
            stacklevel=4,
        )
    untold = (() if told_variance else ("variance_type",)) + (() if kind.method == "ancestral" else ("clip_sample",))
    return Process(diffusion, build(SampleConfig, where, **sample), untold)


def _betas(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the schedule as fields of DiffusionConfig: betas that are given one by one, or a schedule of ours."""
    trained = values["trained_betas"]
    if trained is None:
        schedule = choice(values, "beta_schedule", SCHEDULES, where)
        return {"schedule": schedule, "beta_start": values["beta_start"], "beta_end": values["beta_end"]}
    if not isinstance(trained, list) or any(type(beta) not in (int, float) for beta in trained):
        raise DataError(f"{where}: trained_betas must be null or a list of numbers; got {trained!r:.100}")
    if len(trained) != values["num_train_timesteps"]:
        raise DataError(
            f"{where}: trained_betas must be num_train_timesteps numbers, {values['num_train_timesteps']!r:.100}; got "
            f"{len(trained)}"
        )
    return {"betas": tuple(trained)}


def _sampling(method: str, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return method, spacing and offset of the timesteps as fields of SampleConfig."""
    spacing = choice(values, "timestep_spacing", _SPACINGS, where)
    offset = values["steps_offset"]
    if type(offset) is not int:
        raise DataError(f"{where}: steps_offset must be an integer; got {offset!r:.100}")
    if method == "dpm2m":
        method = choice(values, "algorithm_type", _DPM_METHODS, where)
        spacing = "karras" if _truth(values, "use_karras_sigmas", where) else spacing
    return {"method": method, "spacing": spacing, "steps_offset": offset if spacing == "leading" else 0}


def _threshold(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return dynamic thresholding as fields of SampleConfig; none if x_0 is clipped or left as it is.

    Thresholding to at most 1 (their default) is clipping to [-1, 1].
    """
    largest, ratio = values["sample_max_value"], values["dynamic_thresholding_ratio"]
    if not _truth(values, "thresholding", where) or largest == 1:
        return {}
    if type(largest) not in (int, float) or not largest >= 1:
        raise DataError(
            f"{where}: sample_max_value must be 1 or more with thresholding, as below 1 all images lose contrast; got "
            f"{largest!r:.100}"
        )
    if type(ratio) not in (int, float) or not 0 < ratio < 1:
        raise DataError(f"{where}: dynamic_thresholding_ratio must be in (0, 1) with thresholding; got {ratio!r:.100}")
    return {"dynamic_threshold": ratio, "dynamic_threshold_max": None if largest == math.inf else float(largest)}


def _clips(values: dict[str, Any], where: str) -> bool:
    """Return whether x_0 is clipped to [-1, 1], if it is not thresholded."""
    if values["thresholding"]:
        return True
    clips = "clip_sample" in values and _truth(values, "clip_sample", where)
    if clips and values["clip_sample_range"] != 1:
        raise DataError(
            f"{where}: clip_sample_range must be 1, because images are in [-1, 1]; got "
            f"{values['clip_sample_range']!r:.100}"
        )
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
        "beta_schedule": "linear" if config.betas else inverse(SCHEDULES, "schedule", config.schedule),
        "trained_betas": None if config.betas is None else list(config.betas),
        "variance_type": inverse(_VARIANCES, "variance", config.variance),
        "prediction_type": inverse(_PREDICTIONS, "prediction", config.prediction),
        "clip_sample": config.clip_x0,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
    }
    return {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION} | dict(sorted(values.items()))
