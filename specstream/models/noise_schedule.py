"""How much noise each denoising step starts from, as the schedulers of `diffusers` define it.

Their `step` keeps an internal counter, one for all rows; here only their tables are used, so that
every row may stand at a step of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specstream.transitions import Prediction, StepGrid, wide

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


@dataclass(frozen=True, slots=True)
class Levels:
    """Noise levels of single rows."""

    times: Tensor  # (B,) what the network is told
    alphas: Tensor  # (B,) share of the data
    sigmas: Tensor  # (B,) share of the noise

    def add_noise(self, states: Tensor, normals: Tensor) -> Tensor:
        """Return the noisy states (B, *S)."""
        return wide(self.alphas, states) * states + wide(self.sigmas, states) * normals


class NoiseSchedule(ABC):
    """Noise levels of a diffusion model; a frozen dataclass of its options."""

    @abstractmethod
    def grid(self, num_steps: int) -> StepGrid:
        """Return the levels of a sampler of `num_steps` steps; ValueError for too many or none."""

    @abstractmethod
    def levels(self, uniforms: Tensor) -> Levels:
        """Return the noise levels that numbers (B,) in [0, 1) stand for, to train at."""


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Straight paths from data to noise: x = (1 - t) x0 + t noise (rectified flow).

    Args:
        shift: above 1, more of the steps are spent where noise is strong (Esser et al. 2024).
        time_scale: the network is told t times this.
    """

    shift: float = 1.0
    time_scale: float = 1000.0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    def grid(self, num_steps: int) -> StepGrid:
        check_steps(num_steps)
        even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        sigmas = self.shift * even / (1 + (self.shift - 1) * even)
        return StepGrid(sigmas * self.time_scale, 1 - sigmas, sigmas)

    def levels(self, uniforms: Tensor) -> Levels:
        sigmas = self.shift * uniforms / (1 + (self.shift - 1) * uniforms)
        return Levels(sigmas * self.time_scale, 1 - sigmas, sigmas)


@dataclass(frozen=True)
class DiscreteSchedule(NoiseSchedule):
    """A variance-preserving chain of `num_train_timesteps` levels (Ho et al. 2020).

    Args:
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2", as in `diffusers`.
        beta_start, beta_end: the first and last noise added in a step of training.
        spacing: which levels a sampler of fewer steps visits: "leading", "trailing" or "linspace".
        zero_terminal_snr: levels are rescaled so that the first holds no data (Lin et al. 2024).
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    spacing: str = "trailing"
    zero_terminal_snr: bool = False

    def grid(self, num_steps: int) -> StepGrid:
        check_steps(num_steps, self.num_train_timesteps)
        scheduler = self._scheduler()
        scheduler.set_timesteps(num_steps)
        return discrete_grid(scheduler.alphas_cumprod, scheduler.timesteps)

    def levels(self, uniforms: Tensor) -> Levels:
        times = (uniforms * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)
        share = self._scheduler().alphas_cumprod.to(uniforms)[times]
        return Levels(times.to(uniforms), share.sqrt(), (1 - share).sqrt())

    def _scheduler(self) -> DDIMScheduler:
        from diffusers import DDIMScheduler

        return DDIMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            timestep_spacing=self.spacing,
            rescale_betas_zero_snr=self.zero_terminal_snr,
        )


def discrete_grid(alphas_cumprod: Tensor, timesteps: Tensor) -> StepGrid:
    """Return the levels at `timesteps` (N,), and data after the last."""
    share = torch.cat([alphas_cumprod.double()[timesteps.long()], torch.ones(1).double()])
    times = torch.cat([timesteps.double(), torch.zeros(1).double()])
    return StepGrid(times, share.sqrt(), (1 - share).clamp(min=0).sqrt())


def check_steps(num_steps: int, most: int = 100_000) -> None:
    """Raise ValueError for a number of steps that the schedule does not have."""
    if not 1 <= num_steps <= most:
        raise ValueError(f"the number of denoising steps must be in 1..{most}, got {num_steps}")


def schedule_of(config: dict[str, Any]) -> tuple[NoiseSchedule, Prediction]:
    """Return the schedule and prediction that a `scheduler_config.json` of `diffusers` names.

    Raises ValueError for a scheduler whose levels are neither of these.
    """
    name = str(config.get("_class_name", ""))
    if "FlowMatch" in name:
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                f"{name}: use_dynamic_shifting depends on the size; set it false and give shift"
            )
        scale = float(config.get("num_train_timesteps", 1000))
        return FlowSchedule(float(config.get("shift", 1.0)), scale), Prediction.FLOW
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        shift = float(config.get("flow_shift", config.get("shift", 1.0)) or 1.0)
        return FlowSchedule(shift, float(config.get("num_train_timesteps", 1000))), Prediction.FLOW
    if "beta_schedule" not in config:
        raise ValueError(f"{name or 'this scheduler'} has no beta_schedule and is no flow")
    named = str(config.get("prediction_type", "epsilon"))
    known = {prediction.value: prediction for prediction in Prediction}
    if named not in known:
        raise ValueError(f"prediction_type '{named}' is none of {', '.join(known)}")
    schedule = DiscreteSchedule(
        int(config.get("num_train_timesteps", 1000)),
        str(config["beta_schedule"]),
        float(config.get("beta_start", 1e-4)),
        float(config.get("beta_end", 0.02)),
        str(config.get("timestep_spacing", "trailing")),
        bool(config.get("rescale_betas_zero_snr", False)),
    )
    return schedule, known[named]
