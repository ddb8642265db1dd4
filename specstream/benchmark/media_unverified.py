"""Ways to draw media that promise no law: selective refinement, and students of few steps.

Their samples say nothing by themselves: after each such row stand the plain target's with as many
steps as it made calls, and with as many as fit into its seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specstream.benchmark.media_methods import (
    EqualRounds,
    EqualSeconds,
    MediaModels,
    MediaSetting,
    SamplingMethod,
    missing_drafter,
)
from specstream.drafters import IndependentDenoiser
from specstream.generation.consistency import ConsistencyPipeline
from specstream.generation.decoded_score import quality_score
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.media_loading import refined_parts, rough_model
from specstream.generation.refinement import RefinementPipeline
from specstream.models.consistency import ConsistencyModel
from specstream.verification.quality import AdaptiveThreshold


class UnverifiedSteps(SamplingMethod):
    """Steps that nothing verifies: what the target reaches at the same cost has to be worse."""

    eta: float

    def beside(self) -> list[SamplingMethod]:
        return [
            EqualRounds(f"as many calls as {self.name}", self.name, self.eta),
            EqualSeconds(f"as many seconds as {self.name}", self.name, self.eta),
        ]


@dataclass(frozen=True)
class Refined(UnverifiedSteps):
    """A draft of few steps, of which the target does again what scores badly.

    Args:
        name: what the table calls it.
        draft_steps: steps of the draft.
        main_steps: of the target; it does the last `strength` of them.
        run: run folder of a smaller diffusion model that drafts; null: the target itself.
        score: how bad a part is: by the target's word, or by looks alone.
        threshold: parts are refined whose score exceeds the mean by so many deviations.
        strength: share of the way back to noise that refinement starts from.
        eta: of draft and refinement; 0 is the deterministic sampler.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    draft_steps: int = 6
    main_steps: int = 12
    run: str | None = None
    score: Literal["disagreement", "appearance"] = "disagreement"
    threshold: float = 0.7
    strength: float = 0.6
    eta: float = 0.0
    tasks: list[str] | None = None
    kind = "refined"

    def missing(self) -> str | None:
        return None if self.run is None else missing_drafter(self.name, self.run)

    def pipeline(self, models: MediaModels, setting: MediaSetting) -> DenoisingSampler:
        drafter = None if self.run is None else models.drafter(self.run, setting.guidance)
        return RefinementPipeline(
            models.target,
            rough_model(drafter),
            self.draft_steps,
            self.main_steps,
            quality_score(self.score, models.target),
            AdaptiveThreshold(self.threshold),
            self.strength,
            setting.guidance,
            setting.batch_size,
            self.eta,
            refined_parts(models.target, models.processor),
        )


@dataclass(frozen=True)
class Student(UnverifiedSteps):
    """A student of few steps, sampling alone; its calls are those of a drafter, not the target's.

    Args:
        name: what the table calls it.
        run: its run folder, or its draft/.
        num_steps: calls for a sample.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    run: str
    num_steps: int = 4
    tasks: list[str] | None = None
    kind = "student"
    eta = 0.0  # of the sampler that it was distilled from

    def missing(self) -> str | None:
        return missing_drafter(self.name, self.run)

    def pipeline(self, models: MediaModels, setting: MediaSetting) -> DenoisingSampler:
        drafter = models.drafter(self.run, setting.guidance)
        student = drafter.denoiser if isinstance(drafter, IndependentDenoiser) else None
        if not isinstance(student, ConsistencyModel):
            raise ValueError(f"method '{self.name}': '{self.run}' holds no student of few steps")
        if student.guidance != setting.guidance:
            raise ValueError(
                f"method '{self.name}': the student has learned guidance {student.guidance:g}, and "
                f"the task's is {setting.guidance:g}"
            )
        return ConsistencyPipeline(models.target, student, self.num_steps, setting.batch_size)
