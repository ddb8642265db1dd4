"""Selective refinement in the table of media: judged by what its calls and its seconds give alone.

It promises no law, so its samples say nothing by themselves: after each such row stand the plain
target's with as many steps as it made calls, and with as many as fit into its seconds.
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
from specstream.generation.denoising_sampler import DenoisingSampler
from specstream.generation.media_loading import refined_parts, rough_model
from specstream.generation.refinement import RefinementPipeline
from specstream.generation.refinement_scores import Appearance, TargetDisagreement
from specstream.verification.quality import AdaptiveThreshold


@dataclass(frozen=True)
class Refined(SamplingMethod):
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
            Appearance() if self.score == "appearance" else TargetDisagreement(),
            AdaptiveThreshold(self.threshold),
            self.strength,
            setting.guidance,
            setting.batch_size,
            self.eta,
            refined_parts(models.target, models.processor),
        )

    def beside(self) -> list[SamplingMethod]:
        return [
            EqualRounds(f"as many calls as {self.name}", self.name, self.eta),
            EqualSeconds(f"as many seconds as {self.name}", self.name, self.eta),
        ]
