"""What approximates the deterministic sampler never stands alone; what its rows say of its cost."""

from __future__ import annotations

from specstream.benchmark import AcceptByError, SolverSteps, StepCache
from specstream.benchmark.media_curves import equal_rounds
from specstream.generation.solvers import AdamsBashforth2, DPMSolver2M, Euler


def test_what_approximates_is_given_the_target_at_as_many_steps() -> None:
    cache = StepCache("cache")
    euler, ab2 = equal_rounds([cache], [14.4, 14.1, 6.6, 0.2])
    assert (euler.name, ab2.name) == ("Euler", "AB2")
    assert isinstance(euler.solver, Euler) and isinstance(ab2.solver, AdamsBashforth2)
    assert euler.num_steps == ab2.num_steps == [1, 7, 14]


def test_steps_that_a_study_has_are_not_drawn_again() -> None:
    own = [
        SolverSteps("mine", Euler(), [7, 25]),
        SolverSteps("more", Euler(), [14]),
        SolverSteps("DPM", DPMSolver2M(), [7, 14]),  # another solver is no baseline
        SolverSteps("two", AdamsBashforth2(), [14]),
        AcceptByError("error"),
    ]
    mine, two = equal_rounds(own, [7.0, 14.0, 9.0])
    assert (mine.name, mine.num_steps) == ("mine", [9])
    assert (two.name, two.num_steps) == ("two", [7, 9])
    assert equal_rounds(own[:4], []) == []
