"""What every field of a diffusers scheduler's config means here: read, replaced by diffkd's own, or refused.

A Denoiser takes the noise table, or the law of sigma, what the network predicts, and the bound on x0 from a
scheduler; a sampler of diffkd, on its own even grid of times, takes the place of the scheduler's. A field
that would change anything else is refused, so that no model is drawn other than it was meant without a word.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from typing import Any

from diffkd.errors import UserError
from diffkd.io.text import quoted

# variance-preserving, and their networks are given the integer index of a noise table as time
SCHEDULERS = (
    "DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler", "UniPCMultistepScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler",
)  # fmt: skip
# those whose step bounds x0 by clip_sample_range where clip_sample is set; TCDScheduler has the fields alone
CLIPPING = (
    "DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "LCMScheduler",
    "HeunDiscreteScheduler",
)  # fmt: skip

READ = frozenset(
    (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
        "rescale_betas_zero_snr", "prediction_type", "clip_sample", "clip_sample_range",
    )
)  # fmt: skip
REPLACED = frozenset(  # how the scheduler's own sampler steps
    (
        # its grid of times and where that ends
        "timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "original_inference_steps",
        "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
        "lambda_min_clipped", "final_sigmas_type", "interpolation_type", "sigma_min", "sigma_max",
        # its solver and the noise that it adds
        "solver_order", "solver_type", "solver_p", "algorithm_type", "lower_order_final", "euler_at_final",
        "predict_x0", "disable_corrector", "predictor_order", "corrector_order", "tau_func", "variance_type",
        "noise_sampler_seed",
        # options of what is refused
        "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "use_dynamic_shifting",
        "time_shift_type", "shift_terminal",
    )
)  # fmt: skip
ONLY: dict[str, tuple[Any, ...]] = {
    "thresholding": (False, None),  # x0 scaled by a quantile of itself
    "use_flow_sigmas": (False, None),  # True: see `is_flow`
    "timestep_type": ("discrete", None),  # continuous: the network is given log(sigma) / 4 as time
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TIMESTEP_SCALING = (10, 1e16)  # LCM's default, with which a few steps are exact to 1e-6; more overflows
FIELDS = READ | REPLACED | frozenset(ONLY) | {"timestep_scaling"}

FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_PREDICTIONS = {"flow_prediction": "flow", "sample": "sample"}  # of those in SCHEDULERS that are flows
FLOW_ONLY: dict[str, tuple[Any, ...]] = {"invert_sigmas": (False, None)}  # time from noise to data
FLOW_FIELDS = frozenset(
    (
        # read
        "num_train_timesteps", "shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal",
        # of which a pipeline makes the mu of its dynamic shift
        "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
        # replaced
        "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling",
        *FLOW_ONLY,
    )
)  # fmt: skip
FLOW_MAP = (
    "FlowMapEulerDiscreteScheduler"  # its own grid is an even one of times; diffusers before 0.40 has none
)
FLOW_MAP_FIELDS = frozenset(("num_train_timesteps", "shift"))
EDM = "EDMEulerScheduler"
EDM_ONLY: dict[str, tuple[Any, ...]] = {
    "sigma_schedule": ("karras",), "prediction_type": ("epsilon", "v_prediction"),
}  # fmt: skip
EDM_FIELDS = frozenset(
    (
        "num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "rho",
        "final_sigmas_type",  # replaced: diffkd's samplers end at 0
        *EDM_ONLY,
    )
)  # fmt: skip


def is_flow(scheduler: Any) -> bool:
    """Whether its path is alpha = 1 - sigma, whatever betas its config has too."""
    return is_flow_match(scheduler) or bool(scheduler.config.get("use_flow_sigmas"))


def is_flow_match(scheduler: Any) -> bool:
    """Whether it is of a flow alone, and gives its network the whole of T sigma as time."""
    return _is(scheduler, FLOW, FLOW_MAP)


def is_edm(scheduler: Any) -> bool:
    """Whether its path is alpha = 1, for a network that is preconditioned."""
    return _is(scheduler, EDM)


def check_flow(scheduler: Any) -> None:
    """Raises UserError, naming the field, for a scheduler of a flow that is not read as it is meant."""
    if is_flow_match(scheduler):
        fields = FLOW_MAP_FIELDS if _is(scheduler, FLOW_MAP) else FLOW_FIELDS
        _check_fields(scheduler, fields, FLOW_ONLY)
        return
    _check_kind(scheduler)
    only = {**ONLY, "use_flow_sigmas": (True,), "prediction_type": tuple(FLOW_PREDICTIONS)}
    _check_fields(scheduler, FIELDS, only)


def check_edm(scheduler: Any) -> None:
    """Raises UserError, naming the field, for a scheduler of EDM's kind that is not read as it is meant."""
    _check_fields(scheduler, EDM_FIELDS, EDM_ONLY)


