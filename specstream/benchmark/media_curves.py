"""Solvers of the deterministic sampler, each with an option that trades rounds for an error.

A further one is a frozen dataclass that makes a `DenoisingSampler` for each value of its option.
What is not the target with fewer steps has to beat just that: `equal_rounds` adds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from specstream.benchmark.media_methods import MediaModels, MediaSetting
from specstream.generation.accept_by_error import AcceptByErrorPipeline
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.media_loading import drafted_lengths
from specstream.generation.picard import PicardPipeline
from specstream.generation.solvers import AdamsBashforth2, Euler, Solver, SolverPipeline
from specstream.generation.step_caching import StepCachePipeline

STEPS = (5, 7, 9, 11, 13, 17, 25)
TOLERANCES = (0.001, 0.003, 0.01, 0.03)
BASELINES: tuple[tuple[str, Solver], ...] = (("Euler", Euler()), ("AB2", AdamsBashforth2()))


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A sampler under one value of a curve's option."""

    label: str
    pipeline: DenoisingSampler


class SolverCurve(ABC):
    """A way to solve the deterministic sampler; subclasses are frozen dataclasses.

    `tasks` are the names of the tasks it is for, None for all.
    """

    name: str
    tasks: list[str] | None

    @abstractmethod
    def points(self, models: MediaModels, setting: MediaSetting) -> Iterator[CurvePoint]:
        """Build a sampler for each value; setting.num_steps are those of an adaptive one."""


@dataclass(frozen=True)
class SolverSteps(SolverCurve):
    """A solver that takes so many steps, one call each.

    Args:
        name: what the table calls it.
        solver: the method.
        num_steps: a point for each.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    solver: Solver = field(default_factory=Euler)
    num_steps: list[int] = field(default_factory=lambda: list(STEPS))
    tasks: list[str] | None = None

    def points(self, models: MediaModels, setting: MediaSetting) -> Iterator[CurvePoint]:
        for num_steps in self.num_steps:
            pipeline = SolverPipeline(
                models.target,
                num_steps,
                self.solver,
                guidance=setting.guidance,
                batch_size=setting.batch_size,
            )
            yield CurvePoint(f"{self.name} {num_steps}", pipeline)


@dataclass(frozen=True)
class AcceptByError(SolverCurve):
    """Guessed velocities that stand where the target's are near enough.

    Args:
        name: what the table calls it.
        order: 0 guesses the last velocity (FlowCast), 1 the line through the last two.
        retake: take the steps that stand again by the target's velocities; False: as published.
        tolerances: of the velocity; a point for each.
        window: steps that are drafted in a round, at most.
        solver: what takes the steps; null: Euler of order 0, Adams-Bashforth of order 1.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    order: int = 1
    retake: bool = True
    tolerances: list[float] = field(default_factory=lambda: list(TOLERANCES))
    window: int = 8
    solver: Solver | None = None
    tasks: list[str] | None = None

    def points(self, models: MediaModels, setting: MediaSetting) -> Iterator[CurvePoint]:
        for tolerance in self.tolerances:
            pipeline = AcceptByErrorPipeline(
                models.target,
                setting.num_steps,
                tolerance,
                self.order,
                retake=self.retake,
                guidance=setting.guidance,
                lengths=drafted_lengths(None, self.window),
                batch_size=setting.batch_size,
                solver=self.solver,
            )
            yield CurvePoint(f"{self.name} {tolerance:g}", pipeline)


@dataclass(frozen=True)
class Picard(SolverCurve):
    """Windows of steps that are iterated until they stand still.

    Args:
        name: what the table calls it.
        tolerances: by which a state that stands may have moved; a point for each.
        window: states evaluated in a call.
        solver: what takes the steps; null: Euler.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    tolerances: list[float] = field(default_factory=lambda: list(TOLERANCES))
    window: int = 8
    solver: Solver | None = None
    tasks: list[str] | None = None

    def points(self, models: MediaModels, setting: MediaSetting) -> Iterator[CurvePoint]:
        for tolerance in self.tolerances:
            pipeline = PicardPipeline(
                models.target,
                setting.num_steps,
                tolerance=tolerance,
                window=self.window,
                guidance=setting.guidance,
                batch_size=setting.batch_size,
                solver=self.solver,
            )
            yield CurvePoint(f"{self.name} {tolerance:g}", pipeline)


@dataclass(frozen=True)
class StepCache(SolverCurve):
    """Steps that the target's first block takes with what its other blocks added before.

    A step that is skipped costs a call of the first block, which is no round.

    Args:
        name: what the table calls it.
        tolerances: of the first block's relative change; a point for each.
        window: the most steps that are skipped in a row.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    tolerances: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.4])
    window: int = 8
    tasks: list[str] | None = None

    def points(self, models: MediaModels, setting: MediaSetting) -> Iterator[CurvePoint]:
        for tolerance in self.tolerances:
            pipeline = StepCachePipeline(
                models.target,
                setting.num_steps,
                tolerance=tolerance,
                window=self.window,
                guidance=setting.guidance,
                batch_size=setting.batch_size,
            )
            yield CurvePoint(f"{self.name} {tolerance:g}", pipeline)


def equal_rounds(curves: Sequence[SolverCurve], rounds: Sequence[float]) -> list[SolverSteps]:
    """Return the target with as many steps as others took rounds, by Euler and Adams-Bashforth.

    `rounds` are those of every point of the curves that approximate.  A number of steps that the
    study's own `curves` have for the same solver is left out; what is added goes by their name.
    """
    wanted = {max(round(number), 1) for number in rounds}
    added = []
    for name, solver in BASELINES:
        own = [c for c in curves if isinstance(c, SolverSteps) and type(c.solver) is type(solver)]
        missing = wanted.difference(*(curve.num_steps for curve in own))
        if missing:
            added.append(SolverSteps(own[0].name if own else name, solver, sorted(missing)))
    return added
