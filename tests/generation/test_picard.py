"""Picard's iteration: the plain sampler's own sample in fewer rounds, as close as is asked for."""

import pytest
import torch
from torch import Tensor

from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.picard import PicardPipeline
from specstream.generation.solvers import AdamsBashforth2, SolverPipeline
from tests.denoising_toys import counts_of, mixture_model

STEPS = 30
ROWS = 6


def sampler(
    tolerance: float, eta: float = 0.0, window: int = 8, batch_size: int = ROWS
) -> PicardPipeline:
    return PicardPipeline(mixture_model(), STEPS, eta, tolerance, window, batch_size=batch_size)


def plain(eta: float, discrete: bool = False) -> Tensor:
    return DenoisingPipeline(mixture_model(discrete=discrete), STEPS, eta).complete(ROWS, seed=4)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_no_tolerance_is_the_plain_samplers_own_sample(eta: float, discrete: bool) -> None:
    pipeline = PicardPipeline(mixture_model(discrete=discrete), STEPS, eta, 0.0)
    found = pipeline.complete(ROWS, seed=4)
    assert torch.allclose(found, plain(eta, discrete), atol=1e-5)
    other = DenoisingPipeline(mixture_model(discrete=discrete), STEPS, eta).complete(ROWS, seed=5)
    assert not torch.allclose(found, other, atol=1e-2)


def test_a_better_solver_takes_the_steps_from_what_the_target_said() -> None:
    model, solver = mixture_model(), AdamsBashforth2()
    right = SolverPipeline(model, STEPS, solver).complete(ROWS, seed=4)
    pipeline = PicardPipeline(model, STEPS, 0.0, 1e-4, solver=solver)
    assert torch.allclose(pipeline.complete(ROWS, seed=4), right, atol=1e-3)
    assert not torch.allclose(plain(0.0), right, atol=1e-3)
    assert pipeline.stats.full_rounds / ROWS < 0.8 * STEPS
    assert "AdamsBashforth2" in pipeline.stats.law
    with pytest.raises(ValueError, match="solver is for the deterministic sampler, eta 0, not 1"):
        PicardPipeline(model, STEPS, 1.0, 1e-3, solver=solver)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_more_tolerance_takes_fewer_rounds_and_errs_more(eta: float) -> None:
    right, rounds, errors = plain(eta), [], []
    for tolerance in (1e-4, 1e-2, 1e-1):
        pipeline = sampler(tolerance, eta)
        errors.append(float((pipeline.complete(ROWS, seed=4) - right).square().mean().sqrt()))
        rounds.append(pipeline.stats.full_rounds / ROWS)
        assert pipeline.stats.guarantee.value == "bounded error"
        assert f"{tolerance:g}" in pipeline.stats.law
    assert STEPS > rounds[0] > rounds[1] > rounds[2] >= 1 + (STEPS - 1) / 8
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 1e-3


def test_a_window_of_one_is_the_plain_sampler() -> None:
    pipeline = sampler(1.0, 1.0, window=1)
    assert torch.allclose(pipeline.complete(ROWS, seed=4), plain(1.0), atol=1e-5)
    assert (pipeline.stats.target_calls, pipeline.stats.target_rows) == (STEPS, STEPS * ROWS)


def test_states_that_have_moved_too_far_do_not_stand() -> None:
    # in every round the last state that stood is one that the target's own steps lead to
    pipeline = sampler(1e-2, 1.0, batch_size=1)
    steps = list(pipeline.generate(1, seed=4))
    assert 0 < sum(s.accepted < s.drafted for s in steps) < len(steps)
    loose = sampler(1e9, 1.0, batch_size=1)
    assert all(s.accepted == s.drafted for s in loose.generate(1, seed=4))
    assert loose.stats.target_calls == 1 + -(-(STEPS - 1) // 8)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    for eta in (0.0, 1.0):
        together = sampler(0.01, eta).complete(ROWS, seed=3)
        alone = sampler(0.01, eta, batch_size=1).complete(2, seed=3, indices=[5, 1])
        assert torch.allclose(together[[5, 1]], alone, atol=1e-6)


def test_the_counts_are_what_the_target_saw() -> None:
    pipeline = sampler(0.01, batch_size=4)
    done = {}
    for step in pipeline.generate(ROWS):
        assert step.done == done.get(step.sample, 0) + step.accepted + 1
        done[step.sample] = step.done
    stats = pipeline.stats
    assert done == dict.fromkeys(range(ROWS), STEPS)
    assert (stats.target_calls, stats.target_rows) == counts_of(pipeline.target)
    assert stats.target_rows == stats.full_rounds + stats.draft_lengths
    assert sum(stats.tested) > sum(stats.accepted) > 0


@pytest.mark.parametrize(
    ("tolerance", "window", "message"),
    [(-1.0, 8, "tolerance must be at least 0"), (0.1, 0, "window must be in 1..64, got 0")],
)
def test_what_cannot_be_is_refused(tolerance: float, window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(tolerance, window=window)