def _is(scheduler: Any, *names: str) -> bool:
    return any(base.__name__ in names for base in type(scheduler).__mro__)


def _check_kind(scheduler: Any) -> None:
    if not _is(scheduler, *SCHEDULERS):
        why = "" if hasattr(scheduler, "betas") else " has no betas, and"
        raise UserError(
            f"scheduler {type(scheduler).__name__}{why} is not supported; supported are discrete schedulers: "
            f"{', '.join(SCHEDULERS)}"
        )


def _check_fields(scheduler: Any, fields: Collection[str], only: Mapping[str, tuple[Any, ...]]) -> None:
    kind = type(scheduler).__name__
    for key, parameter in inspect.signature(type(scheduler).__init__).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD or key not in scheduler.config:
            continue
        value, allowed = scheduler.config[key], only.get(key)
        if key == "prediction_type" and allowed is not None and value not in allowed:
            raise UserError(
                f"scheduler {kind} has prediction_type {quoted(value)}; supported are {', '.join(allowed)}"
            )
        if key == "timestep_scaling" and not _between(value, *TIMESTEP_SCALING):
            raise UserError(f"scheduler {kind} has timestep_scaling {quoted(value)}; supported is 10 to 1e16")
        if allowed is not None and value not in allowed:
            raise UserError(
                f"scheduler {kind} has {key} {quoted(value)}, which diffkd's samplers do not do; set it to "
                f"{allowed[0]} in scheduler_config.json to draw without it; diffkd evaluate --sampler stock "
                "measures the pipeline as it is"
            )
        if key not in fields and value != parameter.default:
            raise UserError(
                f"scheduler {kind} has {key} {quoted(value)}, a setting that this version of diffkd does not "
                f"know; leave it at {quoted(parameter.default)}, or use a newer diffkd"
            )


def check_scheduler(scheduler: Any) -> None:
    """Raises UserError, naming the field, for a scheduler with betas that `samplers.sample` would not stand
    for, and for one without."""
    _check_kind(scheduler)
    if is_flow(scheduler):
        raise UserError(
            f"scheduler {type(scheduler).__name__} has use_flow_sigmas True: its path is a flow, not a table "
            "of betas, and no pipeline of this kind is read as one; diffkd evaluate --sampler stock measures "
            "it as it is"
        )
    _check_fields(scheduler, FIELDS, {**ONLY, "prediction_type": PREDICTIONS})


def clip_of(scheduler: Any) -> float | None:
    """The scheduler's bound on the predicted x0, None for none. Raises UserError for one that is not > 0."""
    config = scheduler.config
    if not _is(scheduler, *CLIPPING) or not config.get("clip_sample"):
        return None
    clip = config.get("clip_sample_range", 1.0)
    if not (type(clip) in (int, float) and 0 < clip < math.inf):
        raise UserError(f"clip_sample_range {quoted(clip)} is not supported; use a number above 0")
    return float(clip)


def _between(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most
