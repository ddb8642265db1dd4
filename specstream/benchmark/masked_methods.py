"""Who fills canvases: one row of the table each, as records of their options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from specstream.benchmark.pair import draft_folder
from specstream.benchmark.runners import Runner
from specstream.drafters import CanvasDrafter, MaskedDraftModel
from specstream.drafters.loading import RECORD, load_canvas_drafter
from specstream.drafters.self_speculative import load_head
from specstream.generation import (
    DraftLength,
    DualDiffusionPipeline,
    FixedLength,
    FreeDavePipeline,
    Limits,
    MaskedPipeline,
    Sampler,
)
from specstream.generation.loading import find_device
from specstream.generation.self_speculative_pipeline import SelfSpeculativePipeline
from specstream.models import PretrainedMaskedLM
from specstream.processors import TextProcessor
from specstream.sampling import Sampling
from specstream.structures import MAX_DRAFT, Stats
from specstream.unmasking import StaticSchedule, Threshold, Unmasking
from specstream.verification import CanvasVerifier, ConfidenceThreshold, NoVerification


@dataclass(frozen=True, slots=True)
class Filling:
    """What every method of a task fills alike."""

    sampling: Sampling
    limits: Limits
    block_tokens: int | None = None
    batch_size: int = 1
    compile: bool = False

    def sampler(self, unmasking: Unmasking) -> Sampler:
        """Return how the target fills, under a rule of unmasking."""
        return Sampler(unmasking, self.sampling, self.limits, self.block_tokens)


class MaskedModels:
    """A target and the drafters of its task, each loaded once, on one device."""

    def __init__(self, target: str, dtype: str, device: str) -> None:
        self.path, self.dtype, self.place = target, dtype, find_device(device)
        lm = PretrainedMaskedLM(target, dtype, device=self.place)
        self.target = lm.eval().requires_grad_(False).to(self.place)
        self.processor = TextProcessor.from_pretrained(target)
        self._drafters: dict[str, CanvasDrafter] = {}

    def drafter(
        self, run: str, unmasking: Unmasking | None, sure: float | None = None
    ) -> CanvasDrafter:
        """Return the drafter of a run folder, as it was trained or under other options."""
        if run not in self._drafters:
            folder = draft_folder(run)
            loaded = load_canvas_drafter(folder, self.target, self.dtype, device=self.place)
            self._drafters[run] = loaded.to(self.place)
        drafter = self._drafters[run]
        if unmasking is None and sure is None:
            return drafter
        if not isinstance(drafter, MaskedDraftModel):
            raise ValueError(f"the {type(drafter).__name__} of '{run}' takes no options of its own")
        return MaskedDraftModel(
            self.target,
            lambda: drafter.model,
            unmasking if unmasking is not None else drafter.unmasking,
            sure if sure is not None else drafter.sure,
        )

    def unaided_drafter(self, run: str, unmasking: Unmasking | None) -> CanvasDrafter:
        """Return the drafter of a run folder as one that fills what it is not sure of too."""
        drafter = self.drafter(run, unmasking)
        is_choosy = isinstance(drafter, MaskedDraftModel) and drafter.sure > 0
        return self.drafter(run, unmasking, sure=0.0) if is_choosy else drafter

    def self_speculative(
        self, run: str, num_windows: int, speculate: bool, filling: Filling
    ) -> SelfSpeculativePipeline:
        """Return the pipeline of a run folder with a head on this target."""
        return SelfSpeculativePipeline(
            self.target,
            load_head(draft_folder(run), self.target).to(self.place),
            self.processor,
            num_windows,
            speculate=speculate,
            sampler=filling.sampler(StaticSchedule(1)),  # has no meaning here
            batch_size=filling.batch_size,
        )


class FillingRunner(Runner):
    """A pipeline of canvases, and its passes of the whole target over a canvas."""

    variant = "only"

    def __init__(self, pipeline: MaskedPipeline) -> None:
        self.pipeline = pipeline
        self.full_passes = 0.0  # over the runs whose counts were taken

    def run(
        self, prompts: Sequence[list[int]], indices: Sequence[int], seed: int
    ) -> list[list[int]]:
        done = self.pipeline.complete(prompts, seed=seed, indices=indices)
        return [completion.tokens for completion in done]

    def take_stats(self) -> Stats:
        self.full_passes += self.pipeline.full_passes
        return replace(self.pipeline.stats)

    def restart_counts(self) -> None:
        self.full_passes = 0.0


class MaskedMethod(ABC):
    """A way to fill canvases; subclasses are frozen dataclasses of their options.

    `tasks` are the names of the tasks it is for, None for all.
    """

    name: str
    tasks: list[str] | None
    kind: ClassVar[str]
    weighs_calls: ClassVar[bool] = False  # target_calls are full passes, by their operations

    @abstractmethod
    def pipeline(self, models: MaskedModels, filling: Filling) -> MaskedPipeline:
        """Build it; ValueError when the models do not fit together."""

    def missing(self) -> str | None:
        """Say what this method needs and is not there yet; None when all is."""
        run: str | None = getattr(self, "run", None)
        if run is None:
            return None
        if not Path(run).is_dir():
            return f"method '{self.name}': there is no folder '{run}'"
        if not (draft_folder(run) / RECORD).is_file():
            return f"method '{self.name}': '{run}' holds no finished drafter"
        return None

    def refusal(self, filling: Filling) -> str | None:
        """Say why this method cannot fill what is asked for; None when it can."""
        return None


@dataclass(frozen=True)
class PlainSampling(MaskedMethod):
    """The target alone: what the others are compared with.

    Args:
        name: what the table calls it.
        unmasking: which positions a step fills.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    unmasking: Unmasking
    tasks: list[str] | None = None
    kind = "plain"

    def pipeline(self, models: MaskedModels, filling: Filling) -> MaskedPipeline:
        return MaskedPipeline(
            models.target,
            models.processor,
            filling.sampler(self.unmasking),
            filling.batch_size,
            filling.compile,
        )


