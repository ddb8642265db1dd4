"""How much noise each denoising step starts from, as the schedulers of `diffusers` define it.

Their `step` keeps an internal counter, one for all rows; here only their tables are used, so that
every row may stand at a step of its own.  Which of them a `scheduler_config.json` means is found in
`scheduler_config`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from specstream.transitions import StepGrid, wide

if TYPE_CHECKING:
    from diffusers import CogVideoXDDIMScheduler, DDIMScheduler

TIME_SCALE = 1000.0  # what the latest time is to a network

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
MOST_STEPS = 100_000


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
        first, last: a sampler's times lie evenly between these before they are shifted; the last
            of them is data, whatever it is.
        terminal: the time that a sampler's last step starts from, to which the others are
            stretched; None: as they fall.
    """

    shift: float = 1.0
    time_scale: float = TIME_SCALE
    first: float = 1.0
    last: float = 0.0
    terminal: float | None = None

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")
        if not 0 <= self.last < self.first <= 1:
            raise ValueError(f"first {self.first} and last {self.last} must fall within [0, 1]")
        if self.terminal is not None and not 0 < self.terminal < 1:
            raise ValueError(f"terminal must be in (0, 1), got {self.terminal}")

    def grid(self, num_steps: int) -> StepGrid:
        check_steps(num_steps)
        even = torch.linspace(self.first, self.last, num_steps + 1, dtype=torch.float64)
        sigmas = self._shifted(even)
        if self.terminal is not None and num_steps > 1:
            reached = 1 - sigmas[-2]
            sigmas = 1 - (1 - sigmas) * (1 - self.terminal) / reached
        sigmas[-1] = 0
        return StepGrid(sigmas * self.time_scale, 1 - sigmas, sigmas)

    def levels(self, uniforms: Tensor) -> Levels:
        sigmas = self._shifted(uniforms)
        return Levels(sigmas * self.time_scale, 1 - sigmas, sigmas)

    def _shifted(self, times: Tensor) -> Tensor:
        return self.shift * times / (1 + (self.shift - 1) * times)


@dataclass(frozen=True)
class SigmaSchedule(NoiseSchedule):
    """Levels named by their noise-to-data ratio s: x = (x0 + s noise) / sqrt(1 + s^2).

    What Karras et al. (2022) call sigma, for data of deviation 1, with the states scaled to what
    the network reads.  The network is told the angle atan(s), where a right one is `TIME_SCALE`.

    Args:
        sigma_min, sigma_max: the ratios of a sampler's last and first step.
        spacing: "exponential", even in log s, or "karras", even in s^(1 / rho).
    """

    sigma_min: float = 0.3
    sigma_max: float = 500.0
    spacing: Literal["exponential", "karras"] = "exponential"
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min {self.sigma_min} must lie between 0 and sigma_max {self.sigma_max}"
            )
        if self.spacing not in ("exponential", "karras"):
            raise ValueError(f"spacing must be exponential or karras, got '{self.spacing}'")

    def grid(self, num_steps: int) -> StepGrid:
        check_steps(num_steps)
        ratios = self._ratios(torch.linspace(1, 0, num_steps, dtype=torch.float64))
        levels = self._levels(torch.cat([ratios, ratios.new_zeros(1)]))
        return StepGrid(levels.times, levels.alphas, levels.sigmas)

    def levels(self, uniforms: Tensor) -> Levels:
        return self._levels(self._ratios(uniforms))

    def _ratios(self, places: Tensor) -> Tensor:
        """Return ratios for places in 0 (the least noise) to 1 (the most)."""
        if self.spacing == "exponential":
            low, high = math.log(self.sigma_min), math.log(self.sigma_max)
            return (low + places * (high - low)).exp()
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + places * (high - low)) ** self.rho

    def _levels(self, ratios: Tensor) -> Levels:
        scale = (1 + ratios**2).sqrt()
        times = ratios.atan() / math.pi * 2 * TIME_SCALE
        return Levels(times, 1 / scale, ratios / scale)


@dataclass(frozen=True)
class DiscreteSchedule(NoiseSchedule):
    """A variance-preserving chain of `num_train_timesteps` levels (Ho et al. 2020).

    Args:
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2", as in `diffusers`.
        beta_start, beta_end: the first and last noise added in a step of training.
        spacing: which levels a sampler of fewer steps visits: "leading", "trailing" or "linspace".
        zero_terminal_snr: levels are rescaled so that the first holds no data (Lin et al. 2024).
        steps_offset: added to each level of "leading".
        snr_shift: the ratio of data to noise is divided by this (CogVideoX); None: left alone.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    spacing: str = "trailing"
    zero_terminal_snr: bool = False
    steps_offset: int = 0
    snr_shift: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("beta_schedule", self.beta_schedule, BETA_SCHEDULES),
            ("spacing", self.spacing, SPACINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got '{value}'")
        if not 1 <= self.num_train_timesteps <= MOST_STEPS:
            raise ValueError(
                f"num_train_timesteps must be in 1..{MOST_STEPS}, got {self.num_train_timesteps}"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start and beta_end must be in order and in (0, 1), got {self.beta_start} "
                f"and {self.beta_end}"
            )

    def grid(self, num_steps: int) -> StepGrid:
        check_steps(num_steps, self.num_train_timesteps)
        scheduler = self._scheduler()
        scheduler.set_timesteps(num_steps)
        return discrete_grid(scheduler.alphas_cumprod, scheduler.timesteps)

    def levels(self, uniforms: Tensor) -> Levels:
        times = (uniforms * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)
        share = self._scheduler().alphas_cumprod.to(uniforms)[times]
        return Levels(times.to(uniforms), share.sqrt(), (1 - share).sqrt())

    def _scheduler(self) -> DDIMScheduler | CogVideoXDDIMScheduler:
        from diffusers import CogVideoXDDIMScheduler, DDIMScheduler

        options = {
            "num_train_timesteps": self.num_train_timesteps,
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "timestep_spacing": self.spacing,
            "rescale_betas_zero_snr": self.zero_terminal_snr,
            "steps_offset": self.steps_offset,
        }
        if self.snr_shift is None:
            return DDIMScheduler(**options)
        return CogVideoXDDIMScheduler(**options, snr_shift_scale=self.snr_shift)


def discrete_grid(alphas_cumprod: Tensor, timesteps: Tensor) -> StepGrid:
    """Return the levels at `timesteps` (N,), and data after the last."""
    places = timesteps.long().clamp(max=len(alphas_cumprod) - 1)  # an offset may exceed the last
    share = torch.cat([alphas_cumprod.double()[places], torch.ones(1).double()])
    times = torch.cat([timesteps.double(), torch.zeros(1).double()])
    return StepGrid(times, share.sqrt(), (1 - share).clamp(min=0).sqrt())


def check_steps(num_steps: int, most: int = MOST_STEPS) -> None:
    """Raise ValueError for a number of steps that the schedule does not have."""
    if not 1 <= num_steps <= most:
        raise ValueError(f"the number of denoising steps must be in 1..{most}, got {num_steps}")
