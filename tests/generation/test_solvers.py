"""Multistep solvers of the deterministic sampler: their order, and that they are what they say."""

import itertools

import pytest
import torch
from torch import Tensor

from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.solvers import (
    AdamsBashforth2,
    DPMSolver2M,
    Euler,
    Solver,
    SolverPipeline,
)
from specstream.sampling import Noise, Role
from tests.denoising_toys import counts_of, gaussian_model, mixture_model

SOLVERS: list[Solver] = [Euler(), AdamsBashforth2(), DPMSolver2M()]


def start(rows: int, size: int, seed: int = 0) -> Tensor:
    samples = torch.arange(rows)
    return Noise(seed).normal(samples, torch.zeros_like(samples), (size,), Role.START).float()


def error(found: Tensor, right: Tensor) -> float:
    return float((found - right).double().square().mean().sqrt())


@pytest.mark.parametrize("discrete", [False, True])
def test_euler_is_the_deterministic_sampler(discrete: bool) -> None:
    model = mixture_model(discrete=discrete)
    plain = DenoisingPipeline(model, 12, eta=0.0).complete(5, seed=1)
    assert torch.equal(SolverPipeline(model, 12, Euler()).complete(5, seed=1), plain)


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (AdamsBashforth2(), 2)])
def test_a_solver_converges_at_its_order(solver: Solver, order: int) -> None:
    # the flow of N(1, 1/4) carries each start z to 1 + z / 2
    right = 1 + 0.5 * start(8, 3)
    found = [
        error(SolverPipeline(gaussian_model(), steps, solver).complete(8, seed=0), right)
        for steps in (16, 32, 64)
    ]
    for coarse, fine in itertools.pairwise(found):
        assert 2**order * 0.8 < coarse / fine < 2**order * 1.25


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("solver", SOLVERS[1:])
def test_two_steps_beat_one_for_the_same_calls(solver: Solver, discrete: bool) -> None:
    right = SolverPipeline(mixture_model(discrete=discrete), 200, solver).complete(8, seed=0)
    simple, better = (
        error(SolverPipeline(mixture_model(discrete=discrete), 20, s).complete(8, seed=0), right)
        for s in (Euler(), solver)
    )
    assert better < simple


def test_dpm_solver_is_that_of_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    model = mixture_model(discrete=True)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear",
        prediction_type="sample",
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(20)
    states = start(4, 8)
    with torch.no_grad():
        for time in scheduler.timesteps:
            said = model.network(states, time.expand(4)[:, None]).float()
            states = scheduler.step(said, time, states).prev_sample
    found = SolverPipeline(model, 20, DPMSolver2M()).complete(4, seed=0)
    assert torch.allclose(found, states, atol=2e-5)
    assert error(SolverPipeline(model, 20, Euler()).complete(4, seed=0), states) > 1e-2


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_step_is_one_call_and_no_sample_depends_on_its_batch(solver: Solver) -> None:
    model = mixture_model()
    pipeline = SolverPipeline(model, 6, solver, batch_size=4)
    together = pipeline.complete(4, seed=3)
    assert (pipeline.stats.target_calls, pipeline.stats.target_rows) == (6, 24) == counts_of(model)
    assert pipeline.stats.guarantee.value == "exact law"
    assert type(solver).__name__ in pipeline.stats.law
    alone = SolverPipeline(model, 6, solver).complete(1, seed=3, indices=[2])
    assert torch.allclose(together[2], alone[0], atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_solver_of_one_or_two_steps_is_finite(solver: Solver, steps: int) -> None:
    assert SolverPipeline(mixture_model(), steps, solver).complete(2).isfinite().all()
