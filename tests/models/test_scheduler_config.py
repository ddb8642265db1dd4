"""Noise levels: those of the schedulers of diffusers, or one line of refusal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from specstream.models.noise_schedule import SigmaSchedule
from specstream.models.scheduler_config import clip_of, schedule_of, width_remark
from specstream.transitions import Prediction, data_estimate

STEPS = 7
LTX = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
COGVIDEOX = {
    "_class_name": "CogVideoXDPMScheduler",
    "prediction_type": "v_prediction",
    "snr_shift_scale": 1.0,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
SOUND = {"_class_name": "CosineDPMSolverMultistepScheduler"}


def test_a_shift_that_depends_on_the_size_is_that_of_the_pipelines() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(LTX)
    mu = calculate_shift(2000, 1024, 4096, 0.95, 2.05)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=mu)
    schedule, prediction = schedule_of(LTX, 2000)
    grid = schedule.grid(STEPS)
    assert prediction is Prediction.FLOW
    assert torch.allclose(grid.sigmas.float(), scheduler.sigmas, atol=1e-6)
    assert torch.allclose(grid.times[:-1].float(), scheduler.timesteps, atol=1e-3)
    assert math.isclose(grid.sigmas[-2], 0.1)
    with pytest.raises(ValueError, match="use_dynamic_shifting depends on the size"):
        schedule_of(LTX)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_the_levels_of_a_solver_of_flows_are_its_own(name: str) -> None:
    import diffusers

    config = WAN | {"_class_name": name}
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(STEPS)
    grid = schedule_of(config)[0].grid(STEPS)
    assert torch.allclose(grid.sigmas.float(), scheduler.sigmas, atol=2e-6)


def test_the_levels_of_cogvideox_are_shifted_and_begin_at_noise() -> None:
    from diffusers import CogVideoXDPMScheduler

    scheduler = CogVideoXDPMScheduler.from_config(COGVIDEOX)
    scheduler.set_timesteps(STEPS)
    schedule, prediction = schedule_of(COGVIDEOX)
    grid = schedule.grid(STEPS)
    assert prediction is Prediction.VELOCITY
    assert torch.equal(grid.times[:-1].long(), scheduler.timesteps)
    share = scheduler.alphas_cumprod[scheduler.timesteps].double()
    assert torch.allclose(grid.alphas[:-1], share.sqrt()) and grid.alphas[0] == 0


def test_the_levels_of_a_chain_are_those_of_its_defaults() -> None:
    from diffusers import DDIMScheduler

    config = {"_class_name": "DDIMScheduler", "steps_offset": 1}  # "leading" is the default
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(STEPS)
    schedule, prediction = schedule_of(config)
    assert prediction is Prediction.NOISE
    assert torch.equal(schedule.grid(STEPS).times[:-1].long(), scheduler.timesteps)
    assert clip_of(config) == 1.0
    assert clip_of(config | {"clip_sample": False}) is clip_of(COGVIDEOX) is None


def test_the_preconditioning_of_sounds_is_a_velocity_at_variance_one() -> None:
    wanted = torch.linspace(math.log(0.3), math.log(500), STEPS).exp().flip(0)
    schedule, prediction = schedule_of(SOUND)
    grid = schedule.grid(STEPS)
    assert prediction is Prediction.VELOCITY
    ratios = (grid.sigmas / grid.alphas).float()
    assert torch.allclose(ratios[:-1], wanted, rtol=1e-4) and ratios[-1] == 0
    assert torch.allclose(grid.times[:-1].float() / 1000, wanted.atan() / math.pi * 2, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    states, output = torch.randn(2, 1, 5, 3, generator=generator).unbind(0)
    for step, ratio in enumerate(wanted):  # c_skip and c_out of Karras et al. (2022), at data 1
        wide = states * (1 + ratio**2) ** 0.5  # as the scheduler keeps them
        denoised = wide / (ratio**2 + 1) - output * ratio / (ratio**2 + 1) ** 0.5
        level = (grid.alphas[step : step + 1], grid.sigmas[step : step + 1])
        found = data_estimate(output, states, *level, prediction)
        assert torch.allclose(found, denoised, atol=1e-3)


def test_a_schedule_of_ratios_survives_its_record_and_refuses_nonsense() -> None:
    schedule = schedule_of(SOUND)[0]
    assert SigmaSchedule(**json.loads(json.dumps(vars(schedule)))) == schedule
    levels = schedule.levels(torch.tensor([0.0, 0.999]))
    assert torch.allclose(levels.alphas**2 + levels.sigmas**2, torch.ones(2))
    with pytest.raises(ValueError, match="sigma_min 2"):
        SigmaSchedule(2.0, 1.0)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"_class_name": "LCMScheduler"}, "LCMScheduler is none of FlowMatchEuler"),
        ({}, "a scheduler without a name is none of"),
        (WAN | {"use_karras_sigmas": True}, "use_karras_sigmas is not supported; set it false"),
        (WAN | {"use_flow_sigmas": False}, "go together only"),
        (WAN | {"final_sigmas_type": "sigma_min"}, "does not end at data"),
        (WAN | {"prediction_type": "score"}, "prediction_type 'score' is none of epsilon, "),
        (COGVIDEOX | {"prediction_type": "score"}, "prediction_type 'score' is none of epsilon, "),
        (COGVIDEOX | {"prediction_type": "epsilon"}, "a first level without data"),
        (COGVIDEOX | {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is none of linear"),
        (SOUND | {"sigma_data": 0.5}, "sigma_data 0.5 with v_prediction is not supported"),
    ],
)
def test_a_scheduler_without_a_counterpart_is_refused(config: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        schedule_of(config)


def test_a_scheduler_of_wider_steps_is_told_of() -> None:
    ddpm = {"_class_name": "DDPMScheduler"}
    assert width_remark(ddpm) is None and width_remark(WAN) is None
    assert "'fixed_large'" in str(width_remark(ddpm | {"variance_type": "fixed_large"}))
