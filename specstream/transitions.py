"""Denoising as a chain of Gaussians: from an estimate of the data to the law of the next state.

A state is x = alpha * x0 + sigma * noise, with alpha and sigma of the step it stands at; step 0 is
noise and step N is data.  Every diffusion model is used through its estimate of x0, whatever its
network predicts, so drafters, targets and verifiers speak of the same thing.

Shapes: R rows, each at a step of its own, S the shape of a state, N steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from specstream.sampling import Noise, Role
from specstream.structures import KnownParts, StateContext

SMALLEST = 1e-12


class Prediction(Enum):
    """What a network's output means."""

    NOISE = "epsilon"
    VELOCITY = "v_prediction"  # alpha * noise - sigma * x0 (Salimans and Ho 2022, appendix D)
    FLOW = "flow_prediction"  # noise - x0, the velocity of a straight path (Lipman et al. 2023)
    DATA = "sample"


@dataclass(frozen=True, slots=True)
class StepGrid:
    """The N + 1 noise levels of a sampler with N steps, from noise to data."""

    times: Tensor  # (N+1,) what the network is told of each level; of the last only students are
    alphas: Tensor  # (N+1,) float64, share of the data
    sigmas: Tensor  # (N+1,) float64, share of the noise; falling

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def to(self, device: torch.device) -> StepGrid:
        """Return the grid on another device."""
        return StepGrid(self.times.to(device), self.alphas.to(device), self.sigmas.to(device))


@dataclass(frozen=True, slots=True)
class Gaussian:
    """A diagonal Gaussian of one width for each row."""

    means: Tensor  # (R, *S)
    stds: Tensor  # (R,)

    def sample(self, normals: Tensor) -> Tensor:
        """Return the states (R, *S) that standard normal numbers (R, *S) stand for."""
        return self.means + wide(self.stds, self.means) * normals.to(self.means)


def wide(values: Tensor, like: Tensor) -> Tensor:
    """Return values (R,) in the shape and dtype that multiplies states (R, *S)."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def data_estimate(
    output: Tensor, states: Tensor, alphas: Tensor, sigmas: Tensor, prediction: Prediction
) -> Tensor:
    """Return the estimate of x0 (R, *S) that a network's output (R, *S) at `states` stands for."""
    alpha, sigma = wide(alphas, states), wide(sigmas, states)
    if prediction is Prediction.DATA:
        return output
    if prediction is Prediction.NOISE:
        return (states - sigma * output) / alpha.clamp(min=SMALLEST)
    if prediction is Prediction.VELOCITY:
        return (alpha * states - sigma * output) / (alpha**2 + sigma**2)
    return (states - sigma * output) / (alpha + sigma)


def network_output(
    estimates: Tensor, states: Tensor, alphas: Tensor, sigmas: Tensor, prediction: Prediction
) -> Tensor:
    """Return the output (R, *S) that stands for an estimate of x0: `data_estimate`'s inverse."""
    alpha, sigma = wide(alphas, states), wide(sigmas, states)
    if prediction is Prediction.DATA:
        return estimates
    noise = (states - alpha * estimates) / sigma.clamp(min=SMALLEST)
    if prediction is Prediction.NOISE:
        return noise
    if prediction is Prediction.VELOCITY:
        return alpha * noise - sigma * estimates
    return noise - estimates


def step_stds(grid: StepGrid, eta: float) -> Tensor:
    """Return the standard deviation of each step's law, (N,) float64.

    eta times that of the posterior q(x_s | x_t, x0): 0 is deterministic (DDIM, or Euler's method on
    a flow), 1 ancestral sampling (Song et al. 2021, eq. 16).  The last step's is 0 if it ends at
    sigma 0.
    """
    alpha_t, alpha_s = grid.alphas[:-1], grid.alphas[1:]
    sigma_t, sigma_s = grid.sigmas[:-1], grid.sigmas[1:]
    added = sigma_t**2 - (alpha_t / alpha_s.clamp(min=SMALLEST)) ** 2 * sigma_s**2
    return eta * (added.clamp(min=0) / sigma_t**2).sqrt() * sigma_s


def transition(
    estimates: Tensor, states: Tensor, steps: Tensor, grid: StepGrid, eta: float
) -> Gaussian:
    """Return the law of the next state of each row (Song et al. 2021, eq. 12).

    estimates and states (R, *S); steps (R,) int64 in 0..N-1: where each row stands.
    """
    stds = step_stds(grid, eta)[steps]
    alpha_t, sigma_t = grid.alphas[steps], grid.sigmas[steps]
    alpha_s, sigma_s = grid.alphas[steps + 1], grid.sigmas[steps + 1]
    kept = (sigma_s**2 - stds**2).clamp(min=0).sqrt() / sigma_t  # of the noise that x_t holds
    means = wide(kept, states) * states + wide(alpha_s - kept * alpha_t, states) * estimates
    return Gaussian(means, stds)


def noised(data: Tensor, normals: Tensor, steps: Tensor, grid: StepGrid) -> Tensor:
    """Return the states (R, *S) at `steps` (R,) of data (R, *S) under normal numbers (R, *S)."""
    alphas, sigmas = wide(grid.alphas[steps], data), wide(grid.sigmas[steps], data)
    return alphas * data + sigmas * normals.to(data)


def place_known(
    states: Tensor, context: StateContext, steps: Tensor, grid: StepGrid, eta: float, noise: Noise
) -> Tensor:
    """Return states (R, *S) at `steps` (R,) with noised data wherever the data are given.

    RePaint (Lugmayr et al. 2022), algorithm 1 without its repetitions.  The noise is one number of
    the sample's index and the step, whatever was drafted and rejected before; a deterministic
    sampler (eta 0) has no other noise than that which the sample begins with.
    """
    known = context.known
    if known is None:
        return states
    elements, role = (steps, Role.KNOWN) if eta else (torch.zeros_like(steps), Role.START)
    normals = noise.normal(context.samples, elements, states.shape[1:], role)
    return torch.where(known.given, noised(known.data.to(states), normals, steps, grid), states)


def mean_square(changes: Tensor, known: KnownParts | None) -> Tensor:
    """Return the mean square (R, K), float64, of changes (R, K, *S) in what is to be made."""
    squares = changes.double().square()
    if known is None:
        return squares.flatten(2).mean(-1)
    made = (~known.given).expand_as(known.data)[:, None]  # (R, 1, *S)
    return (squares * made).flatten(2).sum(-1) / made.flatten(2).sum(-1).clamp(min=1)


def estimate_weights(grid: StepGrid, eta: float) -> Tensor:
    """Return how far a step's mean moves with the estimate of x0, (N,) float64."""
    stds = step_stds(grid, eta)
    kept = (grid.sigmas[1:] ** 2 - stds**2).clamp(min=0).sqrt() / grid.sigmas[:-1]
    return grid.alphas[1:] - kept * grid.alphas[:-1]
