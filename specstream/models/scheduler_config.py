"""What a `scheduler_config.json` of `diffusers` means here, or in one line why it means nothing.

A scheduler there is a noise schedule, a prediction and a solver in one; the first two are taken,
the solver is the pipeline's own.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from specstream.models.noise_schedule import (
    DiscreteSchedule,
    FlowSchedule,
    NoiseSchedule,
    SigmaSchedule,
)
from specstream.transitions import Prediction

FLOW = "FlowMatchEulerDiscreteScheduler"
SIGMA = "CosineDPMSolverMultistepScheduler"
SIGMA_DEFAULTS: dict[str, Any] = {  # written down, as its class cannot be had without torchsde
    "sigma_min": 0.3,
    "sigma_max": 500.0,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "prediction_type": "v_prediction",
    "rho": 7.0,
}
SNR_SHIFTED = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
CLIPPED = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")
SOLVERS = (  # of betas, the first four also of flows
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)
KNOWN = (FLOW, SIGMA, *SNR_SHIFTED, *CLIPPED, *SOLVERS)
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
UNMAPPED = (  # options that move the levels, or the estimates, in ways that have no counterpart
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "invert_sigmas",
    "stochastic_sampling",
    "thresholding",
    "trained_betas",
)


def schedule_of(
    config: dict[str, Any], num_tokens: int | None = None
) -> tuple[NoiseSchedule, Prediction]:
    """Return the schedule and the prediction that a scheduler's config names.

    `num_tokens` is the length of the sequence that the network sees, on which the shift of some
    flows depends.  Raises ValueError in one line for what has no counterpart.
    """
    name = str(config.get("_class_name", ""))
    if name not in KNOWN:
        raise ValueError(f"{name or 'a scheduler without a name'} is none of {', '.join(KNOWN)}")
    config = SIGMA_DEFAULTS | config if name == SIGMA else with_defaults(name, config)
    for option in UNMAPPED:
        if config.get(option):
            raise ValueError(f"{name}: {option} is not supported; set it false")
    if config.get("final_sigmas_type") == "sigma_min":
        raise ValueError(f"{name}: final_sigmas_type 'sigma_min' does not end at data")
    if name == FLOW:
        return flow_of(name, config, num_tokens), Prediction.FLOW
    named = str(config["prediction_type"])
    known = {kind.value: kind for kind in Prediction if kind is not Prediction.FLOW}
    if named not in (*known, "flow_prediction"):
        raise ValueError(f"prediction_type '{named}' is none of {', '.join(known)}")
    if config.get("use_flow_sigmas") or named == "flow_prediction":
        if not (config.get("use_flow_sigmas") and named == "flow_prediction"):
            raise ValueError(
                f"{name}: prediction_type 'flow_prediction' and use_flow_sigmas go together only"
            )
        return flow_of(name, config, num_tokens), Prediction.FLOW
    if name == SIGMA:
        return sigma_schedule_of(config), known[named]
    return discrete_of(name, config, known[named]), known[named]


def width_remark(config: dict[str, Any]) -> str | None:
    """Say where a scheduler draws steps of another width than eta 1 does here; None: nowhere."""
    name = str(config["_class_name"])
    if not name.startswith("DDPM"):
        return None
    kind = with_defaults(name, config)["variance_type"]
    if kind in ("fixed_small", "fixed_small_log"):
        return None
    return (
        f"the scheduler's variance_type is '{kind}'; steps of eta 1 have the posterior's width "
        "here, which it calls 'fixed_small'"
    )


def with_defaults(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the options of its class in `diffusers` that it leaves out."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults | dict(config)


def flow_of(name: str, config: dict[str, Any], num_tokens: int | None) -> FlowSchedule:
    """Return the schedule of a flow; ValueError where its shift needs a length that is not given.

    The times of a sampler's steps lie where the pipelines of `diffusers` put them: evenly to 0, but
    those of a multistep solver end or begin one step of training early.
    """
    steps = float(config["num_train_timesteps"])
    first, last = 1.0, 0.0
    if name == "UniPCMultistepScheduler":
        last = 1 / steps
    elif name != FLOW:
        first = 1 - 1 / steps
    terminal = config.get("shift_terminal") or None
    return FlowSchedule(shift_of(name, config, num_tokens), steps, first, last, terminal)


def shift_of(name: str, config: dict[str, Any], num_tokens: int | None) -> float:
    """Return the shift of a flow's times: a number, or one that grows with the sequence."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift", config.get("shift")) or 1.0)
    if num_tokens is None:
        raise ValueError(
            f"{name}: use_dynamic_shifting depends on the size; set it false and give shift"
        )
    low, high = config.get("base_shift") or 0.5, config.get("max_shift") or 1.15
    short, long = config.get("base_image_seq_len") or 256, config.get("max_image_seq_len") or 4096
    mu = low + (num_tokens - short) * (high - low) / (long - short)
    return math.exp(mu) if config.get("time_shift_type") == "exponential" else mu


def sigma_schedule_of(config: dict[str, Any]) -> SigmaSchedule:
    """Return the schedule of sigmas; ValueError where its states cannot be scaled to variance 1."""
    if config["sigma_data"] != 1 or config["prediction_type"] != Prediction.VELOCITY.value:
        raise ValueError(
            f"{SIGMA}: sigma_data {config['sigma_data']} with {config['prediction_type']} is not "
            "supported; only 1 with v_prediction is"
        )
    return SigmaSchedule(
        float(config["sigma_min"]),
        float(config["sigma_max"]),
        config["sigma_schedule"],
        float(config["rho"]),
    )


def discrete_of(name: str, config: dict[str, Any], prediction: Prediction) -> DiscreteSchedule:
    """Return the schedule of a chain of betas; ValueError for betas that are not known."""
    if config["beta_schedule"] not in BETA_SCHEDULES:
        raise ValueError(
            f"beta_schedule '{config['beta_schedule']}' is none of {', '.join(BETA_SCHEDULES)}"
        )
    from_noise = bool(config.get("rescale_betas_zero_snr"))
    if from_noise and prediction is Prediction.NOISE:
        raise ValueError("a first level without data tells nothing to a prediction of the noise")
    return DiscreteSchedule(
        int(config["num_train_timesteps"]),
        str(config["beta_schedule"]),
        float(config["beta_start"]),
        float(config["beta_end"]),
        str(config.get("timestep_spacing") or "leading"),
        from_noise,
        int(config.get("steps_offset") or 0),
        float(config["snr_shift_scale"]) if name in SNR_SHIFTED else None,
    )


def clip_of(config: dict[str, Any]) -> float | None:
    """Return the largest value that the scheduler lets an estimate of the data have, if any."""
    name = str(config.get("_class_name", ""))
    if name not in CLIPPED:
        return None
    config = with_defaults(name, config)
    return float(config["clip_sample_range"]) if config["clip_sample"] else None
