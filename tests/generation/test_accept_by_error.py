"""Deterministic sampling with drafts that stand by their error: what it costs and what it gains."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from specstream.generation.accept_by_error import AcceptByErrorPipeline
from specstream.generation.denoising import DenoisingPipeline
from specstream.generation.lengths import CostModelLength, FixedLength
from specstream.generation.solvers import AdamsBashforth2, Euler, Solver, SolverPipeline
from specstream.models import Denoiser, FlowSchedule
from specstream.sampling import Noise
from specstream.structures import StateContext
from specstream.transitions import Prediction
from tests.denoising_toys import counts_of, gaussian_model, mixture_model

STEPS = 30
ROWS = 6


def sampler(
    tolerance: float,
    order: int = 1,
    batch_size: int = ROWS,
    discrete: bool = False,
    retake: bool = True,
    solver: Solver | None = None,
) -> AcceptByErrorPipeline:
    model = mixture_model(discrete=discrete)
    return AcceptByErrorPipeline(
        model, STEPS, tolerance, order, retake, 1.0, FixedLength(5), batch_size, solver=solver
    )


def plain(discrete: bool = False) -> Tensor:
    return DenoisingPipeline(mixture_model(discrete=discrete), STEPS, 0.0).complete(ROWS)


def solved(steps: int = STEPS, discrete: bool = False, solver: Solver | None = None) -> Tensor:
    model = mixture_model(discrete=discrete)
    return SolverPipeline(model, steps, solver or AdamsBashforth2()).complete(ROWS)


def rounds(pipeline: AcceptByErrorPipeline) -> float:
    return pipeline.stats.full_rounds / pipeline.stats.prompts


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("retake", [False, True])
@pytest.mark.parametrize("order", [0, 1])
def test_no_tolerance_is_the_solver_in_as_many_rounds(
    order: int, retake: bool, discrete: bool
) -> None:
    pipeline = sampler(0.0, order, discrete=discrete, retake=retake)
    right = solved(discrete=discrete) if order else plain(discrete)
    assert torch.equal(pipeline.complete(ROWS), right)
    assert pipeline.stats.target_calls == STEPS
    assert pipeline.stats.acceptance == 0


@pytest.mark.parametrize("discrete", [False, True])
def test_more_tolerance_takes_fewer_rounds_and_errs_more(discrete: bool) -> None:
    right, found, errors = solved(discrete=discrete), [], []
    for tolerance in (1e-4, 1e-2, 1.0):
        pipeline = sampler(tolerance, discrete=discrete)
        errors.append(float((pipeline.complete(ROWS) - right).square().mean().sqrt()))
        found.append(rounds(pipeline))
        assert pipeline.stats.guarantee.value == "bounded error"
        assert f"{tolerance:g}" in pipeline.stats.law
    assert STEPS > found[0] > found[1] > found[2] >= 1 + (STEPS - 1) / 6
    assert 0 < errors[0] < errors[1] < errors[2]


def test_the_line_through_two_velocities_beats_the_last_velocity() -> None:
    constant = sampler(0.02, 0, retake=False)
    line = sampler(0.005, 1, retake=False, solver=Euler())
    right = plain()
    away = [float((p.complete(ROWS) - right).square().mean()) for p in (constant, line)]
    assert rounds(line) <= rounds(constant)
    assert away[1] < away[0] / 4


def test_steps_taken_again_by_the_targets_velocities_err_less_for_the_same_rounds() -> None:
    for solver in (Euler(), AdamsBashforth2()):
        kept, retaken = (sampler(0.01, retake=again, solver=solver) for again in (False, True))
        right = solved(solver=solver)
        away = [float((p.complete(ROWS) - right).square().mean()) for p in (kept, retaken)]
        assert away[1] < away[0] / 4
        assert rounds(retaken) < 1.1 * rounds(kept)


def test_a_better_solver_of_the_same_velocities_comes_nearer_to_the_solution() -> None:
    solution = solved(1000)
    euler, multistep = sampler(1e-3, solver=Euler()), sampler(1e-3)
    away = [float((p.complete(ROWS) - solution).square().mean()) for p in (euler, multistep)]
    assert away[1] < away[0] / 10
    assert rounds(multistep) < 1.1 * rounds(euler)
    fewer = solved(round(rounds(multistep)))  # the same solver, with a step for each round
    assert away[1] < float((fewer - solution).square().mean()) / 2


def test_a_row_whose_draft_falls_goes_on_with_the_targets_own_step() -> None:
    pipeline, noise = sampler(0.01, retake=False, solver=Euler()), Noise(0)
    context = pipeline._start(range(ROWS), {}, noise)
    before, fallen = context.states.clone(), 0
    with torch.inference_mode():
        for steps in pipeline._rounds(context, noise):
            for step in steps:
                row = step.sample
                seen = context.seen[row][None]
                said = pipeline.target(seen, torch.tensor([step.done - 1]), pipeline.grid)
                # on a flow a plain step is x + (sigma_s - sigma_t) (x - x0) / sigma_t
                sigmas = pipeline.grid.sigmas[step.done - 1 : step.done + 1]
                own = seen + (sigmas[1] - sigmas[0]) * (seen - said) / sigmas[0]
                assert torch.allclose(context.states[row], own[0].float(), atol=1e-5)
                if not step.accepted:  # nothing that was drafted is left behind
                    assert torch.equal(seen[0], before[row])
                fallen += step.accepted < step.drafted
            before = context.states.clone()
    assert fallen > ROWS


def test_a_sample_does_not_depend_on_its_batch() -> None:
    together = sampler(0.01).complete(ROWS, seed=3)
    alone = sampler(0.01, batch_size=1).complete(2, seed=3, indices=[5, 1])
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
    assert stats.elements == ROWS * STEPS == stats.full_rounds + sum(stats.accepted)
    assert stats.target_rows == stats.full_rounds + stats.draft_lengths
    assert sum(stats.tested) > sum(stats.accepted) > 0


def test_a_velocity_that_never_changes_is_guessed_for_ever() -> None:
    model = gaussian_model(1.0, 1e-9)  # all data in one point: the paths are straight
    pipeline = AcceptByErrorPipeline(model, STEPS, 1e-6, 0, lengths=FixedLength(9))
    assert torch.allclose(pipeline.complete(2), torch.ones(2, 3), atol=1e-5)
    assert pipeline.stats.target_calls == 1 + 3  # the first guesses nothing, then ten at once


@pytest.mark.parametrize(
    ("tolerance", "order", "message"),
    [(-1.0, 1, "tolerance must be at least 0"), (0.1, 2, "order must be 0 or 1, got 2")],
)
def test_what_cannot_be_is_refused(tolerance: float, order: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(tolerance, order)


@pytest.mark.parametrize("steps", [1, 2])
def test_costs_are_measured_of_samples_that_hardly_have_steps(
    steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipeline = AcceptByErrorPipeline(mixture_model(), steps, lengths=CostModelLength(8))
    right = SolverPipeline(mixture_model(), steps, AdamsBashforth2()).complete(3, seed=1)
    assert torch.equal(pipeline.complete(3, seed=1), right)


class Steep(nn.Module):
    """The exact word on data of -1 and 1: near them a small move of the state turns it over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor, times: Tensor) -> Tensor:
        sigmas = (times[:, 0] / 1000).view(-1, 1, 1).clamp(min=1e-9)
        return torch.tanh((1 - sigmas) * states / sigmas**2)


class Watched(AcceptByErrorPipeline):
    """Notes how far each state that a step is taken from lies from the one that the target saw."""

    moved: list[float]

    def _retake(self, part: StateContext, velocities: Tensor, estimates: Tensor) -> Tensor:
        self.taken = super()._retake(part, velocities, estimates)
        return self.taken

    def _commit(self, context, index, counts, states, *rest) -> None:  # type: ignore[no-untyped-def]
        apart = (self.taken[:, :-1] - states[:, 1:]).square().flatten(2).mean(2)
        for row, count in enumerate(counts.tolist()):
            self.moved += apart[row, :count].tolist()
        super()._commit(context, index, counts, states, *rest)


@pytest.mark.parametrize("order", [0, 1])
def test_steps_that_are_taken_again_start_within_the_tolerance_of_what_the_target_saw(
    order: int,
) -> None:
    target = Denoiser(Steep(), FlowSchedule(), (1, 16), Prediction.DATA)
    pipeline = Watched(target, STEPS, 1e-3, order)
    pipeline.moved = []
    pipeline.complete(16, seed=0)
    assert pipeline.moved and max(pipeline.moved) <= 1e-3 + 1e-9
    assert "each state and guess of a velocity within" in pipeline.law