@dataclass(frozen=True)
class NestedSteps(MaskedMethod):
    """Several steps of a static schedule verified in one pass (FreeDave); temperature 0 only.

    Args:
        name: what the table calls it.
        unmasking: the schedule whose output is reproduced.
        lengths: how many of its steps are drafted; CostModelLength chooses by measured costs.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    unmasking: StaticSchedule
    lengths: DraftLength = field(default_factory=lambda: FixedLength(4))
    tasks: list[str] | None = None
    kind = "nested steps"

    def __post_init__(self) -> None:
        if self.unmasking.order == "random":
            raise ValueError(f"method '{self.name}': nested steps need an order, not 'random'")

    def refusal(self, filling: Filling) -> str | None:
        if filling.sampling.greedy:
            return None
        return f"method '{self.name}': nested steps are verified at temperature 0 only"

    def pipeline(self, models: MaskedModels, filling: Filling) -> MaskedPipeline:
        return FreeDavePipeline(
            models.target,
            models.processor,
            self.lengths,
            filling.sampler(self.unmasking),
            filling.batch_size,
            filling.compile,
        )


@dataclass(frozen=True)
class DraftAndVerify(MaskedMethod):
    """A drafter's guesses that the target lets stand by a rule (DualDiffusion).

    Args:
        name: what the table calls it.
        run: a run folder, or its draft/.
        verifier: the rule.
        lengths: how many denoising steps the drafter makes in a round; CostModelLength chooses by
            measured costs.
        copies: of the canvas on which a draft is scored; 1 shows it whole; null is 1 for a target
            trained with corruption, else 2.
        unmasking: which positions the target fills in steps of its own.
        draft_unmasking: which positions a step of the drafter fills; null is the drafter's own.
        sure: guesses of the drafter less probable are left to the target; null is its own.
        max_target_calls: after so many the rest is filled at once.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    run: str
    verifier: CanvasVerifier = field(default_factory=lambda: ConfidenceThreshold(0.5))
    lengths: DraftLength = field(default_factory=lambda: FixedLength(4))
    copies: int | None = None
    unmasking: Unmasking = field(default_factory=lambda: Threshold(0.9))
    draft_unmasking: Unmasking | None = None
    sure: float | None = None
    max_target_calls: int | None = None
    tasks: list[str] | None = None
    kind = "draft and verify"

    def pipeline(self, models: MaskedModels, filling: Filling) -> MaskedPipeline:
        return DualDiffusionPipeline(
            models.target,
            models.drafter(self.run, self.draft_unmasking, self.sure),
            models.processor,
            self.verifier,
            self.lengths,
            self.copies,
            self.max_target_calls,
            filling.sampler(self.unmasking),
            filling.batch_size,
            filling.compile,
        )


@dataclass(frozen=True)
class DrafterAlone(MaskedMethod):
    """The drafter fills the canvas by itself: what verifying has to be better than.

    All its steps are one round, in which finished blocks stay cached, and no guess is left to the
    target.

    Args:
        name: what the table calls it.
        run: a run folder, or its draft/.
        unmasking: which positions a step of the drafter fills; null is the drafter's own rule.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    run: str
    unmasking: Unmasking | None = None
    tasks: list[str] | None = None
    kind = "drafter alone"

    def pipeline(self, models: MaskedModels, filling: Filling) -> MaskedPipeline:
        return DualDiffusionPipeline(
            models.target,
            models.unaided_drafter(self.run, self.unmasking),
            models.processor,
            NoVerification(),
            FixedLength(MAX_DRAFT),
            sampler=filling.sampler(StaticSchedule(1)),
            batch_size=filling.batch_size,
            compile=filling.compile,
        )


@dataclass(frozen=True)
class SelfSpeculative(MaskedMethod):
    """The target's own guesses, verified by a causal layer on its states (SSMD).

    Its causal passes are counted as the share of a pass of the target that their operations are.

    Args:
        name: what the table calls it.
        run: a run folder of a self-speculative head, or its draft/.
        num_windows: passes of the target that fill a canvas.
        speculate: False draws one token a causal pass, which is the same law.
        tasks: names of the tasks it is for; null for all.
    """

    name: str
    run: str
    num_windows: int = 4
    speculate: bool = True
    tasks: list[str] | None = None
    kind = "self-speculative"
    weighs_calls = True

    def refusal(self, filling: Filling) -> str | None:
        if filling.block_tokens is None:
            return None
        return f"method '{self.name}': self-speculation fills in random order, not in blocks"

    def pipeline(self, models: MaskedModels, filling: Filling) -> MaskedPipeline:
        return models.self_speculative(self.run, self.num_windows, self.speculate, filling)
