"""The table of solvers: each draws from the noise of one solution, then all are timed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from specstream.benchmark.media_curves import SolverCurve, SolverSteps, equal_rounds
from specstream.benchmark.media_methods import MediaModels, MediaSetting, SamplingRunner
from specstream.benchmark.media_records import SolverRow
from specstream.benchmark.media_rows import SolverRowMaker
from specstream.benchmark.study import say
from specstream.benchmark.timing import Plan, alternate
from specstream.generation.denoising_sampler import DenoisingSampler


@dataclass(frozen=True)
class SolverTable:
    """Solves the deterministic sampler of one task in every way.

    Args:
        models: the target.
        setting: of an adaptive solver.
        prompts: of the samples, as many as the maker's solution has.
        seed: of the noise that the solution began with.
        maker: turns samples into rows.
    """

    models: MediaModels
    setting: MediaSetting
    prompts: Sequence[int]
    seed: int
    maker: SolverRowMaker

    def rows(self, curves: Sequence[SolverCurve]) -> list[SolverRow]:
        """Return a row for every point, and for what those that approximate have to beat."""
        drawn = [each for curve in curves for each in self._draw(curve)]
        exact = {curve.name for curve in curves if isinstance(curve, SolverSteps)}
        rounds = [row.rounds for row, _ in drawn if row.curve not in exact]
        drawn += [each for curve in equal_rounds(curves, rounds) for each in self._draw(curve)]
        return self._timed([row for row, _ in drawn], [pipeline for _, pipeline in drawn])

    def _draw(self, curve: SolverCurve) -> list[tuple[SolverRow, DenoisingSampler]]:
        drawn = []
        condition = self.models.condition(self.prompts)
        for point in curve.points(self.models, self.setting):
            samples = point.pipeline.complete(len(self.prompts), condition, seed=self.seed)
            row = self.maker.row(curve.name, point, samples)
            decibels = "equal" if row.psnr is None else f"{row.psnr:.1f} dB"
            say(f"  {row.method}: {row.rounds:.2f} rounds, {decibels}")
            drawn.append((row, point.pipeline))
        return drawn

    def _timed(
        self, rows: Sequence[SolverRow], pipelines: Sequence[DenoisingSampler]
    ) -> list[SolverRow]:
        """Return the rows with the seconds of one batch, which all have drawn before: warm."""
        prompts = [[number] for number in self.prompts[: self.setting.batch_size]]
        whole = [list(range(len(prompts)))]
        found, _ = alternate(
            [SamplingRunner(self.models, pipeline) for pipeline in pipelines],
            Plan(prompts, whole, 1, 0, self.seed, self.models.place),
        )
        return [
            replace(row, seconds_in_batch=each.total / len(prompts), batch_size=len(prompts))
            for row, each in zip(rows, found, strict=True)
        ]
